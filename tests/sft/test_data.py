"""Conversations as rows: what the files hold, what is counted, which split, and what a batch is."""

import hashlib
import itertools
import json
import os
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
import sft.data
import stage
from cli import UserError
from configs import Experiment
from data.corpus import CorpusConfig
from data.sources import Files
from sft.conversations import Chats, Message
from sft.data import ConversationConfig, Rows, Split, write
from sft.filters import Filters
from sft.packing import best_fit
from sft.templates import TEMPLATES, render
from sft.train import FineTuning, SFTConfig
from tests.conftest import CHATS, MINI, Place, build, write_lines
from trainer import Task

ANY = Filters(language=None, near_duplicates=None)


@pytest.fixture(scope="session")
def spoken(tmp_path_factory, text) -> Place:
    """A directory with corpus, tokenizer and conversations."""
    place = Place(tmp_path_factory.mktemp("spoken"))
    place.raw.mkdir()
    write_lines(place.raw / "text.jsonl", ({"text": part} for part in text))
    write_lines(place.raw / "chats.jsonl", CHATS)
    place.config.write_text(MINI)
    place.make("sft_data")
    return place


@pytest.fixture
def here(spoken: Place, tmp_path: Path, monkeypatch) -> Place:
    """A copy of it in which nothing has been made of the conversations yet."""
    shutil.copytree(spoken.path, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "runs/mini/sft_data")
    place = Place(tmp_path)
    monkeypatch.setenv("DATA", str(place.raw))
    monkeypatch.setenv("RUNS", str(place.runs))
    return place


def described(place: Place, context: int = 64, **changes) -> Experiment:
    """The experiment with changes of its ConversationConfig."""
    found = configs.load(place.config)
    data = replace(found.sft.data, **changes)
    return replace(found, model=replace(found.model, context_length=context), sft=replace(found.sft, data=data))


def made(place: Place, *records: dict, context: int = 64, **changes) -> tuple[Path, dict]:
    """The directory made of records, and its counts."""
    if records:
        write_lines(place.raw / "chats.jsonl", records)
    directory = build("sft_data", described(place, context, **changes), force=True)
    return directory, json.loads((directory / "manifest.json").read_text())["counts"]


def in_val(question: str, fraction: float = 0.2) -> bool:
    return int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") / 2**64 < fraction


def question(split: str, number: int = 0) -> str:
    """One that belongs to a split, by its hash."""
    found = (text for n in itertools.count() if in_val(text := f"Ask {n}.") is (split == "val"))
    return next(itertools.islice(found, number, None))


def pair(asked: str, answer: str) -> dict:
    return {"prompt": asked, "response": answer}


HELD = pair(question("val"), "Held out.")  # so that the split is not empty


def ids_and_mask(directory: Path, split: str) -> list[tuple[list[int], list[int]]]:
    """The conversations of a split, read as the documentation says."""
    tokens, mask = (np.fromfile(directory / f"{split}.{end}", kind) for end, kind in (("bin", "<u2"), ("mask", "u1")))
    starts = np.fromfile(directory / f"{split}.idx", "<i8")
    assert starts[0] == 0
    assert starts[-1] == len(tokens) == len(mask)
    return [(tokens[a:b].tolist(), mask[a:b].tolist()) for a, b in itertools.pairwise(starts)]


def rendered(place: Place, record: dict, template: str = "chatml") -> tuple[list[int], list[bool]]:
    """Ids and mask of a pair, as far as there is something to predict."""
    messages = (Message("user", record["prompt"]), Message("assistant", record["response"]))
    ids, trained = render(template, messages, configs.load(place.config).load_tokenizer())
    end = max(i for i, yes in enumerate(trained) if yes) + 1
    return ids[:end], trained[:end]


# ------------------------------------------------------------------------------------------------------- what is made


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_files_hold_what_the_template_gives(here: Place, template):
    directory, counts = made(here, context=160, template=template)
    for split in ("train", "val"):
        lines = [(i, each) for i, each in enumerate(CHATS, 1) if in_val(each["prompt"]) is (split == "val")]
        expected = [rendered(here, each, template) for _, each in lines]
        rows = best_fit([len(ids) - 1 for ids, _ in expected], 160)
        order = [i for row in rows for i in row]
        assert ids_and_mask(directory, split) == [expected[i] for i in order]
        firsts = np.fromfile(directory / f"{split}.rows", "<i8")
        assert firsts.tolist() == [0, *itertools.accumulate(map(len, rows))]
        origins = (directory / f"{split}.txt").read_text().splitlines()
        assert origins == [f"chats.jsonl:{lines[i][0]}" for i in order]
        used = sum(len(ids) - 1 for ids, _ in expected)
        assert counts[split] == {
            "conversations": len(lines),
            "tokens": sum(len(ids) for ids, _ in expected),
            "trained": sum(sum(mask) for _, mask in expected),
            "rows": len(rows),
            "sources": {"chats": {"row": 0, "rows": len(rows)}},
            "packing_efficiency": used / (len(rows) * 160),
        }
    assert counts["packing_efficiency"] == counts["train"]["packing_efficiency"] > 0.5
    assert counts["dtype"] == "<u2"


def test_what_is_kept_and_dropped_is_counted_by_rule_and_by_source(here: Place):
    own = [*CHATS, CHATS[0], pair("Say nothing.", ""), pair("Say it long.", "x" * 200)]
    write_lines(here.raw / "other.jsonl", [CHATS[1], pair("Say other.", "other"), {"prompt": "no answer"}, {"a": 1}])
    sources = (Chats(paths=("chats.jsonl",)), Chats(name="other", paths=("other.jsonl",), unreadable="skip"))
    directory, counts = made(here, *own, sources=sources, filters=Filters(max_chars=100))
    every = [ids for split in ("train", "val") for ids, _ in ids_and_mask(directory, split)]
    (other,) = [len(rendered(here, pair("Say other.", "other"))[0])]
    assert counts["sources"] == {
        "chats": {
            "read": 47,
            "kept": 44,
            "cut": 0,
            "tokens": sum(map(len, every)) - other,
            "dropped": {"duplicate": 1, "empty_answer": 1, "too_long": 1},
        },
        "other": {"read": 4, "kept": 1, "cut": 0, "tokens": other, "dropped": {"duplicate": 1, "unreadable": 2}},
    }
    assert sum(len(ids) for ids in every) == counts["train"]["tokens"] + counts["val"]["tokens"]


def test_sources_lie_in_rows_of_their_own(here: Place):
    write_lines(here.raw / "other.jsonl", [pair(question("train", i), "other") for i in range(40)])
    sources = (Chats(paths=("chats.jsonl",)), Chats(name="other", paths=("other.jsonl",)))
    directory, counts = made(here, sources=sources, filters=ANY)
    parts = counts["train"]["sources"]
    assert parts["other"]["row"] == parts["chats"]["rows"]
    assert parts["chats"]["rows"] + parts["other"]["rows"] == counts["train"]["rows"]
    origins = (directory / "train.txt").read_text().splitlines()
    for name, file in (("chats", "chats.jsonl"), ("other", "other.jsonl")):
        rows = Rows(directory, "train", counts, 64, source=name)
        numbers = [number for row in range(rows.count) for number in rows.conversations(row)]
        assert {origins[number].split(":")[0] for number in numbers} == {file}


def test_a_split_is_decided_by_the_first_question_alone(here: Place):
    """Of two answers to it both are on one side; and no other conversation has a say."""
    again = [pair(each["prompt"], f"again {i}") for i, each in enumerate(CHATS)]
    directory, _ = made(here, *CHATS, *again, filters=ANY)
    for split in ("train", "val"):
        numbers = {int(line.split(":")[1]) - 1 for line in (directory / f"{split}.txt").read_text().splitlines()}
        assert numbers == {i for i, each in enumerate(CHATS * 2) if in_val(each["prompt"]) is (split == "val")}
    reduced = [each for i, each in enumerate([*CHATS, *again]) if i % 3]
    directory, _ = made(here, *reversed(reduced), filters=ANY)
    for split in ("train", "val"):
        expected = [rendered(here, each) for each in reduced if in_val(each["prompt"]) is (split == "val")]
        assert sorted(ids_and_mask(directory, split)) == sorted(expected)


def test_later_turns_do_not_decide_the_split(here: Place):
    turns = [("user", question("val")), ("assistant", "a"), ("user", question("train")), ("assistant", "b")]
    record = {"messages": [{"role": role, "content": content} for role, content in turns]}
    _, counts = made(here, record, {"messages": record["messages"][2:]})
    assert (counts["val"]["conversations"], counts["train"]["conversations"]) == (1, 1)


def test_a_conversation_too_long_is_cut_and_nothing_false_is_trained(here: Place):
    """Its row ends in the middle of the answer, which has no end there; the last token is only predicted."""
    long = pair(question("train"), " ".join(f"{n} and" for n in range(60)))
    whole, trained = rendered(here, long)
    assert len(whole) > 100
    directory, counts = made(here, long, HELD, context=40, filters=ANY)
    assert counts["sources"]["chats"]["cut"] == 1
    assert ids_and_mask(directory, "train") == [(whole[:41], trained[:41])]
    inputs, targets, positions = Rows(directory, "train", counts, 40).read([0])
    assert inputs[0].tolist() == whole[:40]
    assert positions[0].tolist() == list(range(40))
    assert targets[0].tolist() == [id if yes else -100 for id, yes in zip(whole[1:41], trained[1:41], strict=True)]
    spm = configs.load(here.config).load_tokenizer()
    assert not {spm.eos, *spm.control.values()} & set(targets[0].tolist())
    assert targets[0, -1] == whole[40]


@pytest.mark.parametrize("too_long", ["cut", "drop"])
def test_what_just_fits_is_whole(here: Place, too_long):
    """A row of n holds n + 1 ids, the last of which is only predicted."""
    record = pair(question("train"), "one two three")
    whole = rendered(here, record)
    directory, counts = made(here, record, HELD, context=len(whole[0]) - 1, too_long=too_long, filters=ANY)
    assert ids_and_mask(directory, "train") == [whole]
    assert counts["train"]["packing_efficiency"] == 1
    assert counts["sources"]["chats"]["cut"] == 0
    another = pair(question("train", 1), "one")
    assert len(rendered(here, another)[0]) < len(whole[0])
    _, counts = made(here, record, another, HELD, context=len(whole[0]) - 2, too_long=too_long, filters=ANY)
    kept = {"cut": (3, 1, {}), "drop": (2, 0, {"longer_than_context": 1})}[too_long]
    assert tuple(counts["sources"]["chats"][name] for name in ("kept", "cut", "dropped")) == kept


@pytest.mark.parametrize("too_long", ["cut", "drop"])
def test_an_answer_wholly_beyond_the_context_is_dropped(here: Place, too_long):
    long = pair(" ".join(f"{n} and" for n in range(60)), "yes")
    _, counts = made(here, *CHATS, long, too_long=too_long)
    assert counts["sources"]["chats"]["dropped"] == {"longer_than_context": 1}


def test_turns_beyond_the_context_are_left_out(here: Place):
    first, later = "Short.", " ".join(f"{n} and" for n in range(60))
    turns = [("user", question("train")), ("assistant", first), ("user", later), ("assistant", "yes")]
    record = {"messages": [{"role": role, "content": content} for role, content in turns]}
    held = {"messages": [{"role": "user", "content": HELD["prompt"]}, {"role": "assistant", "content": "Held."}]}
    directory, counts = made(here, record, held, filters=ANY)
    ((ids, mask),) = ids_and_mask(directory, "train")
    short, trained = rendered(here, pair(turns[0][1], first))
    assert counts["sources"]["chats"]["cut"] == 1
    assert len(ids) <= 65
    assert ids[: len(short)] == short
    assert mask == [*trained, *[0] * (len(ids) - len(short))]


def test_reading_stops_at_max_tokens(here: Place):
    lengths = [len(rendered(here, each)[0]) for each in CHATS]
    most = sum(lengths[:20]) + 1
    _, counts = made(here, sources=(Chats(paths=("chats.jsonl",), max_tokens=most),))
    assert counts["sources"]["chats"] == {
        "read": 21, "kept": 21, "cut": 0, "tokens": sum(lengths[:21]), "dropped": {}}  # fmt: skip
    _, counts = made(here, sources=(Chats(paths=("chats.jsonl",), max_tokens=most - 1),))
    assert counts["sources"]["chats"]["kept"] == 20


def test_what_cannot_be_read_is_counted_or_stops(here: Place):
    records = [*CHATS[:30], {"prompt": 7, "response": "x"}, *CHATS[30:]]
    _, counts = made(here, *records, sources=(Chats(paths=("chats.jsonl",), unreadable="skip"),))
    assert counts["sources"]["chats"]["dropped"] == {"unreadable": 1}
    assert counts["sources"]["chats"]["read"] == 45
    with pytest.raises(UserError, match=r"chats\.jsonl, line 31: prompt is 7; expected a string"):
        made(here, *records)


def test_two_runs_give_the_same_bytes(here: Place):
    directory, _ = made(here)
    first = {path.name: path.read_bytes() for path in directory.iterdir() if path.name not in (".lock", "log.txt")}
    assert set(first) == {"manifest.json"} | {
        f"{split}.{end}" for split in ("train", "val") for end in ("bin", "mask", "idx", "rows", "txt")}  # fmt: skip
    shutil.rmtree(directory)
    build("sft_data", described(here), workers=3)
    assert first == {name: (directory / name).read_bytes() for name in first}


@pytest.mark.parametrize(("split", "left"), [("val", "train"), ("train", "val")])
def test_a_split_without_conversations_is_one_clear_error(here: Place, split, left):
    records = [pair(question(left, i), f"Answer {i}.") for i in range(3)]
    expected = f"of 3 conversations 3 were kept, and none is left for {split} at val_fraction = 0.2"
    with pytest.raises(UserError, match=expected):
        made(here, *records)
    assert stage.read_manifest(here.runs / "mini/sft_data") is None


# ---------------------------------------------------------------------------------------------------- made and finished


def test_the_command_makes_it_once(here: Place):
    out = here.run("pipeline.py", here.config, "sft_data").stdout
    assert "chats: 44 of 44 conversations kept (dropped: none)" in out
    directory = here.runs / "mini/sft_data"
    before = {path.name: path.stat().st_mtime_ns for path in directory.iterdir() if path.suffix in (".bin", ".json")}
    assert "is up to date" in here.run("pipeline.py", here.config, "sft_data").stdout
    assert before == {name: (directory / name).stat().st_mtime_ns for name in before}


CHANGES = [
    ({"val_fraction": 0.3}, "sft_data.val_fraction was 0.2, is now 0.3"),
    ({"template": "instruct"}, 'sft_data.template was "chatml", is now "instruct"'),
    ({"filters": Filters(max_chars=99)}, "sft_data.filters.max_chars was 50000, is now 99"),
    ({"context": 48}, "context_length was 64, is now 48"),
]


@pytest.mark.parametrize(("changes", "named"), CHANGES)
def test_another_config_is_refused_by_the_field(here: Place, changes, named):
    directory, _ = made(here)
    before = (directory / "manifest.json").read_bytes()
    with pytest.raises(UserError, match=named) as refused:
        build("sft_data", described(here, **changes))
    assert f"python pipeline.py {here.config} sft_data --force" in str(refused.value)
    assert (directory / "manifest.json").read_bytes() == before
    build("sft_data", described(here, **changes), force=True)
    assert (directory / "manifest.json").read_bytes() != before
    build("sft_data", described(here, **changes))


def test_other_conversations_are_refused(here: Place):
    made(here)
    write_lines(here.raw / "chats.jsonl", CHATS[1:])
    with pytest.raises(UserError, match=r"was made from something else: .*chats\.jsonl was"):
        build("sft_data", described(here))


def test_without_its_raw_files_a_finished_directory_stands(here: Place):
    directory, _ = made(here)
    (here.raw / "chats.jsonl").unlink()
    assert build("sft_data", described(here)) == directory
    with pytest.raises(UserError, match=r"val_fraction was 0\.2, is now 0\.3"):
        build("sft_data", described(here, val_fraction=0.3))
    shutil.rmtree(directory)
    with pytest.raises(UserError, match=r"chats\.jsonl"):
        build("sft_data", described(here))


@pytest.mark.parametrize("name", ["train.bin", "val.mask", "train.rows"])
def test_a_damaged_file_is_named(here: Place, name):
    directory, _ = made(here)
    spm = described(here).load_tokenizer()
    content = bytearray((directory / name).read_bytes())
    content[-1] ^= 1
    (directory / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} has SHA-256 .*python pipeline.py CONFIG sft_data --force"):
        sft.data.load(directory, spm.sha256)
    os.truncate(directory / name, 3)
    with pytest.raises(UserError, match=rf"{name} has 3 bytes.*python pipeline.py .* sft_data --force"):
        build("sft_data", described(here))
    (directory / name).unlink()
    with pytest.raises(UserError, match=rf"{name} is missing"):
        build("sft_data", described(here))


def test_another_tokenizer_is_refused(here: Place):
    directory, _ = made(here)
    with pytest.raises(
        UserError,
        match=r"was made with another tokenizer; make it again with: .* sft_data --force",
    ):
        sft.data.load(directory, "0" * 64)
    with pytest.raises(UserError, match=r"nowhere is missing or unfinished; make it with: python pipeline\.py"):
        sft.data.load(here.path / "nowhere", "0" * 64)


@pytest.mark.parametrize(
    ("error", "changes"),
    [
        (ValueError, {"sources": ()}),
        (ValueError, {"sources": (Chats(paths=("a",)), Chats(paths=("b",)))}),
        (ValueError, {"sources": (Files(paths=("a",)),)}),
        (ValueError, {"template": "llama"}),
        (ValueError, {"too_long": "split"}),
        (ValueError, {"val_fraction": 0.0}),
        (ValueError, {"val_fraction": 1.0}),
        (ValueError, {"val_fraction": float("nan")}),
        (TypeError, {"sources": CorpusConfig(sources=(Files(paths=("a",)),))}),
        (TypeError, {"filters": None}),
    ],
)
def test_impossible_settings_are_refused(error, changes):
    with pytest.raises(error, match=f"^{next(iter(changes))} "):
        ConversationConfig(**changes)


# ------------------------------------------------------------------------------------------------------------- batches


def hand_written(directory: Path, context: int, *talks: tuple[list[int], list[int]]) -> dict:
    split = Split()
    for number, (ids, mask) in enumerate(talks):
        split.ids.append(np.array(ids, dtype="<u2"))
        split.masks.append(np.array(mask, dtype=np.uint8))
        split.origins.append(f"line\n{number}")
    return {"dtype": "<u2", "train": write(directory, "train", {"x": split}, context)}


def test_a_row_by_hand(tmp_path):
    """Two conversations and a filling: shifted once, by one; what is asked, and what is not there, is not trained."""
    talks = ([1, 9], [0, 1]), ([1, 2, 3, 4], [0, 0, 1, 1]), ([1, 5, 6, 7, 8], [0, 0, 1, 0, 1])
    counts = hand_written(tmp_path, 6, *talks)
    inputs, targets, positions = Rows(tmp_path, "train", counts, 6).read([0, 1])
    no = -100
    assert inputs.tolist() == [[1, 5, 6, 7, 1, 0], [1, 2, 3, 0, 0, 0]]
    assert targets.tolist() == [[no, 6, no, 8, 9, no], [no, 3, 4, no, no, no]]
    assert positions.tolist() == [[0, 1, 2, 3, 0, 0], [0, 1, 2, 0, 1, 2]]
    assert {t.dtype for t in (inputs, targets, positions)} == {torch.int64}
    assert (tmp_path / "train.txt").read_text() == "line 2\nline 0\nline 1\n"
    assert counts["train"]["packing_efficiency"] == 8 / 12


@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.integers(2, 13), min_size=1, max_size=30), seed=st.integers(0, 9))
def test_rows_give_each_conversation_back(tmp_path_factory, lengths, seed):
    rng, directory = np.random.default_rng(seed), tmp_path_factory.mktemp("rows")
    talks = [(rng.integers(0, 500, n).tolist(), [0, *rng.integers(0, 2, n - 1).tolist()]) for n in lengths]
    counts = hand_written(directory, 12, *talks)
    rows = Rows(directory, "train", counts, 12)
    found = []
    for inputs, targets, positions in zip(*(t.numpy() for t in rows.read(range(rows.count))), strict=True):
        starts = [*np.flatnonzero(positions == 0), 12]
        for a, b in itertools.pairwise(starts):
            assert positions[a:b].tolist() == list(range(b - a))
            found.append((inputs[a:b].tolist(), targets[a:b].tolist()))
    expected = [(ids[:-1], [i if m else -100 for i, m in zip(ids[1:], mask[1:], strict=True)]) for ids, mask in talks]
    assert not Counter(map(repr, expected)) - Counter(map(repr, found))
    assert sum(t != -100 for _, targets in found for t in targets) == sum(sum(mask) for _, mask in talks)
    assert len(found) <= len(talks) + rows.count  # a filling at most in each row


def task_of(experiment: Experiment, directory: Path) -> Task:
    """The task of learning the conversations in a directory."""
    spm = experiment.load_tokenizer()
    counts = sft.data.load(directory, spm.sha256)
    return FineTuning(experiment.sft, experiment.model, directory, counts, spm)


@pytest.fixture
def task(here: Place):
    """Makes the task of learning two sources by weight."""
    write_lines(here.raw / "other.jsonl", [pair(question("train", i), "other") for i in range(40)])
    sources = (Chats(paths=("chats.jsonl",)), Chats(name="other", paths=("other.jsonl",)))

    def make(batch_size: int = 4, seed: int = 0, **weights: float):
        found = described(here, sources=sources, filters=ANY)
        training = replace(found.sft.train, batch_size=batch_size, micro_batch_size=1, seed=seed)
        found = replace(found, sft=replace(found.sft, train=training, weights=weights))
        directory = build("sft_data", found)
        return task_of(found, directory), directory

    return make


def equal(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_batches_follow_the_weights(task):
    """Three rows of one source to one of the other, in every batch of four; in those of five, over four batches."""
    made, directory = task(chats=3.0, other=1.0)
    counts = stage.read_manifest(directory)["counts"]
    whose = {}
    for name in ("chats", "other"):
        rows = Rows(directory, "train", counts, 64, source=name)
        whose |= {tuple(row): name for row in rows.read(range(rows.count))[0].tolist()}
    for step in range(12):
        names = Counter(whose[tuple(row)] for row in made.batch(step, 0, 1)[0].tolist())
        assert names == {"chats": 3, "other": 1}
        assert made.seen(step) == {"chats": 3 * step * 64, "other": step * 64}
    made, _ = task(batch_size=5, chats=3, other=1)
    names = Counter(whose[tuple(row)] for step in range(4) for row in made.batch(step, 0, 1)[0].tolist())
    assert names == {"chats": 15, "other": 5}
    made, _ = task(other=2.5)
    assert {whose[tuple(row)] for step in range(8) for row in made.batch(step, 0, 1)[0].tolist()} == {"other"}


def test_without_weights_every_row_is_seen_once_an_epoch(task):
    made, directory = task(batch_size=1)
    counts = stage.read_manifest(directory)["counts"]["train"]
    rows = counts["rows"]
    assert made.epoch == rows
    for epoch in range(2):
        seen = [made.batch(epoch * rows + i, 0, 1) for i in range(rows)]
        assert len({tuple(batch[0][0].tolist()) for batch in seen}) == rows
        assert sum(made.targets(*batch) for batch in seen) == counts["trained"]
    assert made.seen(7) == {}


@pytest.mark.parametrize("weights", [{}, {"chats": 2, "other": 1}])
def test_a_batch_is_a_pure_function_of_seed_and_step(task, weights):
    made, _ = task(**weights)
    other, _ = task(**weights)
    batches = [made.batch(step, 0, 1) for step in range(12)]
    for step in (11, 3, 0, 7):
        assert equal(other.batch(step, 0, 1), batches[step])
        for ranks in (2, 4):
            parts = [made.batch(step, rank, ranks) for rank in range(ranks)]
            assert {len(part[0]) for part in parts} == {4 // ranks}
            assert equal(tuple(torch.cat(column) for column in zip(*parts, strict=True)), batches[step])
        assert batches[step][-1].tolist() == list(range(4 * step, 4 * step + 4))  # the numbers that dropout follows
    another, _ = task(seed=1, **weights)
    assert not all(equal(another.batch(step, 0, 1), batches[step]) for step in range(3))


def test_weights_of_no_source_are_refused(here: Place):
    with pytest.raises(ValueError, match="weights names others; expected names of the data's sources"):
        replace(described(here).sft, weights={"chats": 1, "others": 1})
    with pytest.raises(ValueError, match="weights are"):
        replace(described(here).sft, weights={"chats": 0})
    with pytest.raises(TypeError, match="weights is"):
        SFTConfig(weights=("chats",))


def test_a_source_of_which_nothing_is_left_cannot_be_drawn_from(here: Place):
    write_lines(here.raw / "other.jsonl", [pair("Say nothing.", "")])
    sources = (Chats(paths=("chats.jsonl",)), Chats(name="other", paths=("other.jsonl",)))
    found = described(here, sources=sources)
    found = replace(found, sft=replace(found.sft, weights={"chats": 1, "other": 1}))
    directory = build("sft_data", found)
    with pytest.raises(UserError, match="weights names other, but no training conversations are left of it"):
        task_of(found, directory)
