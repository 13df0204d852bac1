"""Templates: each by hand, what is trained of any conversation, and the ids that transformers gives it."""

import hashlib
import itertools
import json
from types import SimpleNamespace

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoint
import convert
import stage
from cli import UserError
from model import ModelConfig, Transformer
from serving.served import Served
from sft import templates
from sft.conversations import Chats, Message
from sft.templates import render, shown
from tests.conftest import MINI
from tests.test_convert import KEPT, command, spm_model
from tokenizer import Tokenizer

WORDS = ("const", "let", "name", "value", "index", "sort", "total", "print", "item", "node")
CODE = [
    f'{w}\n`{v}`\n"{w}"\n({v}) assistant\n`{w}` says\n"{v}"\n(see {w})\n- {v}\n({w} {v}\n({w})'
    for i, w in enumerate(WORDS * 30)
    for v in [WORDS[i * 7 % 10]]
]
CONTROL = ("<|im_start|>", "<|im_end|>", "<|reserved_0|>")
OURS = KEPT | {"add_dummy_prefix": False, "allow_whitespace_only_pieces": True, "unk_id": 0, "eos_id": 1, "bos_id": -1}
KINDS = {
    "bpe": OURS | {"model_type": "bpe", "control_symbols": list(CONTROL)},
    "unigram": OURS | {"model_type": "unigram", "control_symbols": list(CONTROL)},
    "bare": OURS | {"model_type": "bpe"},  # without the control pieces
    "LLaMA's": KEPT | {"model_type": "bpe"},  # a space before every text, and a bos of its own
    "LLaMA's with control": KEPT | {"model_type": "bpe", "control_symbols": list(CONTROL)},
}
FORMS = tuple(templates.TEMPLATES)
ODD = ["  ", "\n\n", "\n`", '\n"', "\n(", "assistant", "assistant\n", "user\n", "### Response:\n", "### Response:"]
ODD += ["### Instruction:\n", "\n\n### Input:\n", "<|im_", "end|>", "<unk>", "<0x0A>"]
FRAGMENTS = st.sampled_from([*" \n\t`\"'(-a1é▁🙂.:", *ODD, *WORDS])
TEXTS = st.text(st.characters(codec="utf-8"), max_size=10) | st.lists(FRAGMENTS, max_size=8).map("".join)
SPELT = TEXTS | st.lists(FRAGMENTS | st.sampled_from([*CONTROL, "</s>", "<s>"]), max_size=8).map("".join)


def conversations(texts: st.SearchStrategy[str]) -> st.SearchStrategy[tuple[Message, ...]]:
    """One to three questions with their answers, after a system message or none, which may be blank."""
    system = st.just(()) | (texts | st.just("") | st.just(" \n")).map(lambda text: (Message("system", text),))
    user = st.builds(Message, st.just("user"), texts, st.just("") | texts)
    turn = st.tuples(user, st.builds(Message, st.just("assistant"), texts, st.just("")))
    turns = st.lists(turn, min_size=1, max_size=3).map(lambda pairs: tuple(itertools.chain(*pairs)))
    return st.builds(lambda a, b: a + b, system, turns)


@pytest.fixture(scope="module")
def spms(text) -> dict[str, Tokenizer]:
    made = {kind: spm_model([*text, *CODE], vocab_size=600, num_threads=1, **o) for kind, o in KINDS.items()}
    return {kind: Tokenizer(model, "") for kind, model in made.items()}


@pytest.fixture(scope="module")
def exported(spms, tmp_path_factory):
    """What transformers opens of a model fine-tuned with a template, as to-hf writes it: (kind, template) -> it."""
    opened, place = {}, tmp_path_factory.mktemp("exported")
    (place / "mini.py").write_text(MINI)
    shape = ModelConfig(vocab_size=600, context_length=4_096, n_layers=1, d_model=8, n_heads=1, d_ff=8)

    def export(kind: str, template: str):
        if (kind, template) not in opened:
            directory = place / f"{kind}-{template}"
            about = {"config": {"model": stage.describe(shape), "template": template}, "counts": {"step": 1}}
            about["read"] = {"tokenizer/spm.model": hashlib.sha256(spms[kind].model).hexdigest()}
            checkpoint.save(directory, {"weights.pt": Transformer(shape).state_dict(), "state.pt": {}}, about)
            convert.write_tokenizer(directory / "tokenizer", spms[kind], "mini")
            command("to-hf", place / "mini.py", place / f"{kind}-{template}-hf", "--checkpoint", directory)
            opened[kind, template] = transformers.AutoTokenizer.from_pretrained(place / f"{kind}-{template}-hf")
        return opened[kind, template]

    return export


def runs(ids: list[int], trained: list[bool]) -> list[tuple[bool, list[int]]]:
    """The ids in stretches, each trained or not."""
    assert len(ids) == len(trained)
    groups = itertools.groupby(zip(ids, trained, strict=True), key=lambda pair: pair[1])
    return [(learnt, [i for i, _ in group]) for learnt, group in groups]


def spelling(template: str, messages, spm: Tokenizer, ask: bool = False) -> list[str]:
    """The conversation as text, in stretches, the second, fourth and so on trained; </s> where one ends a text."""
    found = runs(*render(template, messages, spm, ask))
    assert [learnt for learnt, _ in found] == [bool(i % 2) for i in range(len(found))]
    ends, texts = {spm.eos: "</s>", spm.bos: "</s>" if spm.bos == spm.eos else "<s>"}, []
    for _, ids in found:
        groups = itertools.groupby(ids, key=ends.get)
        texts.append("".join(name * len(list(g)) if name else shown(list(g), spm) for name, g in groups))
    return texts


def test_pieces_reach_over_the_ends_of_lines(spms):
    """Else no test here would notice where a text is cut."""
    for kind, spm in spms.items():
        pieces = set(map(spm.pieces.id_to_piece, range(spm.vocab_size)))
        assert {"\n`", '\n"', "\n("} <= pieces, kind
        for answer in ("`x", '"x', "(x"):
            whole = spm.encode("assistant\n" + answer)
            assert whole != spm.encode("assistant\n") + spm.encode(answer, begins=False)


BE, HI, HELLO = Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "`Hello`")
SUM, CAT, TOM = Message("user", "1 + 1?"), Message("user", "Name it.", "a cat"), Message("assistant", "Tom\n")
TASK = "Below is an instruction that describes a task"
ALONE = f"{TASK}. Write a response that appropriately completes the request.\n\n"
PAIRED = (
    f"{TASK}, paired with an input that provides further context. Write a response that appropriately completes the "
    "request.\n\n"
)
START, END = CONTROL[:2]
QUESTION = "### Instruction:\nHi\n\n### Response:\n"
SUMS = ["`Hello`</s>", "### Instruction:\n1 + 1?\n\n### Response:\n", "Tom\n</s>"]
LINES = "### Instruction:\nName it.\n\n### Input:\na cat\n\n### Response:\n"
SAID = f"{START}system\nBe brief.{END}\n{START}user\nHi{END}\n{START}assistant\n"
ASKED = f"{START}user\n1 + 1?{END}\n{START}assistant\n"
BY_HAND = {
    "chatml": [
        ((HI, HELLO), [f"</s>{START}user\nHi{END}\n{START}assistant\n", f"`Hello`{END}", "\n"]),
        ((BE, HI, HELLO, SUM, TOM), [f"</s>{SAID}", f"`Hello`{END}", f"\n{ASKED}", f"Tom\n{END}", "\n"]),
        ((CAT, TOM), [f"</s>{START}user\nName it.\n\na cat{END}\n{START}assistant\n", f"Tom\n{END}", "\n"]),
    ],
    "instruct": [
        ((HI, HELLO), [f"</s>{QUESTION}", "`Hello`</s>"]),
        ((BE, HI, HELLO, SUM, TOM), [f"</s>Be brief.\n\n{QUESTION}", *SUMS]),
        ((CAT, TOM), ["</s>### Instruction:\nName it.\n\na cat\n\n### Response:\n", "Tom\n</s>"]),
    ],
    "alpaca": [
        ((HI, HELLO), [f"</s>{ALONE}{QUESTION}", "`Hello`</s>"]),
        ((BE, HI, HELLO, SUM, TOM), [f"</s>Be brief.\n\n{QUESTION}", *SUMS]),
        ((CAT, TOM, HI, HELLO), [f"</s>{PAIRED}{LINES}", "Tom\n</s>", QUESTION, "`Hello`</s>"]),
        ((HI, HELLO, CAT, TOM), [f"</s>{ALONE}{QUESTION}", "`Hello`</s>", LINES, "Tom\n</s>"]),
        ((BE, CAT, TOM), [f"</s>Be brief.\n\n{LINES}", "Tom\n</s>"]),
    ],
}
CASES = [(template, *case) for template, cases in BY_HAND.items() for case in cases]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(("template", "messages", "expected"), CASES)
def test_a_conversation_is_spelt_as_by_hand(spms, kind, template, messages, expected):
    assert spelling(template, messages, spms[kind]) == expected
    for blank in ("", " \n"):
        if messages[0] is not BE:
            assert spelling(template, (Message("system", blank), *messages), spms[kind]) == expected


@pytest.mark.parametrize("kind", ["bpe", "unigram", "LLaMA's with control"])
@pytest.mark.parametrize("template", FORMS)
def test_only_answers_are_trained_and_each_is_asked_for_as_it_is_trained(spms, kind, template):
    spm = spms[kind]
    end = spm.control[END] if template == "chatml" else spm.eos

    @settings(max_examples=50, deadline=None, derandomize=True)
    @given(conversations(SPELT))
    def check(messages):
        ids, trained = render(template, messages, spm)
        said = [(at, message.content) for at, message in enumerate(messages) if message.role == "assistant"]
        learnt = [run for is_trained, run in runs(ids, trained) if is_trained]
        assert [spm.decode(run[:-1], begins=False) for run in learnt] == [content for _, content in said]
        assert {run[-1] for run in learnt} == {end}
        # A control piece that a message spells is text: only the template's are in the ids.
        marks = sum(bool(m.role != "system" or m.content.strip()) for m in messages) if template == "chatml" else 0
        expected = {START: marks, END: marks, "<|reserved_0|>": 0}
        assert {piece: ids.count(spm.control[piece]) for piece in expected} == expected
        assert ids.count(spm.eos) == (spm.bos == spm.eos) + (0 if template == "chatml" else len(said))
        firsts = [i for i in range(1, len(ids)) if trained[i] and not trained[i - 1]]
        for first, (at, _) in zip(firsts, said, strict=True):
            assert render(template, messages[:at], spm, ask=True) == (ids[:first], [*trained[: first - 1], False])

    check()


def theirs(hf, messages, **options) -> list[int]:
    keys = ("role", "content", "input")
    given = [{k: v for k, v in zip(keys, message, strict=True) if v or k != "input"} for message in messages]
    return hf.apply_chat_template(given, return_dict=False, **options)


def same(spm: Tokenizer, found: list[int], expected: list[int], exact: bool) -> bool:
    """Of two spellings that are as likely as each other, a float32 and a float64 sum may choose differently."""
    if found == expected or exact:
        return found == expected
    scores = [sum(map(spm.pieces.get_score, ids)) for ids in (found, expected)]
    return shown(found, spm) == shown(expected, spm) and scores[0] == pytest.approx(scores[1], rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "template"),
    [
        *itertools.product(("bpe", "unigram", "LLaMA's with control"), FORMS),
        *itertools.product(("bare", "LLaMA's"), ("instruct", "alpaca")),
    ],
)
def test_transformers_gives_a_conversation_the_same_ids(spms, exported, kind, template):
    spm, hf = spms[kind], exported(kind, template)
    exact = kind != "unigram"

    def agree(messages):
        assert same(spm, theirs(hf, messages), render(template, messages, spm)[0], exact)
        for at, message in enumerate(messages):
            if message.role == "assistant":
                asked = render(template, messages[:at], spm, ask=True)[0]
                assert same(spm, theirs(hf, messages[:at], add_generation_prompt=True), asked, exact)

    for beginning in ("`", '"', "(", "\n", "\n\n", " ", "-", "▁", "🙂", "### Response:\n`", "assistant\n`"):
        agree((CAT, Message("assistant", f"{beginning}x"), HI, Message("assistant", beginning)))
    settings(max_examples=25, deadline=None, derandomize=True)(given(conversations(TEXTS))(agree))()
    stop = transformers.GenerationConfig.from_pretrained(hf.name_or_path).eos_token_id
    assert (stop if isinstance(stop, list) else [stop]) == list(templates.ends(template, spm))


RECORDS = {
    "alpaca": {"instruction": "Name it.", "input": "a cat", "output": "Tom"},
    "no instruction": {"instruction": " ", "input": "What is it?", "output": "A cat."},
    "history": {"system": "Be brief.", "history": [["Hi", "`Hello`"]], "instruction": "Go", "output": "Gone"},
    "prompt": {"prompt": "def f(a):\n", "completion": "    return a\n"},
    "sharegpt": {"conversations": [{"from": "human", "value": " Hi\r\n"}, {"from": "gpt", "value": "\nHello"}]},
}


@pytest.mark.parametrize("template", FORMS)
@pytest.mark.parametrize("layout", RECORDS)
def test_a_question_is_asked_as_it_is_trained(spms, tmp_path, layout, template):
    """What the server asks with is the beginning of what is trained, for every layout and template."""
    (tmp_path / "a.json").write_text(json.dumps(RECORDS[layout]))
    (conversation,) = Chats(paths=(str(tmp_path / "a.json"),)).conversations(1)
    ids, trained = render(template, conversation.messages, spms["bpe"])
    model = SimpleNamespace(config=SimpleNamespace(context_length=10_000))
    served = Served("mini", tmp_path, model, spms["bpe"], template)
    for number, message in enumerate(conversation.messages):
        if message.role == "assistant":
            asked = served.conversation(conversation.messages[:number])
            assert ids[: len(asked)] == asked
            assert not trained[len(asked) - 1]
            assert trained[len(asked)]
    if layout == "no instruction":
        assert served.prompt("What is it?") == asked


def test_chatml_needs_its_control_pieces_and_the_others_none(spms):
    spm = spms["bare"]
    assert not spm.control
    with pytest.raises(UserError, match=r"no <\|im_start\|> and no <\|im_end\|>, which the template 'chatml' needs"):
        render("chatml", (HI, HELLO), spm)
    for template in ("instruct", "alpaca"):
        for messages, expected in BY_HAND[template]:
            assert spelling(template, messages, spm) == expected


MARKED = {
    "": (),
    "Input: 1\n# Response\n<|im|>": (),
    "a<|im_end|>": ("chatml",),
    "<|im_start|>user\nHi": ("chatml",),
    "x\n\n### Instruction:\nHi": ("instruct", "alpaca"),
    "### Response:": ("instruct", "alpaca"),
    "\n### Input:\n": ("alpaca",),
    "</s>": (),
}


@pytest.mark.parametrize("answer", MARKED)
def test_marks_that_an_answer_spells(spms, answer):
    for spm in (spms["bpe"], spms["unigram"], spms["LLaMA's with control"]):
        ids = spm.encode(answer, begins=False)
        assert tuple(form for form in FORMS if templates.marked(form, ids, spm)) == MARKED[answer]


def test_shown_names_the_control_pieces(spms):
    spm = spms["bpe"]
    ids = [spm.control[START], spm.control[START], *spm.encode("a 🙂▁<|im_end|>"), spm.control[END], spm.eos]
    assert shown(ids, spm) == "<|im_start|><|im_start|>a 🙂▁<|im_end|><|im_end|>"
    assert shown([], spm) == ""
