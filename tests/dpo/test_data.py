"""Pairs as ids: what the files hold, how they are cut, what is counted, which split, and what is read back."""

import hashlib
import itertools
import json
import shutil
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
from data.holdout import split_hash, threshold
from data.sources import PythonDocs
from dpo.data import PairConfig, PairRows, encoder, fitted, rendered
from dpo.filters import PairFilters, PairJudge
from dpo.pairs import DocPairs, Pair, Pairs
from sft.conversations import Chats, DocQuestions, Message
from sft.templates import TEMPLATES, render
from tests.conftest import MINI, WORDS, Place, build, write_lines

ANY = PairFilters(language=None)
PAIRS = [
    {"prompt": f"Say {a} {b}.", "chosen": f"{a} {b}", "rejected": f"{b} {b}"} for a in WORDS[4:] for b in WORDS[:4]
]
FILES = Pairs(paths=("pairs.jsonl",))


@pytest.fixture(scope="session")
def preferred(tmp_path_factory, text) -> Place:
    """A directory with corpus, tokenizer and pairs."""
    place = Place(tmp_path_factory.mktemp("preferred"))
    place.raw.mkdir()
    write_lines(place.raw / "text.jsonl", ({"text": part} for part in text))
    write_lines(place.raw / "pairs.jsonl", PAIRS)
    head, tail = MINI.split("    dpo=DPOConfig(")
    data = '    dpo=DPOConfig(data=PairConfig(sources=(Pairs(paths=("pairs.jsonl",)),), val_fraction=0.2)),\n'
    place.config.write_text(head + data + tail[tail.index("    eval=") :])
    place.make("tokenizer")
    return place


@pytest.fixture
def here(preferred: Place, tmp_path: Path, monkeypatch) -> Place:
    """A copy of it."""
    shutil.copytree(preferred.path, tmp_path, dirs_exist_ok=True)
    place = Place(tmp_path)
    monkeypatch.setenv("DATA", str(place.raw))
    monkeypatch.setenv("RUNS", str(place.runs))
    return place


@pytest.fixture(scope="session")
def spm(preferred: Place):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNS", str(preferred.runs))
        return configs.load(preferred.config).load_tokenizer()


def described(place: Place, context: int = 64, template: str = "chatml", **changes) -> Experiment:
    """The experiment with changes of its PairConfig."""
    found = configs.load(place.config)
    return replace(
        found,
        model=replace(found.model, context_length=context),
        sft=replace(found.sft, data=replace(found.sft.data, template=template)),
        dpo=replace(found.dpo, data=replace(found.dpo.data, **changes)),
    )


def made(place: Place, *records: dict, **changes) -> tuple[Path, dict]:
    """The directory made of records, and its counts."""
    if records:
        write_lines(place.raw / "pairs.jsonl", records)
    directory = build("dpo_data", described(place, **changes), force=True)
    return directory, json.loads((directory / "manifest.json").read_text())["counts"]


def in_val(question: str, fraction: float = 0.2) -> bool:
    return int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") / 2**64 < fraction


def question(split: str, number: int = 0) -> str:
    """One that belongs to a split, by its hash."""
    found = (text for n in itertools.count() if in_val(text := f"Ask {n}.") is (split == "val"))
    return next(itertools.islice(found, number, None))


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


def spelling(spm, template: str, prompt: list[Message], answer: str) -> list[int]:
    """Of the whole conversation, up to the last id that is trained."""
    ids, trained = render(template, [*prompt, Message("assistant", answer)], spm)
    return ids[: max(i for i, yes in enumerate(trained) if yes) + 1]


# ------------------------------------------------------------------------------------------------------- what is made


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_files_hold_what_the_template_gives(here: Place, spm, template):
    directory, counts = made(here, template=template, context=200)
    assert counts["dtype"] == "<u2"
    for split in ("train", "val"):
        numbers = [i for i, each in enumerate(PAIRS) if in_val(each["prompt"]) is (split == "val")]
        found, labels = stored(directory, split)
        assert len(found) == len(numbers)
        for i, (prompt, *answers) in zip(numbers, found, strict=True):
            asked = [Message("user", PAIRS[i]["prompt"])]
            assert prompt == render(template, asked, spm, ask=True)[0]
            for answer, name in zip(answers, ("chosen", "rejected"), strict=True):
                assert prompt + answer == spelling(spm, template, asked, PAIRS[i][name])
        assert labels == [[0, n] for n in range(len(numbers))]
        lines = (directory / f"{split}.txt").read_text().splitlines()
        assert lines == [f"pairs.jsonl:{i + 1}" for i in numbers]
        lengths = [sum(map(len, parts)) for parts in found]
        assert counts[split] == {
            "pairs": len(numbers),
            "prompts": len(numbers),
            "tokens": sum(lengths),
            "longest": max(lengths),
            "sources": {"pairs": {"pair": 0, "pairs": len(numbers)}},
            "kinds": {"pairs": len(numbers)},
        }


SAYING = st.text(max_size=12) | st.sampled_from(["### Response:\n", "<|im_end|>", "</s>", "\n", " a", "assistant\n"])
EXCHANGE = st.tuples(SAYING.filter(str.strip), SAYING)


def talk(system: str, exchanges: list[tuple[str, str]], asked: str) -> list[Message]:
    turns = [*itertools.chain.from_iterable(exchanges), asked]
    roles = itertools.cycle(("user", "assistant"))
    return [Message("system", system)] * bool(system.strip()) + [
        Message(role, text) for role, text in zip(roles, turns, strict=False)
    ]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.builds(talk, SAYING, st.lists(EXCHANGE, max_size=2), SAYING.filter(str.strip)),
    SAYING,
    SAYING,
    st.sampled_from([*TEMPLATES]),
)
def test_prompt_and_answer_are_the_conversation_up_to_its_last_trained_id(spm, prompt, chosen, rejected, template):
    asked, *answers = rendered(Pair("x", tuple(prompt), chosen, rejected, ("k",)), template, spm)
    for ids, text in zip(answers, (chosen, rejected), strict=True):
        assert asked + ids == spelling(spm, template, prompt, text)
        assert ids[-1] in (spm.eos, *spm.control.values())
    assert asked == render(template, prompt, spm, ask=True)[0]


# ------------------------------------------------------------------------------------------------------------- cutting


def lengths_of(prompt: int, chosen: int, rejected: int) -> list[list[int]]:
    """A pair of so many ids, all different."""
    ids = list(range(prompt + chosen + rejected))
    return [ids[:prompt], ids[prompt : prompt + chosen], ids[prompt + chosen :]]


@pytest.mark.parametrize(
    ("context", "lengths", "expected"),
    [
        (10, (6, 5, 3), None),  # five ids are read after the prompt, but for the last
        (10, (6, 3, 5), None),
        (10, (7, 5, 3), ([0, 2, 3, 4, 5, 6], 5, 3)),  # the first id and the end of the prompt
        (10, (30, 3, 5), ([0, *range(25, 30)], 3, 5)),
        (10, (30, 6, 1), ([0, 26, 27, 28, 29], 6, 1)),  # half of the context
        (10, (30, 7, 1), ([0, 26, 27, 28, 29], 6, 1)),  # is left to the prompt, the answers are cut
        (10, (30, 20, 20), ([0, 26, 27, 28, 29], 6, 6)),
        (10, (4, 20, 2), ([0, 1, 2, 3], 7, 2)),  # a shorter prompt stays whole
        (10, (1, 10, 3), None),
        (10, (1, 11, 3), ([0], 10, 3)),
        (2, (9, 4, 4), ([0, 8], 1, 1)),
        (3, (9, 1, 1), ([0, 7, 8], 1, 1)),
    ],
)
def test_cut_by_hand(context, lengths, expected):
    whole = lengths_of(*lengths)
    prompt, chosen, rejected = expected or (whole[0], *lengths[1:])
    assert fitted(whole, context) == [prompt, whole[1][:chosen], whole[2][:rejected]]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(2, 40), st.integers(2, 90), st.integers(1, 90), st.integers(1, 90))
def test_a_cut_pair_fits_and_is_cut_no_more_than_it_must(context, prompt, chosen, rejected):
    whole = lengths_of(prompt, chosen, rejected)
    asked, *answers = fitted(whole, context)
    size = len(asked) + max(map(len, answers)) - 1
    assert size == min(context, prompt + max(chosen, rejected) - 1)
    assert asked == [0, *whole[0][prompt - len(asked) + 1 :]]
    assert len(asked) >= min(prompt, max(2, context // 2))
    for new, old in zip(answers, whole[1:], strict=True):
        assert new == old[: len(new)]
        assert len(new) in (len(old), context + 1 - len(asked))
    if answers != whole[1:]:
        assert len(asked) == min(prompt, max(2, context // 2))


@pytest.mark.parametrize("context", [4, 8, 24, 64])
def test_nothing_is_longer_than_the_context(here: Place, spm, context):
    """Not with a prompt that alone is longer, nor with one of a few tokens."""
    many = " ".join(f"{n} and" for n in range(60))
    start, held = question("train"), question("val")
    records = [record(start, f"a{many}", f"b{many}"), record(f"{held} {many}", "yes", "no"), HELD]
    records += [record(question("train", n), "x" * n, "y" * n) for n in range(1, 30)]
    fraction = 0.2
    directory, counts = made(here, *records, context=context, filters=ANY, val_fraction=fraction)
    cut = 0
    for split in ("train", "val"):
        found, _ = stored(directory, split)
        lines = (directory / f"{split}.txt").read_text().splitlines()
        for line, (prompt, *answers) in zip(lines, found, strict=True):
            given_ = records[int(line.split(":")[1]) - 1]
            asked = [Message("user", given_["prompt"])]
            whole, _ = render("chatml", asked, spm, ask=True)
            full = [spelling(spm, "chatml", asked, given_[name])[len(whole) :] for name in ("chosen", "rejected")]
            assert len(prompt) + max(map(len, answers)) - 1 <= context
            assert prompt[0] == spm.bos
            assert prompt[1:] == whole[len(whole) - len(prompt) + 1 :]
            assert answers == [ids[: len(answer)] for ids, answer in zip(full, answers, strict=True)]
            cut += [prompt, *answers] != [whole, *full]
        assert counts[split]["longest"] == max(sum(map(len, parts)) for parts in found)
    assert counts["sources"]["pairs"]["cut"] == cut > 0
    dropped = counts["sources"]["pairs"]["dropped"]
    assert set(dropped) <= {"identical_when_cut"}
    assert sum(dropped.values()) + counts["sources"]["pairs"]["kept"] == len(records)


def test_answers_alike_where_they_are_cut_are_dropped(here: Place):
    many = " ".join(f"{n} and" for n in range(60))
    alike = record(question("train", 1), f"{many} a", f"{many} b")
    _, counts = made(here, *PAIRS, alike, context=64)
    assert counts["sources"]["pairs"]["dropped"] == {"identical_when_cut": 1}
    _, counts = made(here, *PAIRS, alike, context=1_000)
    assert counts["sources"]["pairs"]["dropped"] == {}


def test_what_is_too_long_may_be_dropped(here: Place, spm):
    """What just fits is whole."""
    asked, answer = question("train"), "one two three four"
    longest = len(spelling(spm, "chatml", [Message("user", asked)], answer))
    records = [record(asked, "one", answer), record(question("train", 1), "a", "b"), HELD]
    for context, kept, dropped in ((longest - 1, 3, {}), (longest - 2, 2, {"longer_than_context": 1})):
        directory, counts = made(here, *records, context=context, too_long="drop")
        own = counts["sources"]["pairs"]
        assert (own["kept"], own["cut"], own["dropped"]) == (kept, 0, dropped)
    assert len(stored(directory, "train")[0]) == 1
    _, counts = made(here, *records, context=longest - 2)
    assert (counts["sources"]["pairs"]["kept"], counts["sources"]["pairs"]["cut"]) == (3, 1)


# --------------------------------------------------------------------------------------------- which split, and counts


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 30)), min_size=1, max_size=40), st.sampled_from([0.1, 0.5]))
def test_a_prompt_is_on_one_side_with_all_of_its_pairs(spm, drawn, fraction):
    source = Listed(
        *(
            Pair(f"{i}", (Message("user", f"Ask {p}."),), f"a{n}", f"b{i}", (f"Ask {p}.",))
            for i, (p, n) in enumerate(drawn)
        )
    )
    config = PairConfig(sources=(source,), filters=ANY, val_fraction=fraction)
    limit = threshold((split_hash(f"Ask {p}.".encode()) for p, _ in drawn), fraction)
    if limit is None:  # one prompt
        return
    splits, counts = gathered(config, spm)
    for split in ("train", "val"):
        expected = [
            str(i) for i, (p, _) in enumerate(drawn) if (split_hash(f"Ask {p}.".encode()) < limit) == (split == "val")
        ]
        assert [item.id for item in splits[split]] == expected
    assert counts["listed"]["kept"] == len(drawn)


def gathered(config: PairConfig, spm, context: int = 64) -> tuple[dict, dict]:
    return sft.data.gather(config, encoder(config, "chatml", spm, context), PairJudge(config.filters), 1)


class Listed(Pairs):
    """Pairs that are given to it."""

    def __init__(self, *pairs, name: str = "listed", **options):
        super().__init__(name=name, paths=("none",), **options)
        object.__setattr__(self, "given", pairs)

    def pairs(self, workers):
        yield from self.given


def test_a_pair_that_belongs_to_both_splits_is_dropped(spm):
    val, train = question("val"), question("train")
    prompt, keys = (Message("user", "Hi"),), [(val, train), (train, val), (val, val), (train,)]
    pairs = [Pair(f"{i}", prompt, f"a{i}", "b", each) for i, each in enumerate(keys)]
    splits, counts = gathered(PairConfig(sources=(Listed(*pairs),), val_fraction=0.2), spm)
    assert {name: [item.id for item in items] for name, items in splits.items()} == {"train": ["3"], "val": ["2"]}
    assert counts["listed"]["dropped"] == {"of_both_splits": 2}


def test_what_is_kept_and_dropped_is_counted_by_rule_and_by_source(here: Place):
    first = PAIRS[0]
    own = [
        *PAIRS[:20],
        first,
        record(first["prompt"], first["rejected"], first["chosen"]),
        record("Say so.", "so", "so"),
    ]
    own += [record("Say nothing.", "", "a"), record("Say it long.", "x" * 200, "y")]
    other = [first, record("Say other.", "other", "none"), {"prompt": "Hi"}, {"a": 1}]
    write_lines(here.raw / "other.jsonl", other)
    sources = (FILES, Pairs(name="other", paths=("other.jsonl",), unreadable="skip"))
    directory, counts = made(here, *own, sources=sources, filters=PairFilters(max_chars=100), context=300)
    found = counts["sources"]
    assert found["pairs"] | {"tokens": 0} == {
        "read": 25,
        "kept": 20,
        "cut": 0,
        "tokens": 0,
        "dropped": {"contradiction": 1, "duplicate": 1, "empty_answer": 1, "identical": 1, "too_long": 1},
    }
    assert list(found["pairs"]["dropped"]) == sorted(found["pairs"]["dropped"])
    (extra,) = [
        parts
        for split in ("train", "val")
        for parts, line in zip(
            stored(directory, split)[0], (directory / f"{split}.txt").read_text().splitlines(), strict=True
        )
        if line == "other.jsonl:2"
    ]
    assert found["other"] == {
        "read": 4, "kept": 1, "cut": 0, "tokens": sum(map(len, extra)), "dropped": {"duplicate": 1, "unreadable": 2}
    }  # fmt: skip
    assert sum(each["tokens"] for each in found.values()) == counts["train"]["tokens"] + counts["val"]["tokens"]


def test_reading_stops_at_max_pairs(here: Place):
    """Of those kept; what lies behind them is not read."""
    records = [PAIRS[0], *PAIRS[:20], {"broken": 1}]
    _, counts = made(here, *records, sources=(replace(FILES, max_pairs=20),))
    assert counts["sources"]["pairs"]["dropped"] == {"duplicate": 1}
    assert (counts["sources"]["pairs"]["read"], counts["sources"]["pairs"]["kept"]) == (21, 20)
    assert counts["train"]["pairs"] + counts["val"]["pairs"] == 20


# ------------------------------------------------------------------------------------------------ the index, the reader


def indexed(place: Place) -> tuple[Path, dict]:
    """Two sources of several kinds, and prompts that have several pairs."""
    asked = [question("train", n) for n in range(4)]
    write_lines(place.raw / "more.jsonl", [record(each, "good", "bad") for each in asked[2:]])
    records = [record(each, f"a{n}", "b") for n in range(3) for each in asked] + [HELD]
    return made(place, *records, sources=(FILES, Pairs(name="more", paths=("more.jsonl",))))


def test_the_columns_of_the_index(here: Place):
    directory, counts = indexed(here)
    _, labels = stored(directory, "train")
    assert labels == [[0, n] for _ in range(3) for n in range(4)] + [[1, 2], [1, 3]]
    assert counts["train"]["sources"] == {"pairs": {"pair": 0, "pairs": 12}, "more": {"pair": 12, "pairs": 2}}
    assert (counts["train"]["kinds"], counts["train"]["prompts"]) == ({"pairs": 12, "more": 2}, 4)
    assert counts["val"]["sources"] == {"pairs": {"pair": 0, "pairs": 1}, "more": {"pair": 1, "pairs": 0}}
    lines = (directory / "train.txt").read_text().splitlines()
    assert lines == [f"pairs.jsonl:{n}" for n in range(1, 13)] + ["more.jsonl:1", "more.jsonl:2"]


@pytest.mark.parametrize(("source", "numbers"), [("", range(14)), ("pairs", range(12)), ("more", range(12, 14))])
def test_rows_are_read_as_the_files_have_them(here: Place, source, numbers):
    directory, counts = indexed(here)
    found, labels = stored(directory, "train")
    rows = PairRows(directory, "train", counts, source=source)
    assert (rows.count, rows.width) == (len(numbers), max(sum(map(len, parts)) for parts in found))
    assert rows.names == ["pairs", "more"]
    assert np.stack([rows.kinds, rows.prompts], axis=1).tolist() == labels
    order = [*reversed(range(rows.count)), 0]
    ids, bounds, which = rows.read(order)
    assert {t.dtype for t in (ids, bounds, which)} == {torch.int64}
    for row, each in enumerate(order):
        prompt, chosen, rejected = found[numbers[each]]
        whole = prompt + chosen + rejected
        assert ids[row].tolist() == whole + [0] * (rows.width - len(whole))
        assert bounds[row].tolist() == [len(prompt), len(prompt + chosen), len(whole)]
        assert which[row].item() == numbers[each]
        assert rows.documents(each) == range(numbers[each], numbers[each] + 1)
    batches = list(rows.batches(5))
    assert [len(batch[0]) for batch in batches] == [min(5, rows.count - i) for i in range(0, rows.count, 5)]
    everything = rows.read(range(rows.count))
    assert all(
        torch.equal(torch.cat(each), all_) for each, all_ in zip(zip(*batches, strict=True), everything, strict=True)
    )
    assert sorted(rows.drawn(i) for i in range(rows.count)) == [*range(rows.count)]


# ------------------------------------------------------------------------------------------------------ Python's own


@pytest.fixture(scope="module")
def documented(spm):
    """Questions about documentation, and what is gathered of the pairs made of them."""
    docs = PythonDocs(packages=())
    source = DocPairs(docs=docs, max_documents=200)
    splits, counts = gathered(PairConfig(sources=(source,), val_fraction=0.1), spm, 1_000)
    return list(DocQuestions(docs=docs, max_documents=200).conversations(1)), splits, counts["python_pairs"]


def test_pairs_are_held_out_as_their_questions_are(documented):
    questions, splits, count = documented
    held = {each.id: in_val(each.keys[0][:4096], 0.1) for each in questions}
    assert count["dropped"] == {"of_both_splits": 2}
    assert sum(held.values()) > 9
    for split, items in splits.items():
        origins = [item.id.rsplit(" ", 1) for item in items]
        assert all(held[name] is (split == "val") for name, _ in origins)
        expected = sum(side is (split == "val") for side in held.values())
        kinds = [sum(kind == each for _, kind in origins) for each in ("shuffled", "repeated", "another")]
        assert kinds == [expected, expected, expected - 1]  # of each side one has its other answer on the other


def test_no_answer_of_one_side_is_an_answer_on_the_other(documented, spm):
    """Neither as the chosen nor as the rejected answer."""
    questions, splits, _ = documented
    side = {each.messages[-1].content: in_val(each.keys[0][:4096], 0.1) for each in questions}
    for split, items in splits.items():
        for item in items:
            if item.kind == "another":
                _, chosen, rejected = np.split(item.ids, np.cumsum(item.parts)[:2])
                texts = [spm.decode(answer[:-1].tolist(), begins=False) for answer in (chosen, rejected)]
                assert {side[text] for text in texts} == {split == "val"}


# ---------------------------------------------------------------------------------------------------- made and finished


def test_two_runs_give_the_same_bytes(here: Place):
    sources = (FILES, DocPairs(docs=PythonDocs(packages=()), max_documents=20))
    directory, _ = made(here, sources=sources)
    first = {path.name: path.read_bytes() for path in directory.iterdir() if path.name not in (".lock", "log.txt")}
    assert set(first) == {"manifest.json"} | {
        f"{split}.{end}" for split in ("train", "val") for end in ("bin", "idx", "txt")
    }
    shutil.rmtree(directory)
    build("dpo_data", described(here, sources=sources), workers=3)
    assert first == {name: (directory / name).read_bytes() for name in first}


@pytest.mark.parametrize("split", ["train", "val"])
def test_few_prompts_on_one_side_are_divided_by_their_hashes(here: Place, split):
    """All pairs of a prompt stay together."""
    records = [record(question(split, i), f"Answer {i} {n}.", "No.") for i in range(3) for n in range(2)]
    _, counts = made(here, *records)
    assert (counts["train"]["prompts"], counts["val"]["prompts"]) == ((2, 1) if split == "train" else (1, 2))
    assert counts["train"]["pairs"] + counts["val"]["pairs"] == 6


def test_pairs_of_one_prompt_are_divided_and_a_single_pair_is_one_clear_error(here: Place):
    _, counts = made(here, *(record("Hi", f"Answer {word}.", "No.") for word in WORDS))
    assert counts["train"]["pairs"] >= 1
    assert counts["val"]["pairs"] >= 1
    with pytest.raises(UserError, match=r"^1 pairs passed the filters; training and validation take at least one"):
        made(here, PAIRS[0], PAIRS[0])


def test_the_command_makes_it_once(here: Place, caplog):
    with caplog.at_level("INFO", "lumi"):
        directory = here.make("dpo_data")
    assert "pairs: 28 of 28 pairs kept (dropped: none)" in caplog.text
    before = {path.name: path.stat().st_mtime_ns for path in directory.iterdir() if path.suffix in (".bin", ".json")}
    here.make("dpo_data")
    assert before == {name: (directory / name).stat().st_mtime_ns for name in before}


def test_another_config_and_other_pairs_are_refused(here: Place):
    """Without its raw files a finished directory stands."""
    directory, _ = made(here)
    before = (directory / "manifest.json").read_bytes()
    for changes, named in (
        (
            {"sources": (replace(FILES, max_pairs=20),)},
            r"sources\[0\]\.max_pairs was null, is now 20.* dpo_data --force",
        ),
        ({"template": "instruct"}, 'template was "chatml", is now "instruct"'),
        ({"context": 48}, "context_length was 64, is now 48"),
    ):
        with pytest.raises(UserError, match=named):
            build("dpo_data", described(here, **changes))
    write_lines(here.raw / "pairs.jsonl", PAIRS[1:])
    with pytest.raises(UserError, match=r"was made from something else: .*pairs\.jsonl was"):
        build("dpo_data", described(here))
    (here.raw / "pairs.jsonl").unlink()
    assert build("dpo_data", described(here)) == directory
    assert (directory / "manifest.json").read_bytes() == before


def test_an_interrupted_build_leaves_no_manifest(here: Place, monkeypatch):
    """Not the old one either; run again it is made."""
    directory, _ = made(here)
    whole = (directory / "manifest.json").read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    for name in ("gather", "write"):
        with monkeypatch.context() as patch:
            patch.setattr(dpo.data, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                build("dpo_data", described(here), force=True)
        assert stage.read_manifest(directory) is None
        with pytest.raises(UserError, match=r"unfinished; make it with: python pipeline\.py CONFIG dpo_data"):
            dpo.data.load(directory, "")
    build("dpo_data", described(here))
    assert (directory / "manifest.json").read_bytes() == whole


def test_what_is_loaded_is_whole_and_of_the_tokenizer(here: Place):
    directory, counts = made(here)
    (digest,) = {k: v for k, v in stage.read_manifest(directory)["read"].items() if k.endswith("spm.model")}.values()
    assert dpo.data.load(directory, digest) == counts
    with pytest.raises(
        UserError,
        match=r"was made with another tokenizer; make it again with: .* dpo_data --force",
    ):
        dpo.data.load(directory, "0" * 64)
    path = directory / "train.bin"
    path.write_bytes(path.read_bytes()[:-2] + b"\0\0")
    with pytest.raises(UserError, match=r"train\.bin has SHA-256 .*python pipeline.py CONFIG dpo_data --force"):
        dpo.data.load(directory, digest)


@pytest.mark.parametrize(
    ("error", "changes", "message"),
    [
        (ValueError, {"sources": ()}, "sources are called nothing"),
        (ValueError, {"sources": (FILES, FILES)}, "sources are called pairs, pairs"),
        (ValueError, {"sources": (Chats(paths=("a",)),)}, "sources has chats, which does not give pairs"),
        (ValueError, {"sources": (replace(FILES, format="alpaca"),)}, "sources has pairs with format 'alpaca'"),
        (ValueError, {"too_long": "split"}, "too_long is 'split'"),
        (ValueError, {"val_fraction": 1.0}, r"val_fraction is 1\.0"),
        (TypeError, {"filters": None}, "filters is "),
    ],
)
def test_impossible_settings_are_refused(error, changes, message):
    with pytest.raises(error, match=message):
        PairConfig(**changes)
