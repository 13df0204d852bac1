"""Pairs as ids: what the files hold, how pairs are cut, how they are counted and split, how they are read back.

What preference data share with conversations is tested in tests/sft/test_data.py.
"""

import itertools
import shutil
from collections import Counter
from dataclasses import replace
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
from dpo.data import PairConfig, PairRows, fitted, rendered
from dpo.filters import PairFilters
from dpo.pairs import Pair, Pairs
from sft.conversations import Chats, Message
from sft.data import Item
from sft.templates import TEMPLATES, render
from tests.conftest import WORDS, Place, build, write_lines
from tests.sft.test_data import here, in_val, question, spoken  # noqa: F401 - two fixtures

ANY = PairFilters(language=None)
PAIRS = [
    {"prompt": f"Say {a} {b}.", "chosen": f"{a} {b}", "rejected": f"{b} {b}"} for a in WORDS[4:] for b in WORDS[:4]
]
FILES = Pairs(paths=("pairs.jsonl",))


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
    write_lines(place.raw / "pairs.jsonl", records or PAIRS)
    directory = build("dpo_data", described(place, **changes), force=True)
    return directory, stage.read_manifest(directory)["counts"]


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


TEXT = st.text(max_size=12) | st.sampled_from(["### Response:\n", "<|im_end|>", "</s>", "\n", " a", "assistant\n"])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(TEXT, TEXT.filter(str.strip), TEXT, st.sampled_from([*TEMPLATES]))
def test_prompt_and_answer_are_the_conversation_up_to_its_last_trained_id(spm, said, asked, answer, template):
    prompt = (Message("system", "S"), Message("user", "Hi"), Message("assistant", said), Message("user", asked))
    begin, *answers = rendered(Pair("x", prompt, answer, "no", ("k",)), template, spm)
    assert begin == render(template, prompt, spm, ask=True)[0]
    for ids, text in zip(answers, (answer, "no"), strict=True):
        assert begin + ids == whole(spm, template, prompt, text)


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
        (10, (4, 20, 2), ([0, 1, 2, 3], 7, 2)),  # a shorter prompt stays whole
        (2, (9, 4, 4), ([0, 8], 1, 1)),
    ],
)
def test_cut_by_hand(context, lengths, expected):
    parts = lengths_of(*lengths)
    prompt, chosen, rejected = expected
    assert fitted(parts, context) == [prompt, parts[1][:chosen], parts[2][:rejected]]


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_files_hold_what_the_template_gives(here: Place, spm, template):  # noqa: F811
    directory, counts = made(here, template=template, context=200)
    assert counts["dtype"] == "<u2"
    for split in ("train", "val"):
        numbers = [i for i, pair in enumerate(PAIRS) if in_val(pair["prompt"]) is (split == "val")]
        parts, labels = stored(directory, split)
        for i, (prompt, *answers) in zip(numbers, parts, strict=True):
            asked = [Message("user", PAIRS[i]["prompt"])]
            assert prompt == render(template, asked, spm, ask=True)[0]
            assert prompt + answers[0] == whole(spm, template, asked, PAIRS[i]["chosen"])
            assert prompt + answers[1] == whole(spm, template, asked, PAIRS[i]["rejected"])
        assert labels == [[0, n] for n in range(len(numbers))]
        lines = (directory / f"{split}.txt").read_text().splitlines()
        assert lines == [f"pairs.jsonl:{i + 1}" for i in numbers]
        lengths, count = [sum(map(len, pair)) for pair in parts], len(numbers)
        expected = {"pairs": count, "prompts": count, "tokens": sum(lengths), "longest": max(lengths)}
        expected |= {"sources": {"pairs": {"pair": 0, "pairs": count}}, "kinds": {"pairs": count}}
        assert counts[split] == expected


def test_pairs_longer_than_the_context_are_cut_or_dropped(here: Place, spm):  # noqa: F811
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


def test_kept_and_dropped_are_counted_by_rule_and_by_source(here: Place):  # noqa: F811
    first = PAIRS[0]
    records = [*PAIRS[:20], first, record(first["prompt"], first["rejected"], first["chosen"])]
    records += [record("Say so.", "so", "so"), record("Say nothing.", "", "a")]
    write_lines(here.raw / "other.jsonl", [first, {"prompt": "Hi"}, *PAIRS[20:]])
    sources = (FILES, Pairs(name="other", paths=("other.jsonl",), unreadable="skip", max_pairs=4))
    _, counts = made(here, *records, sources=sources, context=300)
    dropped = {"contradiction": 1, "duplicate": 1, "empty_answer": 1, "identical": 1}
    own, others = counts["sources"]["pairs"], counts["sources"]["other"]
    assert (own["read"], own["kept"], own["cut"], own["dropped"]) == (24, 20, 0, dropped)
    assert (others["read"], others["kept"], others["dropped"]) == (6, 4, {"duplicate": 1, "unreadable": 1})
    assert own["tokens"] + others["tokens"] == counts["train"]["tokens"] + counts["val"]["tokens"]


def test_a_pair_that_belongs_to_both_splits_is_dropped():
    items, low, high = [], 0, 2**64 - 1
    for hashes in ([low, high, 1], [high, low, 1], [low, low, 1], [high, 1]):  # the last is of the whole pair
        items.append(Item("x", f"{hashes}", "x", hashes, np.zeros(9), np.zeros(3), False))
    counts = {"x": Counter(dropped=Counter())}
    assert sft.data.split(items, counts, 0.2) == {"train": items[3:], "val": items[2:3]}
    assert counts == {"x": {"kept": 2, "cut": 0, "tokens": 18, "dropped": {"of_both_splits": 2}}}


def test_the_same_bytes_are_made_again_and_another_template_is_refused(here: Place):  # noqa: F811
    directory, counts = made(here)
    written = {path.name: path.read_bytes() for path in directory.iterdir() if path.name not in (".lock", "log.txt")}
    names = {f"{split}.{end}" for split in ("train", "val") for end in ("bin", "idx", "txt")}
    assert set(written) == {"manifest.json"} | names
    shutil.rmtree(directory)
    build("dpo_data", described(here), workers=3)
    assert written == {name: (directory / name).read_bytes() for name in written}
    with pytest.raises(UserError, match=r'template was "chatml", is now "instruct".*--force-from dpo_data'):
        build("dpo_data", described(here, template="instruct"))
    assert dpo.data.load(directory, stage.read_manifest(directory)["read"]["mini/tokenizer/spm.model"]) == counts


@pytest.mark.parametrize(("source", "numbers"), [("", range(14)), ("pairs", range(12)), ("more", range(12, 14))])
def test_rows_are_read_as_the_files_have_them(here: Place, source, numbers):  # noqa: F811
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


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="sources has chats, which does not give pairs"):
        PairConfig(sources=(Chats(paths=("a",)),))
    with pytest.raises(ValueError, match="sources has pairs with format 'alpaca'"):
        PairConfig(sources=(replace(FILES, format="alpaca"),))
