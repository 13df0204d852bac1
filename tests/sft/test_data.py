"""Conversations as rows: what the files hold, what is counted, which split, and what a batch is."""

import hashlib
import itertools
import json
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
from data.holdout import held_out
from data.sources import Files
from sft.conversations import Chats, HubChats, Message
from sft.data import ConversationConfig, Item, Rows, write
from sft.filters import Filters
from sft.packing import best_fit
from sft.templates import TEMPLATES, render
from sft.train import FineTuning
from tests.conftest import CHATS, MINI, WORDS, Place, build, write_lines
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


def in_val(question: str) -> bool:
    return held_out(question.encode(), 0.2)


def question(split: str, number: int = 0) -> str:
    """A question that belongs to a split by its hash."""
    questions = (text for n in itertools.count() if in_val(text := f"Ask {n}.") is (split == "val"))
    return next(itertools.islice(questions, number, None))


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


def test_kept_and_dropped_are_counted_by_rule_and_by_source(here: Place):
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


def test_a_split_is_decided_by_the_first_question_alone(here: Place):
    """Of two answers to it both are on one side; and no other conversation has a say."""
    again = [pair(each["prompt"], f"again {i}") for i, each in enumerate(CHATS)]
    directory, _ = made(here, *CHATS, *again, filters=ANY)
    for split in ("train", "val"):
        numbers = {int(line.split(":")[1]) - 1 for line in (directory / f"{split}.txt").read_text().splitlines()}
        assert numbers == {i for i, each in enumerate(CHATS * 2) if in_val(each["prompt"]) is (split == "val")}


def test_a_conversation_too_long_is_cut_and_nothing_false_is_trained(here: Place):
    """Its row ends in the middle of the answer, which has no end there; the last token is only predicted."""
    many = " ".join(f"{n} and" for n in range(60))
    long = pair(question("train"), many)
    whole, trained = rendered(here, long)
    directory, counts = made(here, long, HELD, pair(many, "yes"), context=40, filters=ANY)
    source = counts["sources"]["chats"]
    assert (source["cut"], source["dropped"]) == (1, {"longer_than_context": 1})
    assert ids_and_mask(directory, "train") == [(whole[:41], trained[:41])]
    inputs, targets, positions = Rows(directory, "train", counts, 40).read([0])
    assert inputs[0].tolist() == whole[:40]
    assert positions[0].tolist() == list(range(40))
    assert targets[0].tolist() == [id if yes else -100 for id, yes in zip(whole[1:41], trained[1:41], strict=True)]
    spm = configs.load(here.config).load_tokenizer()
    assert not {spm.eos, *spm.control.values()} & set(targets[0].tolist())
    assert targets[0, -1] == whole[40]


@pytest.mark.parametrize(("too_long", "kept"), [("cut", (3, 1, {})), ("drop", (2, 0, {"longer_than_context": 1}))])
def test_what_just_fits_is_whole(here: Place, too_long, kept):
    """A row of n holds n + 1 ids, the last of which is only predicted."""
    record, shorter = pair(question("train"), "one two three"), pair(question("train", 1), "one")
    whole = rendered(here, record)
    directory, counts = made(here, record, HELD, context=len(whole[0]) - 1, too_long=too_long, filters=ANY)
    assert ids_and_mask(directory, "train") == [whole]
    assert counts["train"]["packing_efficiency"] == 1
    assert counts["sources"]["chats"]["cut"] == 0
    _, counts = made(here, record, shorter, HELD, context=len(whole[0]) - 2, too_long=too_long, filters=ANY)
    assert tuple(counts["sources"]["chats"][name] for name in ("kept", "cut", "dropped")) == kept


def test_reading_stops_at_max_tokens(here: Place):
    lengths = [len(rendered(here, each)[0]) for each in CHATS]
    for most, kept in ((sum(lengths[:20]) + 1, 21), (sum(lengths[:20]), 20)):
        _, counts = made(here, sources=(Chats(paths=("chats.jsonl",), max_tokens=most),))
        source = counts["sources"]["chats"]
        assert (source["read"], source["kept"], source["tokens"]) == (kept, kept, sum(lengths[:kept]))


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("count", [2, 5])
def test_few_conversations_on_one_side_are_divided_by_their_hashes(here: Place, split, count):
    """The question with the smallest hash is held out, or all but the one with the largest if all would be."""
    records = [pair(question(split, i), f"Answer {i}.") for i in range(count)]
    order = sorted(records, key=lambda record: hashlib.sha256(record["prompt"].encode()).digest())
    directory, counts = made(here, *records)
    held = 1 if split == "train" else count - 1
    origins = (directory / "val.txt").read_text().split()
    assert sorted(origins) == sorted(f"chats.jsonl:{records.index(record) + 1}" for record in order[:held])
    assert counts["train"]["conversations"] == count - held


def test_conversations_that_begin_alike_are_divided_too(here: Place):
    _, counts = made(here, *(pair("Hi", f"Answer {word}.") for word in WORDS))
    assert counts["train"]["conversations"] + counts["val"]["conversations"] == len(WORDS)
    assert counts["val"]["conversations"] >= 1


def test_a_single_conversation_is_one_clear_error(here: Place):
    with pytest.raises(UserError, match=r"^1 conversations passed the filters; training and validation take at least"):
        made(here, CHATS[0], CHATS[0], pair("Say nothing.", ""))
    assert stage.read_manifest(here.runs / "mini/sft_data") is None


@pytest.mark.parametrize(("long", "warned"), [(5, False), (6, True)])
def test_a_filter_that_drops_more_than_a_third_is_named(here: Place, caplog, long, warned):
    records = [*CHATS[:10], *(pair(f"Say {i}.", f"{i} " + "x" * 100) for i in range(long))]
    with caplog.at_level("WARNING", "lumi"):
        made(here, *records, filters=Filters(max_chars=90))
    assert ("too_long dropped 6 of 16 conversations" in caplog.text) is warned


# ---------------------------------------------------------------------------------------------------- made and finished


def test_the_command_makes_it_once_with_the_same_bytes(here: Place):
    directory, _ = made(here)
    written = {path.name: path.read_bytes() for path in directory.iterdir() if path.name not in (".lock", "log.txt")}
    names = {f"{split}.{end}" for split in ("train", "val") for end in ("bin", "mask", "idx", "rows", "txt")}
    assert set(written) == {"manifest.json"} | names
    shutil.rmtree(directory)
    for _ in range(2):
        build("sft_data", described(here), workers=3)
        assert written == {name: (directory / name).read_bytes() for name in written}


def test_another_config_and_other_conversations_are_refused(here: Place):
    directory, _ = made(here)
    before = (directory / "manifest.json").read_bytes()
    with pytest.raises(UserError, match=r"sft_data\.filters.max_chars was 50000, is now 99.*--force-from sft_data"):
        build("sft_data", described(here, filters=Filters(max_chars=99)))
    with pytest.raises(UserError, match="context_length was 64, is now 48"):
        build("sft_data", described(here, context=48))
    write_lines(here.raw / "chats.jsonl", CHATS[1:])
    with pytest.raises(UserError, match=r"was made from something else: .*chats\.jsonl was"):
        build("sft_data", described(here))
    (here.raw / "chats.jsonl").unlink()  # without its raw files a finished directory stands
    assert build("sft_data", described(here)) == directory
    assert (directory / "manifest.json").read_bytes() == before
    with pytest.raises(UserError, match=r"no file at .*chats\.jsonl"):
        build("sft_data", described(here), force=True)


def test_damage_and_another_tokenizer_are_named(here: Place):
    directory, counts = made(here)
    digest = described(here).load_tokenizer().sha256
    assert sft.data.load(directory, digest) == counts
    with pytest.raises(
        UserError,
        match=r"was made with another tokenizer; make it again with: .* sft_data --force",
    ):
        sft.data.load(directory, "0" * 64)
    with pytest.raises(UserError, match=r"nowhere is missing or unfinished; make it with: python pipeline\.py"):
        sft.data.load(here.path / "nowhere", "0" * 64)
    content = bytearray((directory / "val.mask").read_bytes())
    content[-1] ^= 1
    (directory / "val.mask").write_bytes(content)
    with pytest.raises(UserError, match=r"val\.mask has SHA-256 .*python pipeline.py .* sft_data --force"):
        sft.data.load(directory, digest)


@pytest.mark.parametrize(
    ("error", "changes"),
    [
        (ValueError, {"sources": ()}),
        (ValueError, {"sources": (Chats(paths=("a",)), Chats(paths=("b",)))}),
        (ValueError, {"sources": (Files(paths=("a",)),)}),
        (ValueError, {"template": "llama"}),
        (ValueError, {"too_long": "split"}),
        (ValueError, {"sources": (HubChats(dataset="x", format="vicuna"),)}),
        (ValueError, {"val_fraction": 0.0}),
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
    items = []
    for number, (ids, mask) in enumerate(talks):
        arrays = np.array(ids, dtype="<u2"), np.array(mask, dtype=np.uint8)
        items.append(Item("x", f"line\n{number}", "x", [], *arrays, cut=False))
    return {"dtype": "<u2", "train": write(directory, "train", items, ["x"], context)}


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


def task_of(place: Place, batch_size: int = 4, seed: int = 0, **weights: float) -> tuple[Task, Path]:
    """The task of learning two sources by weight, and the directory of the data."""
    write_lines(place.raw / "other.jsonl", [pair(question("train", i), "other") for i in range(40)])
    sources = (Chats(paths=("chats.jsonl",)), Chats(name="other", paths=("other.jsonl",)))
    experiment = described(place, sources=sources, filters=ANY)
    training = replace(experiment.sft.train, batch_size=batch_size, micro_batch_size=1, seed=seed)
    tuning = replace(experiment.sft, train=training, weights=weights)
    directory, spm = build("sft_data", replace(experiment, sft=tuning)), experiment.load_tokenizer()
    counts = sft.data.load(directory, spm.sha256)
    return FineTuning(tuning, experiment.model, directory, counts, spm), directory


def equal(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_batches_follow_the_weights(here: Place):
    """Three rows of one source to one of the other, in every batch of four; in those of five, over four batches."""
    task, directory = task_of(here, chats=3.0, other=1.0)
    counts = stage.read_manifest(directory)["counts"]
    whose = {}
    for name in ("chats", "other"):
        rows = Rows(directory, "train", counts, 64, source=name)
        whose |= {tuple(row): name for row in rows.read(range(rows.count))[0].tolist()}
    for step in range(12):
        names = Counter(whose[tuple(row)] for row in task.batch(step, 0, 1)[0].tolist())
        assert names == {"chats": 3, "other": 1}
        assert task.seen(step) == {"chats": 3 * step * 64, "other": step * 64}
    task, _ = task_of(here, batch_size=5, chats=3, other=1)
    names = Counter(whose[tuple(row)] for step in range(4) for row in task.batch(step, 0, 1)[0].tolist())
    assert names == {"chats": 15, "other": 5}


def test_without_weights_every_row_is_seen_once_an_epoch(here: Place):
    task, directory = task_of(here, batch_size=1)
    counts = stage.read_manifest(directory)["counts"]["train"]
    rows = counts["rows"]
    assert task.epoch == rows
    for epoch in range(2):
        seen = [task.batch(epoch * rows + i, 0, 1) for i in range(rows)]
        assert len({tuple(batch[0][0].tolist()) for batch in seen}) == rows
        assert sum(task.targets(*batch) for batch in seen) == counts["trained"]


@pytest.mark.parametrize("weights", [{}, {"chats": 2, "other": 1}])
def test_a_batch_is_a_pure_function_of_seed_and_step(here: Place, weights):
    task, other = task_of(here, **weights)[0], task_of(here, **weights)[0]
    batches = [task.batch(step, 0, 1) for step in range(12)]
    for step in (11, 3, 0, 7):
        assert equal(other.batch(step, 0, 1), batches[step])
        for ranks in (2, 4):
            parts = [task.batch(step, rank, ranks) for rank in range(ranks)]
            assert equal(tuple(torch.cat(column) for column in zip(*parts, strict=True)), batches[step])
        assert batches[step][-1].tolist() == list(range(4 * step, 4 * step + 4))  # the numbers that dropout follows
    another = task_of(here, seed=1, **weights)[0]
    assert not all(equal(another.batch(step, 0, 1), batches[step]) for step in range(3))


def test_weights_name_sources_that_have_rows(here: Place):
    with pytest.raises(ValueError, match="weights names others; expected names of the data's sources"):
        task_of(here, chats=1, others=1)
    with pytest.raises(ValueError, match="weights are"):
        task_of(here, chats=0)
    write_lines(here.raw / "chats.jsonl", [HELD])
    with pytest.raises(UserError, match="weights names chats, but no training conversations are left of it"):
        task_of(here, chats=1, other=1)
