"""Uses a trained model.

    python serve.py configs/tiny.py generate "Return the"
    python serve.py configs/tiny.py chat
    python serve.py configs/tiny.py api

Standard output of chat and generate carries only the model's text.
Next: open http://127.0.0.1:8000 after api, or share the model: python convert.py to-hf configs/tiny.py tiny-hf
"""

import argparse
import math
import os
import sys
from pathlib import Path

import cli
from cli import UserError

# Each command does its slow imports itself, so that --help and Ctrl-C are answered at once before them.


def load(arguments: argparse.Namespace):
    """The model, and the sampling that the command's switches ask for."""
    import configs
    import serving.served
    from generate import Sampling

    names = Sampling.__dataclass_fields__.keys() & vars(arguments).keys()
    try:
        sampling = Sampling(**{name: getattr(arguments, name) for name in names})
    except ValueError as error:
        raise UserError(str(error)) from None
    served = serving.served.load(configs.load(arguments.config), arguments.checkpoint, arguments.precision)
    return served, sampling


def generate(arguments: argparse.Namespace) -> None:
    """A base model continues the prompt. A fine-tuned model answers it, with the template that it learnt."""
    from generate import Continuation
    from serving.chat import notice, write
    from serving.engine import Engine, Generation, seed_of

    served, sampling = load(arguments)
    reads = arguments.prompt in (None, "-")
    if reads and sys.stdin.isatty():
        notice("write the prompt, and end it with Ctrl-D on a line of its own")
    text = sys.stdin.buffer.read() if reads else os.fsencode(arguments.prompt)
    try:
        prompt = text.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt is not UTF-8: {error.reason} at byte {error.start}") from None
    ids = served.prompt(prompt)
    served.room(ids)
    continuation = Continuation(ids, arguments.max_tokens, sampling, seed_of(arguments.seed, 0), served.stop)
    generation = Generation(served.tokenizer, continuation)
    with Engine(served.model, rows=1, seconds=math.inf) as engine:
        engine.submit([generation])
        write("" if served.template else prompt)
        for piece in generation:
            write(piece.text)
        write("\n")


def chat(arguments: argparse.Namespace) -> None:
    """A conversation in the terminal. In a pipe, every line is a message. /help lists the commands."""
    from serving.chat import Chat
    from serving.engine import Engine

    served, sampling = load(arguments)
    if not served.template:
        command = f"python pipeline.py {arguments.config} sft"
        raise UserError(f"{served.name} is a base model and cannot chat; fine-tune it: {command}")
    with Engine(served.model, rows=1, seconds=math.inf) as engine:
        Chat(served, engine, sampling, arguments.max_tokens, arguments.seed, arguments.system).run()


def api(arguments: argparse.Namespace) -> None:
    """Serves OpenAI's API and a page to chat on. If the environment has LUMI_API_KEY, clients must send that key.
    After Ctrl-C or SIGTERM, the server finishes the unfinished answers and ends."""
    from serving.engine import Engine

    try:
        from serving.api import Server, create_app, listen
    except ImportError as error:
        packages = "pip install fastapi uvicorn prometheus_client"
        raise UserError(f"the server needs {error.name}; install it with: {packages}") from None
    listening = listen(arguments.host, arguments.port)
    host, port = listening.getsockname()[:2]
    key = os.environ.get("LUMI_API_KEY", "").strip()
    if not key and host not in ("127.0.0.1", "::1"):
        cli.log.warning("no API key: everyone who reaches this machine can use the model; set LUMI_API_KEY to a key")
    served, _ = load(arguments)
    with Engine(served.model, arguments.batch_size, arguments.queue) as engine:
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        cli.log.info(f"{served.name} answers on http://{address}: chat page at /, API under /v1; Ctrl-C stops it")
        app = create_app(served, engine, key, arguments.allow_origin)
        Server(app, engine).run(sockets=[listening])


def arguments() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    commands = p.add_subparsers(required=True, metavar="COMMAND")
    g = commands.add_parser("generate", help="continue a text, or answer a question")
    g.add_argument("prompt", nargs="?", metavar="PROMPT", help="without it, or with -, read standard input")
    g.add_argument("--max-tokens", type=cli.positive, default=200, help="the largest number of new tokens (200)")
    c = commands.add_parser("chat", help="chat with a fine-tuned model")
    c.add_argument("--system", metavar="TEXT", default="", help="a system message (none)")
    c.add_argument("--max-tokens", type=cli.positive, help="the largest number of new tokens (as fits the context)")
    for parser in (g, c):
        parser.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest token (0.7)")
        parser.add_argument("--top-p", type=float, default=0.9, help="the likeliest tokens that reach this share (0.9)")
        parser.add_argument("--top-k", type=int, help="the k likeliest tokens (all)")
        parser.add_argument("--min-p", type=float, help="least probability, as a share of the likeliest token's (0)")
        parser.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: repeat less (1)")
        parser.add_argument("--seed", type=int, help="the same seed gives the same text; -1: a new text each time (-1)")
    a = commands.add_parser("api", help="serve an HTTP API and a page to chat on")
    a.add_argument("--host", default="127.0.0.1", help="the address to listen on (127.0.0.1: this machine only)")
    a.add_argument("--port", type=int, default=8000, help="the port to listen on; 0: any free port (8000)")
    a.add_argument("--batch-size", type=cli.positive, default=8, help="texts decoded together (8)")
    a.add_argument("--queue", type=cli.positive, default=64, help="texts that may wait (64)")
    allowed = "a web page's origin, such as http://localhost:3000, that may call the API; * allows all (none)"
    plain = {"type": lambda text: text.rstrip("/").lower(), "metavar": "ORIGIN"}  # as browsers send it
    a.add_argument("--allow-origin", action="append", default=[], help=allowed, **plain)
    given = {"type": Path, "metavar": "DIR", "help": "a trained model, instead of the latest"}
    p.add_argument("--checkpoint", **given)
    for parser, command in (g, generate), (c, chat), (a, api):  # shared switches may stand after the command too
        parser.set_defaults(command=command)
        parser.description, parser.epilog = command.__doc__, __doc__
        parser.add_argument("--checkpoint", default=argparse.SUPPRESS, **given)
        parser.add_argument("--log-level", default=argparse.SUPPRESS, choices=cli.LEVELS)
        precisions = {"choices": ("float32", "bfloat16", "int8"), "default": "float32"}
        about = "dtype of the weights (float32); bfloat16: half the memory; int8: 8 bits, for a CPU with bfloat16"
        parser.add_argument("--precision", **precisions, help=about)
    return p


if __name__ == "__main__":
    parsed = arguments().parse_args()
    cli.run(parsed.command, parsed)
