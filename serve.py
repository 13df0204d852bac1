"""A trained model, put to use.

    python serve.py configs/tiny.py generate "Return the"
    python serve.py configs/tiny.py chat
    python serve.py configs/tiny.py api

Of chat and generate standard output carries the text and nothing else.
"""

import argparse
import ipaddress
import math
import os
import sys
from pathlib import Path

import cli
from cli import UserError


def read_input() -> str:
    """Standard input, whole. UserError if it is not UTF-8."""
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8: {error.reason} at byte {error.start}") from None


# What takes long to import is imported by the command: Ctrl-C is then answered as while the model loads.


def sampling(arguments: argparse.Namespace):
    """What the switches ask for, a `generate.Sampling`. UserError for what cannot be."""
    from generate import Sampling

    names = "temperature", "top_p", "top_k", "min_p", "repetition_penalty"
    try:
        return Sampling(**{name: getattr(arguments, name) for name in names})
    except ValueError as error:
        raise UserError(str(error)) from None


def load(arguments: argparse.Namespace):
    """The model that the arguments name: a `serving.served.Served`."""
    import configs
    import serving.served

    return serving.served.load(configs.load(arguments.config), arguments.checkpoint)


def generate(arguments: argparse.Namespace) -> None:
    """Continues a prompt, from the argument or standard input, on standard output; a fine-tuned model answers it."""
    from serving.chat import write
    from serving.engine import Engine, Failed, Request

    options, samples, seed = sampling(arguments), arguments.samples, arguments.seed
    served = load(arguments)
    spm = served.tokenizer
    prompt = read_input() if arguments.prompt in (None, "-") else arguments.prompt
    ids = served.prompt(prompt) if served.template else [spm.bos, *spm.encode(prompt)]
    requests = [
        Request(
            ids=ids,
            max_tokens=arguments.max_tokens,
            sampling=options,
            seed=None if seed is None else seed + i,
            stop_ids=served.stop,
        )
        for i in range(samples)
    ]
    with Engine(served.model, spm, rows=min(samples, 8), waiting=samples, seconds=math.inf) as engine:
        try:
            for i, generation in enumerate(engine.submit(requests)):
                print("-" * 40 + "\n" if i else "", end="")
                write("" if served.template else prompt)
                try:
                    for piece in generation:
                        write(piece.text)
                finally:
                    print(flush=True)
        except (ValueError, Failed) as error:
            raise UserError(str(error)) from None


def chat(arguments: argparse.Namespace) -> None:
    """A conversation in the terminal; of a pipe, every line is a turn. /help lists its commands."""
    from serving.chat import chat
    from serving.engine import Engine

    options = sampling(arguments)
    served = load(arguments)
    if not served.template:
        raise UserError(
            f"{served.name} was not taught to answer: fine-tune it with python pipeline.py {arguments.config} sft, or "
            f"have it go on with a text: python serve.py {arguments.config} generate"
        )
    with Engine(served.model, served.tokenizer, rows=1, seconds=math.inf) as engine:
        chat(served, engine, options, arguments.max_tokens, arguments.seed, arguments.system)


def api(arguments: argparse.Namespace) -> None:
    """Serves an HTTP API that OpenAI's clients speak, and a page to chat on. With LUMI_API_KEY in the environment,
    clients have to send that key. Ctrl-C or SIGTERM ends it once what was asked is answered."""
    from serving.engine import Engine

    try:
        from serving.api import listen, run
    except ImportError as error:
        raise UserError(f"the server needs {error.name}; install it with: pip install fastapi uvicorn") from None
    listening = listen(arguments.host, arguments.port)
    key = os.environ.get("LUMI_API_KEY", "").strip() or None
    if not key and not ipaddress.ip_address(listening.getsockname()[0]).is_loopback:
        cli.log.warning("anyone who reaches this machine may use the model: set LUMI_API_KEY to ask for a key")
    served = load(arguments)
    with Engine(served.model, served.tokenizer, arguments.batch_size, arguments.queue) as engine:
        host, port = listening.getsockname()[:2]
        place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        cli.log.info(f"{served.name} answers on http://{place}: a page to chat on, the API under /v1; Ctrl-C ends it")
        run(served, engine, listening, key)


def arguments() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    one = {"type": Path, "metavar": "DIR", "help": "a trained model by path, instead of the experiment's"}
    p.add_argument("--checkpoint", **one)
    commands = p.add_subparsers(required=True, metavar="COMMAND")

    def add(command, name: str, help: str) -> argparse.ArgumentParser:
        """A command; what belongs to all of them may stand before it or behind."""
        c = commands.add_parser(name, description=command.__doc__, help=help)
        c.set_defaults(command=command)
        c.add_argument("--checkpoint", default=argparse.SUPPRESS, **one)
        c.add_argument("--log-level", default=argparse.SUPPRESS, choices=cli.LEVELS)
        return c

    def writes(command, name: str, most: int | None, help: str) -> argparse.ArgumentParser:
        """A command that has the model write; most: tokens, None: as many as fit."""
        c = add(command, name, help)
        c.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token (0.7)")
        c.add_argument("--top-p", type=float, default=0.9, help="sample among the likeliest tokens of this share (0.9)")
        c.add_argument("--top-k", type=int, help="sample among the k likeliest tokens (all)")
        c.add_argument("--min-p", type=float, help="sample among tokens this much as likely as the likeliest (all)")
        c.add_argument("--repetition-penalty", type=float, default=1.0, help="over 1, tokens seen are less likely (1)")
        c.add_argument(
            "--max-tokens",
            type=cli.positive,
            default=most,
            help=f"at most so many new tokens ({most or 'what fits'})",
        )
        c.add_argument("--seed", type=seed, help="of the sampling (another each time)")
        return c

    g = writes(generate, "generate", 200, "continue a prompt")
    g.add_argument("prompt", nargs="?", metavar="PROMPT", help="the text to continue; none, or -, reads standard input")
    g.add_argument("--samples", type=cli.positive, default=1, help="how many continuations (1)")
    c = writes(chat, "chat", None, "talk with a fine-tuned model")
    c.add_argument("--system", metavar="TEXT", default="", help="a system message (none)")
    a = add(api, "api", "serve an HTTP API and a page to chat on")
    a.add_argument("--host", default="127.0.0.1", help="the address to listen on (127.0.0.1: this machine only)")
    a.add_argument("--port", type=port, default=8000, help="the port to listen on; 0 finds a free one (8000)")
    a.add_argument("--batch-size", type=cli.positive, default=8, help="texts decoded together (8)")
    a.add_argument("--queue", type=cli.positive, default=64, help="how many more may wait (64)")
    return p


def seed(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text) >= 2**62:
        raise argparse.ArgumentTypeError(f"{text!r} is not a seed; expected a whole number from 0 to 2^62 - 1")
    return int(text)


def port(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port; expected 0 to 65535")
    return int(text)


if __name__ == "__main__":
    parsed = arguments().parse_args()
    cli.run(parsed.command, parsed)
