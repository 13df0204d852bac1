"""Templates: how a conversation becomes ids, and which ids are trained."""

#     chatml    <|im_start|>user↵Hi<|im_end|>↵<|im_start|>assistant↵Hello!<|im_end|>↵
#                                                                   ^^^^^^^^^^^^^^^^ trained
#
# Only `render` makes ids and mask, so training, evaluation and serving agree on every id. The exported tokenizer uses
# the Jinja templates below: change a template and its Jinja text together (tests compare their ids).

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
OPENING = (  # Stanford Alpaca's first lines, for an instruction without an input and with one
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n",
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n",
)


class Part(NamedTuple):
    """Text of a conversation or, with `control`, the name of a control piece. The name "" means eos."""

    text: str
    trained: bool = False
    control: bool = False


def chatml(messages: Sequence[Message], ask: bool) -> Iterator[Part]:
    # Control pieces mark every turn. No text is ever encoded to them, so a user cannot fake the end of a turn.
    for message in messages:
        answer = message.role == "assistant"
        yield Part(START, control=True)
        if answer:
            yield Part("assistant\n")
            yield Part(message.content, trained=True)
        else:
            yield Part(f"{message.role}\n{message.text()}")
        # Train the end of an answer too: a model that never learns END never stops. The "\n" after it is not
        # trained, because generation stops before it.
        yield Part(END, trained=answer, control=True)
        yield Part("\n")
    if ask:
        yield Part(START, control=True)
        yield Part("assistant\n")


def instruct(messages: Sequence[Message], ask: bool, before_input: str = "\n\n") -> Iterator[Part]:
    # The headings are plain text and need no control pieces. A question ends in RESPONSE, so `ask` adds nothing.
    for message in messages:
        if message.role == "assistant":
            yield Part(message.content, trained=True)
            yield Part("", trained=True, control=True)  # eos ends an answer
        elif message.role == "system":
            yield Part(f"{message.content}\n\n")
        else:
            yield Part(f"### Instruction:\n{message.text(before_input)}\n\n{RESPONSE}")


def alpaca(messages: Sequence[Message], ask: bool) -> Iterator[Part]:
    if messages[0].role != "system":  # a system message replaces the opening lines
        yield Part(OPENING[bool(messages[0].input)])
    yield from instruct(messages, ask, "\n\n### Input:\n")


@dataclass(frozen=True)
class Template:
    """A way to write conversations. Add your own to TEMPLATES; a new end piece also to `ends` and `unseen`."""

    # parts(messages, ask): the parts in order. ask: end where the assistant's next answer begins.
    parts: Callable[[Sequence[Message], bool], Iterator[Part]]
    jinja: str  # the same parts in Jinja, for the `transformers` library
    cut: str  # regular expression: a new token must begin at each match
    marks: tuple[str, ...]  # strings that an answer should not contain
    needs: tuple[str, ...] = ()  # control pieces that the tokenizer must have


CHATML_JINJA = """\
{{ bos_token }}{% for message in messages %}{% if message['role'] != 'system' or message['content'] | trim %}\
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}\
{% if message['input'] %}{{ '\n\n' + message['input'] }}{% endif %}{{ '<|im_end|>\n' }}{% endif %}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
ALPACA_JINJA = """\
{% set system = messages[0]['content'] | trim if messages[0]['role'] == 'system' else '' %}\
{% set first = messages[1] if messages[0]['role'] == 'system' else messages[0] %}\
{% if not system %}{{ WITH_INPUT if first['input'] else WITHOUT }}{% endif %}"""
ALPACA_JINJA = ALPACA_JINJA.replace("WITH_INPUT", repr(OPENING[1])).replace("WITHOUT", repr(OPENING[0]))


def instruct_jinja(opening: str, before_input: str) -> str:
    """The Jinja template of `instruct` and `alpaca`."""
    text = """\
{{ bos_token }}OPENING{% for message in messages %}{% if message['role'] == 'assistant' %}\
{{ message['content'] + eos_token }}\
{% elif message['role'] == 'system' %}{% if message['content'] | trim %}{{ message['content'] + '\n\n' }}{% endif %}\
{% else %}{{ '### Instruction:\n' + message['content'] }}\
{% if message['input'] %}{{ BEFORE_INPUT + message['input'] }}{% endif %}{{ '\n\n### Response:\n' }}\
{% endif %}{% endfor %}"""
    return text.replace("OPENING", opening).replace("BEFORE_INPUT", repr(before_input))


# Why cut? A piece may span the end of a line: "\nHello" can be one piece. In transformers, which knows
# no mask, it could join prompt and answer in training, but not when the model is asked. The cut makes the ids equal.
TEMPLATES = {
    "chatml": Template(
        chatml,
        CHATML_JINJA,
        r"(?<=\Aassistant\n)|(?<=\A assistant\n)",  # transformers adds the space for some tokenizers
        (START, END),
        (START, END),
    ),
    "instruct": Template(
        instruct,
        instruct_jinja("", "\n\n"),
        f"(?<={RESPONSE})",
        ("### Instruction:", "### Response:"),
    ),
    "alpaca": Template(
        alpaca,
        instruct_jinja(ALPACA_JINJA, "\n\n### Input:\n"),
        f"(?<={RESPONSE})",
        ("### Instruction:", "### Input:", "### Response:"),
    ),
}


IMPORTED = "imported"  # the template that an imported tokenizer brings


def render(
    template: str, messages: Sequence[Message], tokenizer: Tokenizer, ask: bool = False
) -> tuple[list[int], list[bool]]:
    """The ids of a conversation, bos first, and for each id True if it is trained. ask: end where an answer begins."""
    # Chat programs send an empty system message when the user sets none: treat it as none.
    messages = [message for message in messages if message.role != "system" or message.content.strip()]
    if template == IMPORTED:
        return tokenizer.render([{"role": message.role, "content": message.text()} for message in messages], ask)
    form = TEMPLATES[template]
    missing = [piece for piece in form.needs if piece not in tokenizer.control]
    if missing:
        raise UserError(
            f"the tokenizer has no {' and no '.join(missing)}, which the template {template!r} needs; set template to "
            '"instruct", which needs none'
        )
    # Start like a document: our tokenizers' bos is eos, which stands before the next document in the corpus.
    ids, trained = [tokenizer.bos], [False]
    text = ""  # since the last control piece, where transformers starts a new text; `cut` looks back that far
    # Encode neighbours with the same mask together, as transformers does: a piece may span two parts.
    for (learnt, control), parts in itertools.groupby(form.parts(messages, ask), key=lambda part: part[1:]):
        new = "".join(part.text for part in parts)
        if control:
            new_ids = [tokenizer.control[new] if new else tokenizer.eos]
            text = ""
        else:
            # `begins`: some tokenizers add a space at the beginning of a text, and only there.
            start = len(text)
            text += new
            cuts = [match.start() for match in re.compile(form.cut).finditer(text, start)]
            new_ids = []
            for first, last in itertools.pairwise([start, *cuts, len(text)]):
                new_ids += tokenizer.encode(text[first:last], begins=first == 0)
        ids += new_ids
        trained += [learnt] * len(new_ids)
    return ids, trained


def unseen(base: Path, template: str, tokenizer: Tokenizer, imported: bool) -> dict[str, int] | None:
    """The ids for `lora.init_end_piece`; None if the template has no control pieces, or `base` may know them."""
    # Pretraining shows a model no control pieces. Fine-tuning shows it the control pieces of its template.
    if imported or END not in TEMPLATES[template].needs:  # what an imported model has seen is not known
        return None
    taught = checkpoint.template(base)
    # An adapter for a template without control pieces has seen none, but its base may have seen some.
    while taught is not None and END not in TEMPLATES[taught].needs and checkpoint.adapts(base):
        base = checkpoint.base(base)
        taught = checkpoint.template(base)
    config = checkpoint.read_manifest(base)["config"]
    seen = taught is not None and END in TEMPLATES[taught].needs
    if seen or not ("pretrain" in config or "sft" in config):
        return None
    return {"end": tokenizer.control[END], "start": tokenizer.control[START], "eos": tokenizer.eos}


def ends(template: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end an answer."""
    if template == IMPORTED:
        return tokenizer.ends
    # eos ends answers in every template: a chatml model may still end a text as in pretraining.
    return (tokenizer.eos, tokenizer.control[END]) if END in TEMPLATES[template].needs else (tokenizer.eos,)


def marked(template: str, ids: Sequence[int], tokenizer: Tokenizer) -> bool:
    """True if an answer contains a control piece, or a mark of the template as text."""
    # A model that writes "### Instruction:" plays the user's part too. Evaluation counts such answers.
    if not set(tokenizer.control.values()).isdisjoint(ids):
        return True
    text = tokenizer.decode(list(ids), begins=False)
    return template != IMPORTED and any(mark in text for mark in TEMPLATES[template].marks)


def shown(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text of ids, with control pieces by their names. `decode` alone would leave them out."""
    names = {i: piece for piece, i in tokenizer.control.items()}
    text = ""
    for name, group in itertools.groupby(ids, key=names.get):
        group = list(group)
        text += tokenizer.decode(group, begins=False) if name is None else name * len(group)
    return text
