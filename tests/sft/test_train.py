"""Fine-tuning: what is trained and saved, what the base keeps, and that a run survives being killed."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers

import checkpoint
import configs
import finetune
import generate
import sft.data
import stage
import tokenizer
import trainer
from cli import UserError
from finetune import Base
from lora import LoRAConfig
from model import ModelConfig, Transformer
from optim import learning_rate
from sft import templates
from sft.conversations import Message
from sft.data import Rows
from sft.train import FineTuning
from stage import Stage
from tests.conftest import CHATS, PREFERENCES, ROOT, Place, write_lines
from tests.test_train import digest, tree
from trainer import TrainConfig


class Crash(Exception):
    """Ends a run in this process as a kill would: nothing more is saved."""


def tuned(place: Place, crash: int | None = None, name: str = "sft", **options) -> None:
    """Trains as the command does, in this process; crashes in the n-th forward pass."""
    calls, forward = itertools.count(1), Transformer.forward

    def counting(*inputs, **named):
        if next(calls) == crash:
            raise Crash
        return forward(*inputs, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transformer, "forward", counting)
        place.make(name, **options)


@pytest.fixture
def ready(tuned: Place) -> Place:
    """A copy of `fine_tuned` that has its rows of conversations, and is not fine-tuned."""
    shutil.rmtree(tuned.runs / "mini/sft")
    return tuned


def assert_same_run(place: Place, other: Place, name: str, checkpoints: tuple[str, ...]) -> None:
    """The same bytes of the adapter and of everything that resuming needs, and the same log."""
    for path in checkpoints:
        for file in ("adapter.pt", "state.pt"):
            ours, theirs = (p.runs / "mini" / name / path / file for p in (place, other))
            assert digest(ours) == digest(theirs), (path, file)
    assert place.metrics(name) == other.metrics(name)


def test_only_the_adapter_is_trained_and_saved(fine_tuned: Place, made: Place):
    directory, base = fine_tuned.runs / "mini/sft", fine_tuned.runs / "mini/pretrain"
    assert {p.name for p in directory.iterdir() if p.is_dir()} == {"final", "best", "step_0000006", "step_0000009"}
    for name in ("final", "best", "step_0000006"):
        assert {p.name for p in (directory / name).iterdir()} == {"adapter.pt", "state.pt", "manifest.json"}
        adapter = checkpoint.read(directory / name, "adapter.pt")
        assert len(adapter) == 2 * (2 * 7 + 1)  # A and B of seven projections in two blocks, and of the head
        assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
        assert all(tensor.abs().sum() > 0 for tensor in adapter.values())
    assert tree(base) == tree(made.runs / "mini/pretrain")
    before = tree(directory)
    tuned(fine_tuned)  # is up to date
    assert tree(directory) == before


def test_the_run_logs_what_it_should(fine_tuned: Place):
    log = fine_tuned.metrics("sft")
    assert [m["step"] for m in log] == list(range(1, 11))
    assert [m["step"] for m in log if "val_loss" in m] == [4, 8, 10]
    assert log[-1]["val_loss"] < log[3]["val_loss"] < log[0]["loss"]
    config = configs.load(fine_tuned.config).sft.train
    by_hand = replace(config, warmup_fraction=None, warmup_steps=2)
    assert [m["lr"] for m in log] == pytest.approx([learning_rate(by_hand, step, 10) for step in range(10)])
    for text in (fine_tuned.output, (fine_tuned.runs / "mini/sft/log.txt").read_text()):
        assert text.count("asked: ") == text.count("said:  ") == 3 * 2  # the same two questions at each evaluation
        assert len(set(re.findall("asked: .*", text))) == 2


def test_the_validation_loss_is_that_of_every_held_out_token(fine_tuned: Place):
    """Conversation by conversation, without packing, by the model that is loaded."""
    directory = fine_tuned.runs / "mini/sft_data"
    counts = stage.read_manifest(directory)["counts"]
    assert counts["val"]["conversations"] > counts["val"]["rows"] >= 2
    rows, nats = Rows(directory, "val", counts, 64), 0.0
    model = checkpoint.load_model(fine_tuned.runs / "mini/sft/final")
    for number in range(counts["val"]["conversations"]):
        ids, trained = map(torch.from_numpy, rows.conversation(number))
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none")
        nats += float(losses[trained[1:]].sum())
    assert fine_tuned.metrics("sft")[-1]["val_loss"] == pytest.approx(nats / counts["val"]["trained"], rel=1e-5)


def test_the_end_piece_begins_as_the_end_of_a_text(fine_tuned: Place):
    final, base = (fine_tuned.runs / f"mini/{name}/final" for name in ("sft", "pretrain"))
    pieces = stage.read_manifest(final)["config"]["begin"]
    shape = configs.load(fine_tuned.config).model
    rows, start = checkpoint.load_model(base).head.weight, Base(base, shape, pieces).load().head.weight
    assert (start != rows).any(1).nonzero().flatten().tolist() == [pieces["end"]]
    assert torch.equal(start[pieces["end"]], rows[pieces["eos"]] + (rows[pieces["end"]] - rows[pieces["start"]]))


# A step takes two forward passes, one per micro-batch; an evaluation takes one for two rows, then those of its samples.
@pytest.mark.parametrize("crash", [1, 2 * 3 + 2, 2 * 4 + 5])
def test_killed_and_restarted_equals_uninterrupted(ready: Place, fine_tuned: Place, crash):
    """With dropout, which draws the same numbers in a resumed run."""
    assert configs.load(ready.config).sft.lora.dropout == 0.1
    with pytest.raises(Crash):
        tuned(ready, crash)
    tuned(ready)
    assert_same_run(ready, fine_tuned, "sft", ("final", "best", "step_0000009"))


def test_more_steps_continue_from_the_end_and_another_config_is_refused(tuned: Place):
    tuned.edit(("steps=10", "steps=12"))
    tuned.make("sft")
    assert [m["step"] for m in tuned.metrics("sft")] == list(range(1, 13))
    for before, after, message in (
        ("rank=4", "rank=5", "lora.rank was 4, is now 5"),
        ("warmup_fraction=0.2", "warmup_fraction=0.3", "sft.warmup_fraction was 0.2, is now 0.3"),
    ):
        tuned.edit((before, after))
        with pytest.raises(UserError, match=re.escape(message)):
            tuned.make("sft")
        tuned.edit((after, before))


def test_full_fine_tuning_writes_weights_that_need_no_base(ready: Place, made: Place):
    ready.edit(("lora=LoRAConfig(rank=4, alpha=8.0, dropout=0.1)", "lora=None"))
    tuned(ready)
    final, base = ready.runs / "mini/sft/final", ready.runs / "mini/pretrain"
    assert {p.name for p in final.iterdir()} == {"weights.pt", "state.pt", "manifest.json"}
    before, after = (checkpoint.read(path, "weights.pt") for path in (base / "final", final))
    assert after.keys() == before.keys()
    assert not any(torch.equal(after[name], before[name]) for name in before)
    assert tree(base) == tree(made.runs / "mini/pretrain")
    shutil.rmtree(base)
    checkpoint.load_model(final)
    assert ready.metrics("sft")[-1]["val_loss"] < ready.metrics("sft")[0]["loss"]


def test_without_a_pretrained_model_nothing_is_made(place: Place):
    with pytest.raises(UserError, match=f"train it with: python train.py {place.config}"):
        place.make("sft")
    assert not place.runs.exists()


def test_a_base_from_elsewhere_stays_there_when_runs_move(ready: Place, tmp_path_factory):
    """Also with `runs` as a link. The base is a checkpoint of a step."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.move(ready.runs / "mini/pretrain/step_0000015", elsewhere / "base")
    shutil.rmtree(ready.runs / "mini/pretrain")
    (elsewhere / "deep/er").mkdir(parents=True)
    shutil.move(ready.runs, elsewhere / "deep/er/runs")
    ready.runs.symlink_to(elsewhere / "deep/er/runs")
    final = ready.make("sft", checkpoint=str(elsewhere / "base")) / "final"
    assert checkpoint.base(final) == elsewhere / "base"
    expected = checkpoint.load_model(final).state_dict()
    ready.runs.unlink()
    shutil.move(elsewhere / "deep/er/runs", ready.runs)
    moved = checkpoint.load_model(final).state_dict()
    assert all(torch.equal(moved[name], tensor) for name, tensor in expected.items())
    tuned(ready, checkpoint=str(elsewhere / "base"))  # is up to date
    with pytest.raises(UserError, match="nowhere is not a checkpoint"):
        tuned(ready, checkpoint="nowhere")


@pytest.mark.parametrize(("changes", "fits"), [({"d_ff": 128, "n_kv_heads": 2}, True), ({"d_ff": 96}, False)])
def test_a_base_of_another_shape_is_refused_unless_only_defaults_are_spelled_out(made: Place, changes, fits):
    """As an imported model spells them out."""
    base = Base(made.runs / "mini/pretrain/final", replace(configs.load(made.config).model, **changes), None)
    if fits:
        base.load()
    else:
        with pytest.raises(UserError, match="holds a model of another shape than the config describes"):
            base.load()


def test_unknown_targets_are_refused_before_anything_is_made(place: Place):
    place.edit(("LoRAConfig(rank=4,", 'LoRAConfig(rank=4, targets=("q", "wq"),'))
    with pytest.raises(UserError, match="targets names 'wq'; TARGETS in lora"):
        configs.load(place.config)


def test_exported_it_is_the_same_model_with_the_same_template(fine_tuned: Place, tmp_path):
    fine_tuned.run("convert.py", "to-hf", fine_tuned.config, tmp_path / "hf")
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    spm = tokenizer.load(fine_tuned.runs / "mini/tokenizer")
    messages = [Message("user", 'Say "a"\n(b).'), Message("assistant", '"a"\n(b)')]
    ids = templates.render("chatml", messages, spm)[0]
    said = [{"role": message.role, "content": message.content} for message in messages]
    assert theirs.apply_chat_template(said, return_dict=False) == ids
    ours = checkpoint.load_model(fine_tuned.runs / "mini/sft/final")
    with torch.no_grad():
        torch.testing.assert_close(hf(torch.tensor([ids])).logits, ours(torch.tensor([ids])), rtol=0, atol=1e-4)


def test_inspect_shows_what_is_trained(preferring: Place):
    """Conversations, and pairs with the chosen and the rejected answer apart."""
    inspect = "-m", "sft.inspect", preferring.config
    out = preferring.run(*inspect, "--rows", 1000).stdout
    shown = re.findall(r"<\|im_start\|>user\n(.*?)<\|im_end\|>\n<\|im_start\|>assistant\n⟦(.*?)<\|im_end\|>⟧", out)
    assert set(shown) <= {(chat["prompt"], chat["response"]) for chat in CHATS}
    assert len(set(shown)) == len(shown) == int(re.search(r"conversations: (\d+)", out)[1])
    out = preferring.run(*inspect, "--pairs", "--split", "val", "--rows", 1000).stdout
    shown = re.findall(r"user\n(.*?)<\|im_end\|>\n.*assistant\n⟦(.*?)<\|im_end\|>⟧⟪(.*?)<\|im_end\|>⟫", out)
    assert set(shown) <= {tuple(pair.values()) for pair in PREFERENCES}
    assert len(set(shown)) == len(shown) == int(re.search(r"pairs: (\d+)", out)[1])
    assert "found --first 1,000" in preferring.run(*inspect, "--first", 1000, status=2).stderr


PAIRS = [(f"What is {a} {b}?", f"{b} {a}") for a, b in itertools.product(("red", "up", "one", "far"), "vwxyz")]


def test_a_few_answers_are_learnt_by_heart(place: Place):
    """20 questions, as they are put when serving."""
    held = {"prompt": "Ask 0.", "response": "Held out."}  # by the hash of its question; the others are trained
    write_lines(place.raw / "chats.jsonl", [held, *({"prompt": q, "response": a} for q, a in PAIRS)])
    rows, spm = place.make("sft_data"), tokenizer.load(place.runs / "mini/tokenizer")
    shape = ModelConfig(vocab_size=512, context_length=64, n_layers=2, d_model=64, n_heads=2)
    config = TrainConfig(steps=200, batch_size=4, learning_rate=4e-3, warmup_fraction=0.1, compile=False,
                         precision="float32", eval_every=200, log_every=1, save_every=200)  # fmt: skip
    adapter = LoRAConfig(rank=16, alpha=32.0, dropout=0.0)
    settings = replace(configs.load(place.config).sft, lora=adapter, train=config)
    torch.manual_seed(0)
    model = Transformer(shape)
    with torch.no_grad():
        model.head.weight.mul_(20), model.embed.weight.mul_(20)  # as far apart as training makes them
    task = FineTuning(settings, Base(place.path, shape, None), rows, sft.data.load(rows, spm.sha256), spm)
    job = Stage(place.path / "out", {"model": shape, "sft": config}, {}, "", stage.__file__)
    with job.making():
        trainer.train(finetune.adapt(model, adapter), task, config, job, "auto")
    log = [json.loads(line) for line in (place.path / "out/metrics.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.1 < 3 < log[0]["loss"]
    prompts = [templates.render("chatml", [Message("user", question)], spm, ask=True)[0] for question, _ in PAIRS]
    stop = templates.ends("chatml", spm)
    answers = generate.generate(model.eval(), prompts, 20, temperature=0, stop=stop)
    assert [spm.decode(ids, begins=False) for ids in answers] == [answer for _, answer in PAIRS]


def with_two(place: Place, name: str = "sft") -> str:
    """Trains a stage in two processes. Returns the output."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "pipeline.py"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(
        [*command, str(place.config), name], cwd=ROOT, env=place.env, text=True, start_new_session=True, **pipes
    )
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("changes", ["", 'parallel="fsdp", ', "full"])
def test_two_processes_train_as_one(fine_tuned: Place, ready: Place, changes):
    """With dropout too: each process draws for its rows what one process draws for them as a micro-batch."""
    if changes == "full":
        ready.edit(("lora=LoRAConfig(rank=4, alpha=8.0, dropout=0.1)", "lora=None"))
        fine_tuned = Place(shutil.copytree(ready.path, ready.path.parent / "alone"))
        tuned(fine_tuned)
    else:
        ready.edit(("deterministic=True", f"{changes}deterministic=True"))
    with_two(ready)
    ours, theirs = ready.metrics("sft"), fine_tuned.metrics("sft")
    for name in ("loss", "grad_norm", "lr", "tokens"):
        assert [m[name] for m in ours] == pytest.approx([m[name] for m in theirs], rel=1e-4), name
    losses = [[m["val_loss"] for m in log if "val_loss" in m] for log in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    ours, theirs = (checkpoint.load_model(p.runs / "mini/sft/final").state_dict() for p in (ready, fine_tuned))
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-3, atol=1e-4)
