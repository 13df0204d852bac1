"""Conversations as rows: what the files hold, what is counted, which split, and what a batch is."""

import hashlib
import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import configs
import sft.data
import stage
from cli import UserError
from configs import Experiment
from data.holdout import split_hash
from data.sources import Files
from finetune import Base
from model import IGNORED
from sft.conversations import Chats, HubChats, Message
from sft.data import ConversationConfig, Item, Rows, best_fit, write
from sft.filters import Filters
from sft.templates import TEMPLATES, render
from sft.train import FineTuning, SFTConfig
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
    return directory, stage.read_manifest(directory)["counts"]


def in_val(question: str) -> bool:
    return split_hash(question.encode()) < 0.2 * 2**64


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


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_files_hold_what_the_template_gives(here: Place, template):
    """A split is decided by the first question alone: two answers to it are on one side."""
    again = [*CHATS, *(pair(each["prompt"], "again") for each in CHATS)]
    directory, counts = made(here, *again, context=160, template=template, filters=ANY)
    for split in ("train", "val"):
        lines = [(i, each) for i, each in enumerate(again, 1) if in_val(each["prompt"]) is (split == "val")]
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
    own_dropped = {"duplicate": 1, "empty_answer": 1, "too_long": 1}
    own_tokens, other_dropped = sum(map(len, every)) - other, {"duplicate": 1, "unreadable": 2}
    assert counts["sources"] == {
        "chats": {"read": 47, "kept": 44, "cut": 0, "tokens": own_tokens, "dropped": own_dropped},
        "other": {"read": 4, "kept": 1, "cut": 0, "tokens": other, "dropped": other_dropped},
    }
    assert sum(len(ids) for ids in every) == counts["train"]["tokens"] + counts["val"]["tokens"]


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


@pytest.mark.parametrize(("split", "held"), [("train", 1), ("val", 4)])
def test_few_conversations_on_one_side_are_divided_by_their_hashes(here: Place, split, held):
    """The question with the smallest hash is held out, or all but the one with the largest if all would be."""
    records = [pair(question(split, i), f"Answer {i}.") for i in range(5)]
    order = sorted(records, key=lambda record: hashlib.sha256(record["prompt"].encode()).digest())
    directory, counts = made(here, *records)
    origins = (directory / "val.txt").read_text().split()
    assert sorted(origins) == sorted(f"chats.jsonl:{records.index(record) + 1}" for record in order[:held])
    assert counts["train"]["conversations"] == 5 - held


def test_conversations_that_begin_alike_are_divided_too(here: Place):
    _, counts = made(here, *(pair("Hi", f"Answer {word}.") for word in WORDS))
    assert counts["train"]["conversations"] + counts["val"]["conversations"] == len(WORDS)
    assert counts["val"]["conversations"] >= 1


def test_a_single_conversation_is_one_clear_error(here: Place):
    with pytest.raises(UserError, match="conversations that are left: 1; expected at least 2"):
        made(here, CHATS[0], CHATS[0], pair("Say nothing.", ""))
    with pytest.raises(UserError, match=r"left: 0; .* context_length; the log counts what each drops"):
        made(here, *CHATS, context=8)
    assert stage.read_manifest(here.runs / "mini/sft_data") is None


def test_a_question_that_most_conversations_begin_with_is_a_warning_if_it_is_held_out(here: Place, caplog):
    made(here, *(pair(HELD["prompt"], word) for word in WORDS), pair(question("train"), "yes"), filters=ANY)
    assert "92% of the conversations are held out, not 20%: many" in caplog.text
    caplog.clear()
    made(here, *CHATS, filters=ANY)
    assert not caplog.records


def test_the_same_bytes_are_made_again_and_another_config_and_other_data_are_refused(here: Place):
    directory, counts = made(here)
    written = {path.name: path.read_bytes() for path in directory.iterdir() if path.name not in (".lock", "log.txt")}
    names = {f"{split}.{end}" for split in ("train", "val") for end in ("bin", "mask", "idx", "rows", "txt")}
    assert set(written) == {"manifest.json"} | names
    shutil.rmtree(directory)
    for _ in range(2):
        build("sft_data", described(here), workers=3)
        assert written == {name: (directory / name).read_bytes() for name in written}
    with pytest.raises(UserError, match=r"sft_data\.filters.max_chars was 50000, is now 99.*--force-from sft_data"):
        build("sft_data", described(here, filters=Filters(max_chars=99)))
    write_lines(here.raw / "chats.jsonl", CHATS[1:])
    with pytest.raises(UserError, match=r"was made from something else: .*chats\.jsonl was"):
        build("sft_data", described(here))
    (here.raw / "chats.jsonl").unlink()  # without its raw files a finished directory stands
    assert build("sft_data", described(here)) == directory
    assert (directory / "manifest.json").read_bytes() == written["manifest.json"]
    digest = described(here).load_tokenizer().sha256
    assert sft.data.load(directory, digest) == counts
    with pytest.raises(UserError, match=r"was made with another tokenizer; make it again with: .* sft_data --force"):
        sft.data.load(directory, "0" * 64)


IMPOSSIBLE = [("sources", sources) for sources in ((), (Chats(paths=("a",)),) * 2, (Files(paths=("a",)),))]
IMPOSSIBLE += [("sources", (HubChats(dataset="x", format="vicuna"),)), ("template", "llama"), ("too_long", "split")]
IMPOSSIBLE += [("val_fraction", 0.0), ("val_fraction", float("nan"))]


@pytest.mark.parametrize(("field", "value"), IMPOSSIBLE)
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=f"^{field} "):
        ConversationConfig(**{field: value})


def hand_written(directory: Path, context: int, *talks: tuple[str, list[int], list[int]]) -> dict:
    items = []
    for number, (source, ids, mask) in enumerate(talks):
        arrays = np.array(ids, dtype="<u2"), np.array(mask, dtype=np.uint8)
        items.append(Item(source, f"line\n{number}", source, [], *arrays, cut=False))
    return {"dtype": "<u2", "train": write(directory, "train", items, ["x", "y"], context)}


def test_a_row_by_hand(tmp_path):
    """Two conversations and a filling: shifted once, by one; what is asked, and what is not there, is not trained."""
    talks = [("y", [1, 2, 3, 4], [0, 0, 1, 1]), ("x", [1, 9], [0, 1]), ("x", [1, 5, 6, 7, 8], [0, 0, 1, 0, 1])]
    counts = hand_written(tmp_path, 6, *talks)
    rows = Rows(tmp_path, "train", counts, 6)
    inputs, targets, positions = rows.read([0, 1])
    no = -100
    assert inputs.tolist() == [[1, 5, 6, 7, 1, 0], [1, 2, 3, 0, 0, 0]]
    assert targets.tolist() == [[no, 6, no, 8, 9, no], [no, 3, 4, no, no, no]]
    assert positions.tolist() == [[0, 1, 2, 3, 0, 0], [0, 1, 2, 0, 1, 2]]
    assert {t.dtype for t in (inputs, targets, positions)} == {torch.int64}
    assert (tmp_path / "train.txt").read_text() == "line 2\nline 1\nline 0\n"
    assert counts["train"]["packing_efficiency"] == 8 / 12
    for number, source in enumerate("xy"):
        part = Rows(tmp_path, "train", counts, 6, source=source)
        assert part.count == 1
        assert part.documents(0) == rows.documents(number)
        assert equal(part.read([0]), rows.read([number]))


def room(lengths: list[int], capacity: int, rows: list[list[int]]) -> list[int]:
    return [capacity - sum(lengths[i] for i in row) for row in rows]


@given(st.lists(st.integers(1, 30), max_size=80), st.integers(30, 60))
def test_rows_are_those_of_best_fit_by_its_definition(lengths, capacity):
    """Every text once, no row too full, as many rows with as much room left. Of rows with equal room any will do."""
    expected = []  # looks at every row for every text
    for text in sorted(range(len(lengths)), key=lambda text: (-lengths[text], text)):
        left = room(lengths, capacity, expected)
        fits = [i for i in range(len(expected)) if left[i] >= lengths[text]]
        if fits:
            expected[min(fits, key=left.__getitem__)].append(text)
        else:
            expected.append([text])
    rows = best_fit(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert min(room(lengths, capacity, rows), default=0) >= 0
    assert sorted(room(lengths, capacity, rows)) == sorted(room(lengths, capacity, expected))


def task_of(place: Place, seed: int = 0, **weights: float) -> Task:
    """The task of learning two sources by weight."""
    write_lines(place.raw / "other.jsonl", [pair(question("train", i), "other") for i in range(40)])
    sources = (Chats(paths=("chats.jsonl",)), Chats(name="other", paths=("other.jsonl",)))
    experiment = described(place, sources=sources, filters=ANY)
    training = replace(experiment.sft.train, micro_batch_size=1, seed=seed)
    tuning = replace(experiment.sft, train=training, weights=weights)
    directory, spm = build("sft_data", replace(experiment, sft=tuning)), experiment.load_tokenizer()
    counts = sft.data.load(directory, spm.sha256)
    base = Base(place.runs / "mini/pretrain/final", experiment.model, None, place.runs / "mini/packed")
    return FineTuning(tuning, base, directory, counts, spm)


def equal(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return all(map(torch.equal, a, b))


def test_a_batch_is_a_pure_function_of_seed_and_step(here: Place):
    task, other = (task_of(here, chats=2, other=1) for _ in range(2))
    batches = [task.batch(step, 0, 1) for step in range(12)]
    for step in (11, 3, 0, 7):
        assert equal(other.batch(step, 0, 1), batches[step])
        for ranks in (2, 4):
            parts = [task.batch(step, rank, ranks) for rank in range(ranks)]
            assert equal(tuple(torch.cat(column) for column in zip(*parts, strict=True)), batches[step])
        assert batches[step][-1].tolist() == list(range(4 * step, 4 * step + 4))  # the numbers that dropout follows
    another = task_of(here, seed=1, chats=2, other=1)
    assert not all(equal(another.batch(step, 0, 1), batches[step]) for step in range(3))


def test_packed_text_is_mixed_in_by_weight(here: Place):
    here.make("pack")
    task, length = task_of(here, chats=3, pretraining=1), 64
    packed = np.fromfile(here.runs / "mini/packed/train.bin", "<u2").astype(np.int64)
    starts = {tuple(packed[start : start + length]): start for start in range(0, len(packed) - length, length)}
    plain = 0
    for step in range(8):
        for tokens, targets, positions, _ in zip(*task.batch(step, 0, 1), strict=True):
            if IGNORED not in targets:  # in a conversation, the question is
                plain += 1
                start = starts[tuple(tokens.tolist())]
                assert targets.tolist() == packed[start + 1 : start + length + 1].tolist()
                assert positions.tolist() == list(range(length))
    assert plain == 8 * 4 / 4
    assert task.epoch == round(task.sets["chats"].count * 4 / 3) / 4  # a pass over the conversations
    experiment = configs.load(here.config)
    assert "pack" not in [need for _, need in experiment.inputs("sft")]
    mixed = replace(experiment, sft=replace(experiment.sft, weights={"chats": 3, "pretraining": 1}))
    assert "pack" in [need for _, need in mixed.inputs("sft")]


def test_weights_name_sources_that_have_rows(here: Place):
    with pytest.raises(ValueError, match="weights names others; there are chats, other, pretraining"):
        task_of(here, chats=1, others=1)
    with pytest.raises(ValueError, match="weights are"):
        task_of(here, chats=0)
    with pytest.raises(ValueError, match="weights names only pretraining, the packed text; expected a source of conv"):
        task_of(here, pretraining=1)
    with pytest.raises(ValueError, match="a source has the name pretraining, which in weights means the packed text"):
        SFTConfig(data=ConversationConfig(sources=(Chats(name="pretraining", paths=("a.jsonl",)),)))
    write_lines(here.raw / "chats.jsonl", [HELD])
    with pytest.raises(UserError, match="weights names chats, but no training conversations of this source are left"):
        task_of(here, chats=1, other=1)
