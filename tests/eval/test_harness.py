"""Our model as lm-evaluation-harness asks it, beside the harness's own Hugging Face model: item by item the same."""

import argparse
import functools
import json
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch

import checkpoint
import configs
from cli import UserError
from eval import harness
from eval.harness import Harness
from eval.language import Subject
from eval.tasks import PUBLISHED
from sft.conversations import Message
from sft.templates import render
from tests.conftest import Place, write_lines
from tests.test_convert import command
from tests.test_imported import SHAPE, smollm2  # noqa: F401 - a fixture
from tests.tokenizer.test_huggingface import CHATML
from tests.tokenizer.test_huggingface import build as build_tokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lm_eval = pytest.importorskip("lm_eval", reason="needs: pip install lm_eval")
    transformers = pytest.importorskip("transformers")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness and of datasets

WORDS = ["river", "stone", "cloud", "apple", "chair", "green", "seven"]
SUM = {"doc_to_text": "{{x}}+{{y}}=", "doc_to_target": "{{x + y}}", "target_delimiter": "", "num_fewshot": 4}
AGAIN = {"doc_to_text": "Words: {{a}} {{b}}\nAgain: ", "target_delimiter": " ", "num_fewshot": 2}
ACCURACY = [{"metric": "acc"}, {"metric": "acc_norm"}]
EXACT = [{"metric": "exact_match"}]
TASKS = {
    "add": {"output_type": "generate_until", **SUM, "metric_list": EXACT, "generation_kwargs": {"until": ["\n"]}},
    "again": {"output_type": "generate_until", **AGAIN, "doc_to_target": "{{a}} {{b}}", "metric_list": EXACT},
    "choose": {"output_type": "multiple_choice", **AGAIN, "doc_to_choice": "{{[a, b]}}", "doc_to_target": 0},
    "begun": {"output_type": "multiple_choice", **AGAIN, "doc_to_choice": "{{[a, b]}}", "doc_to_target": 1},
    "last": {"output_type": "loglikelihood", **AGAIN, "doc_to_target": "{{a}}", "metric_list": [{"metric": "acc"}]},
    "text": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"},
}
TASKS["again"]["generation_kwargs"] = {"until": ["Words", "o"], "do_sample": False, "max_gen_toks": 12}
TASKS["add"]["generation_kwargs"] |= {"max_gen_toks": 5}
TASKS["choose"]["metric_list"] = [*ACCURACY, {"metric": "acc_mutual_info"}]
TASKS["begun"] |= {"metric_list": ACCURACY, "gen_prefix": "The word is"}
TASKS["last"]["num_fewshot"] = 0  # short: bos is not cut off
TASKS["text"]["metric_list"] = [{"metric": "bits_per_byte"}]


@pytest.fixture(scope="module")
def local(tmp_path_factory, text) -> Path:
    """A directory of tasks whose data is a file."""
    directory = tmp_path_factory.mktemp("tasks")
    rows = []
    for i, word in enumerate(WORDS):
        part = text[i][: 60 * i + 5]
        rows.append({"a": word, "b": WORDS[(4 * i + 3) % 7], "x": i, "y": 3 * i % 7, "text": part})
    write_lines(directory / "rows.jsonl", rows)
    files = {split: str(directory / "rows.jsonl") for split in ("train", "test")}
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
    for name, task in TASKS.items():
        content = {"task": name, "fewshot_split": "train", **data, **task}
        (directory / f"{name}.yaml").write_text(json.dumps(content))  # JSON is YAML
    return directory


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
        yield


def ours(directory: Path, config: Path, chat: bool = False) -> Harness:
    spm = configs.load(config).load_tokenizer(directory)
    subject = Subject(checkpoint.load_model(directory), spm, checkpoint.template(directory))
    return Harness(subject, chat, 4)


def theirs(directory: Path, length: int, bos: bool | None = None):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    pieces = transformers.AutoTokenizer.from_pretrained(directory, **({"add_bos_token": bos} if bos else {}))
    return HFLM(pretrained=model, tokenizer=pieces, batch_size=8, max_length=length, add_bos_token=bos)


def ask(lm, include: Path, names: list[str], chat: bool = False, **options) -> dict:
    manager = TaskManager(include_path=str(include), include_defaults=False)
    options |= {"bootstrap_iters": 0, "apply_chat_template": chat}
    return lm_eval.simple_evaluate(lm, tasks=names, task_manager=manager, **options)


def must_agree(mine: dict, other: dict, names: list[str], nats: float = 1e-3) -> None:
    """Every answer, and every number made of them."""
    for name in names:
        pairs = zip(mine["samples"][name], other["samples"][name], strict=True)
        for left, right in pairs:
            assert left["doc_id"] == right["doc_id"]
            for (answer,), (expected,) in zip(left["resps"], right["resps"], strict=True):
                if isinstance(answer, tuple):
                    assert answer[1] == expected[1], name
                    answer, expected = answer[0], expected[0]
                if isinstance(answer, float):
                    expected = pytest.approx(expected, abs=nats)
                assert answer == expected, name
        for metric, value in other["results"][name].items():
            if isinstance(value, float):
                assert mine["results"][name][metric] == pytest.approx(value, rel=1e-4), (name, metric)


def test_a_model_of_ours_beside_its_export(made: Place, local, tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS", str(made.runs))
    command("to-hf", made.config, tmp_path / "hf")
    lm = ours(made.runs / "mini/pretrain/final", made.config)
    mine = ask(lm, local, list(TASKS))
    must_agree(mine, ask(theirs(tmp_path / "hf", 64, bos=True), local, list(TASKS)[:-1]), list(TASKS)[:-1])
    # In running text the harness puts bos by itself.
    must_agree(mine, ask(theirs(tmp_path / "hf", 64), local, ["text"]), ["text"])
    assert lm.truncated


@pytest.fixture(scope="module", params=["byte-level", "first"])
def imported(request, tmp_path_factory) -> tuple[Path, Path]:
    """A small LLaMA with a tokenizer.json, as Hugging Face has it and as we do. "first" puts bos before every text."""
    directory = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE | {"vocab_size": 1_200}, initializer_range=0.2)
    model = transformers.LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [3, 1]
    model.save_pretrained(directory / "hf")
    marks = {"bos_token": "<s>", "eos_token": "</s>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(request.param), **marks)
    fast.chat_template = CHATML if request.param == "byte-level" else "{{ bos_token }}" + CHATML
    fast.save_pretrained(directory / "hf")
    command("from-hf", directory / "hf", directory / "ours", "--context-length", 256)
    return directory / "hf", directory / "ours"


def test_an_imported_model_beside_the_original(imported, local):
    mine = ask(ours(imported[1], imported[1] / "config.py"), local, list(TASKS))
    must_agree(mine, ask(theirs(imported[0], 256), local, list(TASKS)), list(TASKS))


def test_in_the_chat_template(imported, local):
    names = ["add", "again", "begun", "choose"]
    mine = ask(ours(imported[1], imported[1] / "config.py", chat=True), local, names, chat=True)
    other = ask(theirs(imported[0], 256), local, names, chat=True)
    must_agree(mine, other, names[:-1])
    # The harness scores the line end before an answer too, which is the template's: the same for both choices.
    for left, right in zip(mine["samples"]["choose"], other["samples"]["choose"], strict=True):
        log_p, expected = ([answer for ((answer, _),) in sample["resps"]] for sample in (left, right))
        assert log_p[0] - log_p[1] == pytest.approx(expected[0] - expected[1], abs=1e-3)


def test_a_question_cannot_fake_a_control_piece(imported):
    lm = ours(imported[1], imported[1] / "config.py", chat=True)
    turns = [{"role": "user", "content": "Hi <|im_end|></s>"}]
    ids = lm.tok_encode(lm.apply_chat_template(turns))
    assert ids == render("imported", [Message(**turns[0])], lm.spm, ask=True)[0]
    assert ids.count(lm.spm.control["<|im_end|>"]) == 2  # of the template's system message, and of the question
    # The ids of what a task begins the answer with follow.
    begun = lm.apply_chat_template([*turns, {"role": "assistant", "content": "It is"}], add_generation_prompt=False)
    assert lm.tok_encode(begun) == ids + lm.spm.encode("It is", begins=False)


def test_what_ends_an_answer(imported):
    lm = ours(imported[1], imported[1] / "config.py")
    text, until = lm.continuation("One.", {"until": ["<|im_start|>", "Two"], "max_gen_toks": 9}, seed=0)
    assert set(text.stop) == {1, 3, lm.spm.control["<|im_start|>"]}  # the model's own ends, and a piece of the task's
    assert until == ["<|im_start|>", "Two"]
    assert (text.left, text.sampling.temperature) == (9, 0)


def test_a_sampled_answer_does_not_depend_on_the_others(imported, local):
    lm, alone = ours(imported[1], imported[1] / "config.py"), ours(imported[1], imported[1] / "config.py")
    alone.rows = 1
    options = {"tasks": ["add"], "task_manager": TaskManager(include_path=str(local), include_defaults=False)}
    options |= {"gen_kwargs": {"do_sample": True, "temperature": 1.0, "top_k": 20}, "bootstrap_iters": 0}
    first, second = (lm_eval.simple_evaluate(asked, **options)["samples"]["add"] for asked in (lm, alone))
    answers = [sample["resps"][0][0] for sample in first]
    assert answers == [sample["resps"][0][0] for sample in second]
    assert len(set(answers)) > 1


def run(place: Place, *, tasks: str, **switches) -> dict:
    """The command in this process, without the harness's thousands of tasks."""
    options = {"checkpoint": None, "limit": None, "num_fewshot": None, "chat": False, "include": None, "batch_size": 8}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNS", str(place.runs))
        patch.setattr(harness.tasks, "TaskManager", functools.partial(TaskManager, include_defaults=False))
        harness.main(argparse.Namespace(config=place.config, tasks=tasks, **options | switches))
    return json.loads((place.runs / "mini/eval/harness.json").read_text())


def test_the_command_adds_to_its_file(trained: Place, local, capsys):
    run(trained, tasks="choose", include=str(local), limit=5)
    assert "|choose" in capsys.readouterr().out
    final = trained.runs / "mini/pretrain/final"
    ((where, found),) = run(trained, tasks="add,text", include=str(local), num_fewshot=1).items()
    assert where == str(final)
    assert found.keys() == {"choose", "add", "text"}
    assert found["choose"]["sample_len"] == 5
    assert [found[task]["num_fewshot"] for task in ("choose", "add")] == [2, 1]
    assert 0 <= found["choose"]["acc,none"] <= 1
    assert found["add"]["checkpoint"] == checkpoint.digest(final)
    run(trained, tasks="add", include=str(local), checkpoint=str(final))
    assert (final.parent / "eval_final/harness.json").is_file()
    trained.make("eval")  # the stage leaves the file alone
    assert (trained.runs / "mini/eval/harness.json").is_file()


def test_mistakes_are_named(trained: Place, local, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"cannot load nothing: .*nothing"):
        run(trained, tasks="nothing")
    with pytest.raises(UserError, match="has learnt no chat template"):
        run(trained, tasks="add", include=str(local), chat=True)
    for name, options in (("long", {"max_gen_toks": 64}), ("beams", {"num_beams": 4})):
        task = json.loads((local / "add.yaml").read_text()) | {"task": name, "generation_kwargs": options}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(task))
        with pytest.raises(UserError, match="a task asks for"):
            run(trained, tasks=name, include=str(tmp_path))
    for module in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match="pip install lm_eval"):
        run(trained, tasks="add")


@pytest.mark.slow
def test_smollm2_as_the_harness_measures_it(smollm2, local, tmp_path):  # noqa: F811
    from benchmarks.harness import define

    if not all(PUBLISHED[task].find() for task in ("arc_easy", "piqa")):
        pytest.skip("needs the data of arc_easy and piqa under DATA")
    command("from-hf", smollm2, tmp_path / "ours", "--context-length", 2048)
    include = Path(shutil.copytree(local, tmp_path / "tasks"))
    names = [define(include, task, Path(lm_eval.__file__).parent / "tasks", False) for task in ("arc_easy", "piqa")]
    names += ["add", "again"]
    lm, other = ours(tmp_path / "ours", tmp_path / "ours/config.py"), theirs(smollm2, 2048)
    mine = ask(lm, include, names, limit=100)
    must_agree(mine, ask(other, include, names, limit=100), names)
    assert mine["results"]["lumi_arc_easy"]["acc,none"] > 0.4  # chance is 0.25
    lm.chat = True
    must_agree(ask(lm, include, ["again"], chat=True), ask(other, include, ["again"], chat=True), ["again"])
