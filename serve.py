"""A trained model, put to use.

    python serve.py configs/tiny.py generate "Return the"

Standard output carries the text and nothing else.
"""

import argparse
import ipaddress
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import checkpoint
import stage
import tokenizer
from machine import pick_device
from model import Sampling
from sft.conversations import Message, cleaned
from sft.templates import render
from stage import UserError


def text_stream(spm: tokenizer.Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The text of ids that go on with another text, as they come, in pieces that together are their `spm.decode`.

    A character may be spelt by several byte tokens: it is held back until it is whole.
    """
    seen: list[int] = []
    sent = ""
    for token in ids:
        seen.append(token)
        text = spm.decode(seen, begins=False)
        if not text.endswith("\ufffd"):
            yield text[len(sent) :]
            sent = text
    yield spm.decode(seen, begins=False)[len(sent) :]


def read_input() -> str:
    """Standard input, whole. UserError if it is not UTF-8."""
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8: {error.reason} at byte {error.start}") from None


def generate(arguments: argparse.Namespace) -> None:
    """Continues a prompt, from the argument or standard input, on standard output; a fine-tuned model answers it."""
    import configs

    options = {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p")}
    try:
        Sampling(**options)
    except ValueError as error:
        raise UserError(str(error)) from None
    experiment = configs.load(arguments.config)
    directory = Path(arguments.checkpoint) if arguments.checkpoint else experiment.latest()
    spm = experiment.load_tokenizer(directory)
    checkpoint.must_match(directory, spm.sha256)
    model = checkpoint.load_model(directory, str(pick_device()))
    prompt = read_input() if arguments.prompt in (None, "-") else arguments.prompt
    ids, shown, stop = [spm.bos, *spm.encode(prompt)], prompt, (spm.eos,)
    if template := checkpoint.template(directory):
        if not (asked := cleaned(prompt)):
            raise UserError("the prompt is empty; this model was taught to answer: ask it something")
        ids, shown = render(template, [Message("user", asked)], spm, ask=True)[0], ""
        stop = (spm.eos, *spm.control.values())  # no answer has a control piece in it
        if len(ids) >= model.config.context_length:
            raise UserError(f"the prompt takes {len(ids):,} tokens; the model sees {model.config.context_length:,}")
    for i in range(arguments.samples):
        new = model.stream(
            [ids],
            arguments.max_tokens,
            seed=None if arguments.seed is None else arguments.seed + i,
            stop=stop,
            **options,
        )
        print(shown, end="", flush=True)
        try:
            for text in text_stream(spm, (token for step in new for _, token in step)):
                print(text, end="", flush=True)
        except ValueError as error:
            raise UserError(str(error)) from None
        finally:
            print(flush=True)
        if i + 1 < arguments.samples:
            print("-" * 40)


def api(arguments: argparse.Namespace) -> None:
    """Serves an HTTP API that OpenAI's clients speak, and a page to chat on. With LUMI_API_KEY in the environment,
    clients have to send that key. Ctrl-C or SIGTERM ends it once what was asked is answered."""
    import configs
    from serving.engine import Engine
    from serving.served import load

    try:
        from serving.api import listen, run
    except ImportError as error:
        raise UserError(f"the server needs {error.name}; install it with: pip install fastapi uvicorn") from None
    experiment = configs.load(arguments.config)
    listening = listen(arguments.host, arguments.port)
    key = os.environ.get("LUMI_API_KEY", "").strip() or None
    if not key and not ipaddress.ip_address(listening.getsockname()[0]).is_loopback:
        stage.log.warning("anyone who reaches this machine may use the model: set LUMI_API_KEY to ask for a key")
    served = load(experiment, arguments.checkpoint and Path(arguments.checkpoint))
    with Engine(served.model, served.tokenizer, arguments.batch_size, arguments.queue) as engine:
        listening.listen()  # from here on nobody is turned away
        host, port = listening.getsockname()[:2]
        place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        stage.log.info(f"{served.name} answers on http://{place}: a page to chat on, the API under /v1; Ctrl-C ends it")
        run(served, engine, listening, key)


def arguments() -> argparse.ArgumentParser:
    p = stage.parser(__doc__)
    p.add_argument("--checkpoint", metavar="DIR", help="a trained model by path, instead of the experiment's")
    commands = p.add_subparsers(required=True, metavar="COMMAND")
    g = commands.add_parser("generate", description=generate.__doc__, help="continue a prompt")
    g.set_defaults(command=generate)
    g.add_argument("prompt", nargs="?", metavar="PROMPT", help="the text to continue; none, or -, reads standard input")
    g.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token (0.7)")
    g.add_argument("--top-p", type=float, default=0.9, help="sample among the likeliest tokens of this share (0.9)")
    g.add_argument("--top-k", type=int, help="sample among the k likeliest tokens (all)")
    g.add_argument("--max-tokens", type=stage.positive, default=200, help="at most so many new tokens (200)")
    g.add_argument("--seed", type=int, help="of the sampling (another each time)")
    g.add_argument("--samples", type=stage.positive, default=1, help="how many continuations (1)")
    a = commands.add_parser("api", description=api.__doc__, help="serve an HTTP API and a page to chat on")
    a.set_defaults(command=api)
    a.add_argument("--host", default="127.0.0.1", help="the address to listen on (127.0.0.1: this machine only)")
    a.add_argument("--port", type=port, default=8000, help="the port to listen on; 0 finds a free one (8000)")
    a.add_argument("--batch-size", type=stage.positive, default=8, help="texts decoded together (8)")
    a.add_argument("--queue", type=stage.positive, default=64, help="how many more may wait (64)")
    return p


def port(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port; expected 0 to 65535")
    return int(text)


if __name__ == "__main__":
    parsed = arguments().parse_args()
    stage.run(parsed.command, parsed)
