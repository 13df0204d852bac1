"""Pairs as ids: what the files hold, how pairs are cut, how they are counted and split, how they are read back.

What preference data share with conversations is tested in tests/sft/test_data.py.
"""

import itertools
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import configs
import dpo.data
import sft.data
import stage
from cli import UserError
from configs import Experiment
from data.holdout import held_out
from data.sources import PythonDocs
from dpo.data import PairConfig, PairRows, encode, fitted, rendered
from dpo.filters import PairFilters, PairJudge
from dpo.pairs import DocPairs, Pair, Pairs
from sft.conversations import Chats, DocQuestions, Message
from sft.templates import TEMPLATES, render
from tests.conftest import WORDS, Place, build, write_lines
from tests.sft.test_data import question, spoken  # noqa: F401 - a fixture

ANY = PairFilters(language=None)
PAIRS = [
    {"prompt": f"Say {a} {b}.", "chosen": f"{a} {b}", "rejected": f"{b} {b}"} for a in WORDS[4:] for b in WORDS[:4]
]
FILES = Pairs(paths=("pairs.jsonl",))


@pytest.fixture
def here(spoken: Place, tmp_path: Path, monkeypatch) -> Place:  # noqa: F811 - the imported fixture
    """A directory with tokenizer and pairs."""
    shutil.copytree(spoken.path, tmp_path, dirs_exist_ok=True)
    place = Place(tmp_path)
    write_lines(place.raw / "pairs.jsonl", PAIRS)
    monkeypatch.setenv("DATA", str(place.raw))
    monkeypatch.setenv("RUNS", str(place.runs))
    return place


@pytest.fixture(scope="session")
def spm(spoken: Place):  # noqa: F811
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNS", str(spoken.runs))
        return configs.load(spoken.config).load_tokenizer()


def described(place: Place, context: int = 64, template: str = "chatml", **changes) -> Experiment:
    """The experiment with another PairConfig."""
    experiment = configs.load(place.config)
    return replace(
        experiment,
        model=replace(experiment.model, context_length=context),
        sft=replace(experiment.sft, data=replace(experiment.sft.data, template=template)),
        dpo=replace(experiment.dpo, data=PairConfig(**{"sources": (FILES,), "val_fraction": 0.2} | changes)),
    )


def made(place: Place, *records: dict, **changes) -> tuple[Path, dict]:
    """The directory made of records, and its counts."""
    if records:
        write_lines(place.raw / "pairs.jsonl", records)
    directory = build("dpo_data", described(place, **changes), force=True)
    return directory, json.loads((directory / "manifest.json").read_text())["counts"]


def record(asked: str, chosen: str, rejected: str) -> dict:
    return {"prompt": asked, "chosen": chosen, "rejected": rejected}


HELD = record(question("val"), "Held out.", "Out.")  # so that the split is not empty


def stored(directory: Path, split: str) -> tuple[list[list[list[int]]], list[list[int]]]:
    """The three parts of each pair of a split, and its kind and prompt, read as the documentation says."""
    tokens = np.fromfile(directory / f"{split}.bin", "<u2").tolist()
    index = np.fromfile(directory / f"{split}.idx", "<i8").reshape(-1, 6).tolist()
    assert [row[0] for row in index] == [0, *(row[3] for row in index)][:-1]
    assert index[-1][3] == len(tokens)
    return [[tokens[a:b] for a, b in itertools.pairwise(row[:4])] for row in index], [row[4:] for row in index]


def whole(spm, template: str, prompt: list[Message], answer: str) -> list[int]:
    """The ids of a conversation up to its last trained id."""
    ids, trained = render(template, [*prompt, Message("assistant", answer)], spm)
    return ids[: max(i for i, yes in enumerate(trained) if yes) + 1]


# ------------------------------------------------------------------------------------------------------------ rendering

TEXT = st.text(max_size=12) | st.sampled_from(["### Response:\n", "<|im_end|>", "</s>", "\n", " a", "assistant\n"])
ASKED = TEXT.filter(str.strip)


def talk(system: str, exchanges: list[tuple[str, str]], asked: str) -> list[Message]:
    messages = [Message("system", system)] if system.strip() else []
    for first, second in exchanges:
        messages += [Message("user", first), Message("assistant", second)]
    return [*messages, Message("user", asked)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.builds(talk, TEXT, st.lists(st.tuples(ASKED, TEXT), max_size=2), ASKED), TEXT, st.sampled_from([*TEMPLATES]))
def test_prompt_and_answer_are_the_conversation_up_to_its_last_trained_id(spm, prompt, answer, template):
    asked, *answers = rendered(Pair("x", tuple(prompt), answer, "no", ("k",)), template, spm)
    for ids, text in zip(answers, (answer, "no"), strict=True):
        assert asked + ids == whole(spm, template, prompt, text)
    assert asked == render(template, prompt, spm, ask=True)[0]


def lengths_of(prompt: int, chosen: int, rejected: int) -> list[list[int]]:
    """A pair of so many ids, all different."""
    ids = list(range(prompt + chosen + rejected))
    return [ids[:prompt], ids[prompt : prompt + chosen], ids[prompt + chosen :]]


@pytest.mark.parametrize(
    ("context", "lengths", "expected"),
    [
        (10, (6, 5, 3), ([*range(6)], 5, 3)),  # five ids are read after the prompt, but for the last
        (10, (7, 5, 3), ([0, 2, 3, 4, 5, 6], 5, 3)),  # the first id and the end of the prompt
        (10, (30, 3, 5), ([0, *range(25, 30)], 3, 5)),
        (10, (30, 7, 1), ([0, 26, 27, 28, 29], 6, 1)),  # the prompt keeps half of the context, the answers are cut
        (10, (30, 20, 20), ([0, 26, 27, 28, 29], 6, 6)),
        (10, (4, 20, 2), ([0, 1, 2, 3], 7, 2)),  # a shorter prompt stays whole
        (2, (9, 4, 4), ([0, 8], 1, 1)),
    ],
)
def test_cut_by_hand(context, lengths, expected):
    parts = lengths_of(*lengths)
    prompt, chosen, rejected = expected
    assert fitted(parts, context) == [prompt, parts[1][:chosen], parts[2][:rejected]]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(2, 40), st.integers(2, 90), st.integers(1, 90), st.integers(1, 90))
def test_a_cut_pair_fits_and_is_cut_no_more_than_it_must(context, prompt, chosen, rejected):
    parts = lengths_of(prompt, chosen, rejected)
    asked, *answers = fitted(parts, context)
    size = len(asked) + max(map(len, answers)) - 1
    assert size == min(context, prompt + max(chosen, rejected) - 1)
    assert asked == [0, *parts[0][prompt - len(asked) + 1 :]]
    assert len(asked) >= min(prompt, max(2, context // 2))
    for new, old in zip(answers, parts[1:], strict=True):
        assert new == old[: len(new)]
        assert len(new) in (len(old), context + 1 - len(asked))
    if answers != parts[1:]:
        assert len(asked) == min(prompt, max(2, context // 2))


# ---------------------------------------------------------------------------------------------------------- the stage


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_files_hold_what_the_template_gives(here: Place, spm, template):
    directory, counts = made(here, template=template, context=200)
    assert counts["dtype"] == "<u2"
    for split in ("train", "val"):
        numbers = [i for i, each in enumerate(PAIRS) if held_out(each["prompt"].encode(), 0.2) is (split == "val")]
        parts, labels = stored(directory, split)
        for i, (prompt, *answers) in zip(numbers, parts, strict=True):
            asked = [Message("user", PAIRS[i]["prompt"])]
            assert prompt == render(template, asked, spm, ask=True)[0]
            assert prompt + answers[0] == whole(spm, template, asked, PAIRS[i]["chosen"])
            assert prompt + answers[1] == whole(spm, template, asked, PAIRS[i]["rejected"])
        assert labels == [[0, n] for n in range(len(numbers))]
        lines = (directory / f"{split}.txt").read_text().splitlines()
        assert lines == [f"pairs.jsonl:{i + 1}" for i in numbers]
        lengths = [sum(map(len, pair)) for pair in parts]
        assert counts[split] == {
            "pairs": len(numbers),
            "prompts": len(numbers),
            "tokens": sum(lengths),
            "longest": max(lengths),
            "sources": {"pairs": {"pair": 0, "pairs": len(numbers)}},
            "kinds": {"pairs": len(numbers)},
        }


def test_pairs_longer_than_the_context_are_cut_or_dropped(here: Place, spm):
    asked, many = question("train"), " ".join(f"{n} and" for n in range(60))
    fits = len(whole(spm, "chatml", [Message("user", asked)], "one two three four")) - 1
    records = [record(asked, "one", "one two three four"), record(question("train", 1), "a", "b"), HELD]
    alike = record(question("train", 2), f"{many} a", f"{many} b")
    for context, too_long, kept, cut, dropped in (
        (fits, "drop", 3, 0, {"longer_than_context": 1}),
        (fits - 1, "drop", 2, 0, {"longer_than_context": 2}),
        (fits - 1, "cut", 3, 1, {"identical_when_cut": 1}),
        (1_000, "cut", 4, 0, {}),
    ):
        _, counts = made(here, *records, alike, context=context, too_long=too_long, filters=ANY)
        source = counts["sources"]["pairs"]
        assert (source["kept"], source["cut"], source["dropped"]) == (kept, cut, dropped)


def test_kept_and_dropped_are_counted_by_rule_and_by_source(here: Place):
    first = PAIRS[0]
    records = [*PAIRS[:20], first, record(first["prompt"], first["rejected"], first["chosen"])]
    records += [record("Say so.", "so", "so"), record("Say nothing.", "", "a"), record("Say it long.", "x" * 200, "y")]
    other = [first, record("Say other.", "other", "none"), {"prompt": "Hi"}, {"a": 1}, *PAIRS[20:]]
    write_lines(here.raw / "other.jsonl", other)
    sources = (FILES, Pairs(name="other", paths=("other.jsonl",), unreadable="skip", max_pairs=4))
    _, counts = made(here, *records, sources=sources, filters=PairFilters(max_chars=100), context=300)
    dropped = {"contradiction": 1, "duplicate": 1, "empty_answer": 1, "identical": 1, "too_long": 1}
    own, others = counts["sources"]["pairs"], counts["sources"]["other"]
    assert (own["read"], own["kept"], own["cut"], own["dropped"]) == (25, 20, 0, dropped)
    assert (others["read"], others["kept"], others["dropped"]) == (7, 4, {"duplicate": 1, "unreadable": 2})
    assert own["tokens"] + others["tokens"] == counts["train"]["tokens"] + counts["val"]["tokens"]


class Listed(Pairs):
    """Pairs that are given to it."""

    def __init__(self, *pairs):
        super().__init__(name="listed", paths=("none",))
        object.__setattr__(self, "given", pairs)

    def pairs(self, workers):
        yield from self.given


def gathered(config: PairConfig, spm, context: int = 64) -> tuple[dict, dict]:
    return sft.data.gather(config, partial(encode, config, "chatml", spm, context), PairJudge(config.filters), 1)


def test_a_pair_that_belongs_to_both_splits_is_dropped(spm):
    val, train = question("val"), question("train")
    prompt, keys = (Message("user", "Hi"),), [(val, train), (train, val), (val, val), (train,)]
    pairs = [Pair(f"{i}", prompt, f"a{i}", "b", each) for i, each in enumerate(keys)]
    splits, counts = gathered(PairConfig(sources=(Listed(*pairs),), val_fraction=0.2), spm)
    assert {name: [item.id for item in items] for name, items in splits.items()} == {"train": ["3"], "val": ["2"]}
    assert counts["listed"]["dropped"] == {"of_both_splits": 2}


@pytest.mark.parametrize("split", ["train", "val"])
def test_few_prompts_on_one_side_are_divided_by_their_hashes(here: Place, split):
    """All pairs of a prompt stay together."""
    records = [record(question(split, i), f"Answer {i} {n}.", "No.") for i in range(3) for n in range(2)]
    _, counts = made(here, *records)
    assert (counts["train"]["prompts"], counts["val"]["prompts"]) == ((2, 1) if split == "train" else (1, 2))
    assert counts["train"]["pairs"] + counts["val"]["pairs"] == 6


def test_pairs_of_one_prompt_are_divided_and_a_single_pair_is_one_clear_error(here: Place):
    _, counts = made(here, *(record("Hi", f"Answer {word}.", "No.") for word in WORDS))
    assert counts["train"]["pairs"] + counts["val"]["pairs"] == len(WORDS)
    with pytest.raises(UserError, match=r"^1 pairs passed the filters; training and validation take at least one"):
        made(here, PAIRS[0], PAIRS[0])


def test_documentation_is_held_out_as_its_questions_are(spm):
    docs = PythonDocs(packages=())
    config = PairConfig(sources=(DocPairs(docs=docs, max_documents=200),), val_fraction=0.1)
    splits, counts = gathered(config, spm, 1_000)
    questions = list(DocQuestions(docs=docs, max_documents=200).conversations(1))
    held = {each.id: held_out(each.keys[0].encode(), 0.1) for each in questions}
    side = {each.answers[0]: held[each.id] for each in questions}
    assert counts["python_pairs"]["dropped"] == {"of_both_splits": 2}
    assert sum(held.values()) > 9
    for split, items in splits.items():
        expected = sum(in_val is (split == "val") for in_val in held.values())
        for kind, count in (("shuffled", expected), ("repeated", expected), ("another", expected - 1)):
            assert sum(item.kind == kind for item in items) == count
        for item in items:
            assert held[item.id.rsplit(" ", 1)[0]] is (split == "val")
            if item.kind == "another":  # no answer of one side is an answer on the other
                rejected = item.ids[-item.parts[2] : -1].tolist()
                assert side[spm.decode(rejected, begins=False)] is (split == "val")


def test_the_command_makes_it_once_with_the_same_bytes(here: Place):
    sources = (FILES, DocPairs(docs=PythonDocs(packages=()), max_documents=20))
    directory, _ = made(here, sources=sources)
    written = {path.name: path.read_bytes() for path in directory.iterdir() if path.name not in (".lock", "log.txt")}
    names = {f"{split}.{end}" for split in ("train", "val") for end in ("bin", "idx", "txt")}
    assert set(written) == {"manifest.json"} | names
    shutil.rmtree(directory)
    for _ in range(2):
        build("dpo_data", described(here, sources=sources), workers=3)
        assert written == {name: (directory / name).read_bytes() for name in written}


def test_another_config_and_other_pairs_are_refused(here: Place):
    """Without its raw files a finished directory stands."""
    directory, counts = made(here)
    with pytest.raises(UserError, match=r'template was "chatml", is now "instruct".*--force-from dpo_data'):
        build("dpo_data", described(here, template="instruct"))
    write_lines(here.raw / "pairs.jsonl", PAIRS[1:])
    with pytest.raises(UserError, match=r"was made from something else: .*pairs\.jsonl was"):
        build("dpo_data", described(here))
    (here.raw / "pairs.jsonl").unlink()
    assert build("dpo_data", described(here)) == directory
    assert dpo.data.load(directory, stage.read_manifest(directory)["read"]["mini/tokenizer/spm.model"]) == counts


# -------------------------------------------------------------------------------------------------------- read back


@pytest.mark.parametrize(("source", "numbers"), [("", range(14)), ("pairs", range(12)), ("more", range(12, 14))])
def test_rows_are_read_as_the_files_have_them(here: Place, source, numbers):
    """Two sources of several kinds, and prompts that have several pairs."""
    asked = [question("train", n) for n in range(4)]
    write_lines(here.raw / "more.jsonl", [record(each, "good", "bad") for each in asked[2:]])
    records = [record(each, f"a{n}", "b") for n in range(3) for each in asked]
    directory, counts = made(here, *records, HELD, sources=(FILES, Pairs(name="more", paths=("more.jsonl",))))
    assert counts["train"]["sources"] == {"pairs": {"pair": 0, "pairs": 12}, "more": {"pair": 12, "pairs": 2}}
    assert (counts["train"]["kinds"], counts["train"]["prompts"]) == ({"pairs": 12, "more": 2}, 4)
    parts, labels = stored(directory, "train")
    assert labels == [[0, n] for _ in range(3) for n in range(4)] + [[1, 2], [1, 3]]
    rows = PairRows(directory, "train", counts, source=source)
    assert (rows.count, rows.width) == (len(numbers), max(sum(map(len, pair)) for pair in parts))
    assert rows.names == ["pairs", "more"]
    assert np.stack([rows.kinds, rows.prompts], axis=1).tolist() == labels
    order = [*reversed(range(rows.count)), 0]
    ids, bounds, which = rows.read(order)
    assert {t.dtype for t in (ids, bounds, which)} == {torch.int64}
    for i, row in enumerate(order):
        prompt, chosen, rejected = parts[numbers[row]]
        pair = prompt + chosen + rejected
        assert ids[i].tolist() == pair + [0] * (rows.width - len(pair))
        assert bounds[i].tolist() == [len(prompt), len(prompt + chosen), len(pair)]
        assert which[i].item() == numbers[row]
        assert rows.documents(row) == range(numbers[row], numbers[row] + 1)
    columns = zip(*rows.batches(5), strict=True)
    for column, everything in zip(columns, rows.read(range(rows.count)), strict=True):
        assert torch.equal(torch.cat(column), everything)


@pytest.mark.parametrize(
    ("error", "changes", "message"),
    [
        (ValueError, {"sources": ()}, "sources are called nothing"),
        (ValueError, {"sources": (Chats(paths=("a",)),)}, "sources has chats, which does not give pairs"),
        (ValueError, {"sources": (replace(FILES, format="alpaca"),)}, "sources has pairs with format 'alpaca'"),
        (TypeError, {"filters": None}, "filters is "),
    ],
)
def test_impossible_settings_are_refused(error, changes, message):
    with pytest.raises(error, match=message):
        PairConfig(**changes)
