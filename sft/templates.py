"""Templates: how a conversation is spelt in ids, and which of them are trained.

Ids and mask are made together, in `render`, and nowhere else: training, evaluation and serving spell a conversation
alike, and so does the exported tokenizer, whose template stands beside each. Trained is what the assistant says, and
the piece that ends it.

A control piece that a message spells is text, and gets ordinary pieces. An answer is encoded apart from what stands
before it: pieces may reach over the end of a line, and a model is to be asked with the ids that it was trained on.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import checkpoint
from cli import UserError
from sft.conversations import Message
from tokenizer import Tokenizer

START, END = "<|im_start|>", "<|im_end|>"
RESPONSE = "### Response:\n"
OPENING = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n",
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n",
)  # Stanford Alpaca's, without an input and with one


class Part(NamedTuple):
    """A stretch of a conversation: text, or the name of a control piece, "" for the one that ends a text."""

    text: str
    trained: bool = False
    control: bool = False


def chatml(messages: Sequence[Message], ask: bool) -> Iterator[Part]:
    for role, content, given in messages:
        answer = role == "assistant"
        yield Part(START, control=True)
        yield Part("assistant\n" if answer else f"{role}\n{content}" + f"\n\n{given}" * bool(given))
        if answer:
            yield Part(content, trained=True)
        yield Part(END, trained=answer, control=True)
        yield Part("\n")
    if ask:
        yield Part(START, control=True)
        yield Part("assistant\n")


def instruct(messages: Sequence[Message], ask: bool, before_input: str = "\n\n") -> Iterator[Part]:
    for role, content, given in messages:
        if role == "assistant":
            yield Part(content, trained=True)
            yield Part("", trained=True, control=True)
        elif role == "system":
            yield Part(f"{content}\n\n")
        else:
            yield Part(f"### Instruction:\n{content}" + f"{before_input}{given}" * bool(given) + f"\n\n{RESPONSE}")


def alpaca(messages: Sequence[Message], ask: bool) -> Iterator[Part]:
    if messages[0].role != "system":
        yield Part(OPENING[bool(messages[0].input)])
    yield from instruct(messages, ask, "\n\n### Input:\n")


@dataclass(frozen=True)
class Template:
    """parts(messages, ask): the stretches of a conversation, in order; ask: an answer is to follow. jinja: the same for
    transformers. cut: a regular expression of the places where text is encoded apart, seen from one control piece to
    the next. marks: what no answer may have in it. needs: control pieces that the tokenizer must have."""

    parts: Callable[[Sequence[Message], bool], Iterator[Part]]
    jinja: str
    cut: str
    marks: tuple[str, ...]
    needs: tuple[str, ...] = ()


JINJA = """\
{{ bos_token }}OPENING{% for message in messages %}{% if message['role'] == 'assistant' %}\
{{ message['content'] + eos_token }}\
{% elif message['role'] == 'system' %}{% if message['content'] | trim %}{{ message['content'] + '\n\n' }}{% endif %}\
{% else %}{{ '### Instruction:\n' + message['content'] }}\
{% if message['input'] %}{{ BEFORE_INPUT + message['input'] }}{% endif %}{{ '\n\n### Response:\n' }}\
{% endif %}{% endfor %}"""
JINJA_OPENING = """\
{% set system = messages[0]['content'] | trim if messages[0]['role'] == 'system' else '' %}\
{% set first = messages[1] if messages[0]['role'] == 'system' else messages[0] %}\
{% if not system %}{{ WITH_INPUT if first['input'] else WITHOUT }}{% endif %}"""
TEMPLATES = {
    "chatml": Template(
        chatml,
        """\
{{ bos_token }}{% for message in messages %}{% if message['role'] != 'system' or message['content'] | trim %}\
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}\
{% if message['input'] %}{{ '\n\n' + message['input'] }}{% endif %}{{ '<|im_end|>\n' }}{% endif %}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
        r"(?<=\Aassistant\n)|(?<=\A assistant\n)",  # transformers has put the space there, for a model that wants one
        (START, END),
        (START, END),
    ),
    "instruct": Template(
        instruct,
        JINJA.replace("OPENING", "").replace("BEFORE_INPUT", repr("\n\n")),
        f"(?<={RESPONSE})",
        ("### Instruction:", "### Response:"),
    ),
    "alpaca": Template(
        alpaca,
        JINJA.replace("OPENING", JINJA_OPENING)
        .replace("WITH_INPUT", repr(OPENING[1]))
        .replace("WITHOUT", repr(OPENING[0]))
        .replace("BEFORE_INPUT", repr("\n\n### Input:\n")),
        f"(?<={RESPONSE})",
        ("### Instruction:", "### Input:", "### Response:"),
    ),
}


def render(
    template: str, messages: Sequence[Message], tokenizer: Tokenizer, ask: bool = False
) -> tuple[list[int], list[bool]]:
    """The ids of a conversation, begun as a document is, and for each whether it is trained.

    ask: up to where the next answer begins. A blank system message counts as none. UserError if the tokenizer lacks a
    control piece.
    """
    form = TEMPLATES[template]
    if lacks := [piece for piece in form.needs if piece not in tokenizer.control]:
        raise UserError(
            f"the tokenizer has no {' and no '.join(lacks)}, which the template {template!r} needs; set template to "
            '"instruct" or "alpaca"'
        )
    said = [message for message in messages if message.role != "system" or message.content.strip()]
    ids, trained = [tokenizer.bos], [False]
    seen = ""  # since the last control piece: as transformers sees it, a text begins there, and there a cut may look to
    for (learnt, control), parts in itertools.groupby(form.parts(said, ask), key=lambda part: part[1:]):
        text = "".join(part.text for part in parts)
        if control:
            new, seen = [tokenizer.control[text] if text else tokenizer.eos], ""
        else:
            start, seen = len(seen), seen + text
            places = [start, *(match.start() for match in re.compile(form.cut).finditer(seen, start)), len(seen)]
            cuts = itertools.pairwise(places)
            new = [i for a, b in cuts for i in tokenizer.encode(seen[a:b], begins=a == 0)]
        ids += new
        trained += [learnt] * len(new)
    return ids, trained


def unseen(base: Path, template: str, tokenizer: Tokenizer, imported: bool) -> dict[str, int] | None:
    """The pieces for `lora.init_end_piece`, if the template has control pieces that the model in `base` has not seen.

    Pretraining shows a model no control piece, fine-tuning shows it those of its template. Nothing is known about what
    an imported model was shown.
    """
    while (taught := checkpoint.template(base)) is not None and END not in TEMPLATES[taught].needs:
        if not checkpoint.adapts(base):
            break
        base = checkpoint.base(base)
    config = checkpoint.read_manifest(base)["config"]
    known = not imported and ("pretrain" in config or "sft" in config)
    seen = taught is not None and END in TEMPLATES[taught].needs
    if END not in TEMPLATES[template].needs or not known or seen:
        return None
    return {"end": tokenizer.control[END], "start": tokenizer.control[START], "eos": tokenizer.eos}


def ends(template: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end an answer."""
    return tokenizer.eos, *(tokenizer.control[piece] for piece in TEMPLATES[template].needs if piece == END)


def marked(template: str, ids: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Whether the ids of an answer have a mark of the template in them, as a control piece or spelt."""
    text = tokenizer.decode(list(ids), begins=False)
    return not set(tokenizer.control.values()).isdisjoint(ids) or any(m in text for m in TEMPLATES[template].marks)


def shown(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text of ids, with the names of control pieces where they stand."""
    names = {i: piece for piece, i in tokenizer.control.items()}
    groups = itertools.groupby(ids, key=names.get)
    return "".join(
        tokenizer.decode(list(group), begins=False) if name is None else name * len(list(group))
        for name, group in groups
    )
