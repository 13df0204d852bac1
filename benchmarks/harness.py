"""Our evaluation beside EleutherAI's lm-evaluation-harness: one model, the same items, task by task and item by item.

    DATA=… python -m benchmarks.harness configs/tiny.py   ->  benchmarks/results/harness.json

The model goes to the harness as `convert.py` exports it. Tasks are the harness's own definitions; only their data is
pointed at the files under DATA. By default the two ask differently, on purpose:

- a text of ours begins, as in training, with the piece that ends documents; the harness puts none before a context;
- the harness puts a space before a sentence of BLiMP, as if it went on with something; we do not.

`as_it_is` is the harness by default. For `alike` its tokenizer puts that piece before a context too, and BLiMP has no
space: then the two must agree to three digits, or the command fails. Needs: pip install "lm-eval[hf]"
"""

import argparse
import json
import logging
import os
import tempfile
import time
from importlib import metadata
from pathlib import Path

import numpy as np

import checkpoint
import cli
import configs
import data.sources
import pipeline
import stage
from benchmarks.common import command, parser, run, write
from benchmarks.evaluation import write_questions
from cli import UserError
from eval import choices, language
from eval.language import Subject
from eval.tasks import PUBLISHED, read

PLAIN = 100  # items a task that the harness is asked as it is
DEFINITIONS = {  # of the harness's tasks
    "wikitext2": "wikitext/wikitext.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "blimp": "blimp/_template_yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
}


def records(task: str, text: str) -> list[dict]:
    """A task's data in the fields that the harness expects of its dataset."""
    if task == "wikitext2":
        return [{"page": page} for page in language.articles(text)]
    found = [json.loads(line) for line in text.split("\n") if line.strip()]
    for record in found:
        if task == "boolq":
            record |= {"question": record["question"].removesuffix("?"), "label": int(record["answer"])}
        if task == "hellaswag" and "activity_label" not in record:
            label, rest = record["ctx"].split(": ", 1)
            record |= {"activity_label": label, "ctx_a": rest, "ctx_b": ""}
    return found


def define(directory: Path, task: str, definitions: Path, alike: bool) -> str:
    """Writes the harness's task with its data replaced by ours, and the data. Returns the task's name."""
    path = directory / f"{task}.jsonl"
    lines = [json.dumps(record) for record in records(task, read(PUBLISHED[task].find()))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    name = f"lumi_{task}"
    definition = {
        "include": str(definitions / DEFINITIONS[task]),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(path) for split in ("train", "validation", "test")}},
    }
    if task == "blimp" and alike:
        definition["target_delimiter"] = ""
    (directory / f"{name}.yaml").write_text(json.dumps(definition), encoding="utf-8")  # JSON is YAML
    return name


def harness(exported: Path, tasks: list[str], alike: bool, length: int, limit: int | None) -> dict[str, dict]:
    """What the harness finds, by task: `results`, `seconds`, and `samples`, an item each."""
    import lm_eval
    import transformers
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from tokenizers.processors import TemplateProcessing

    model = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype="float32")
    found = {}
    for task in tasks:
        # Where there is no context, and in running text, the harness puts the piece first by itself.
        bos = alike and task not in ("wikitext2", "blimp")
        pieces = transformers.AutoTokenizer.from_pretrained(exported)
        if bos:
            token = pieces.bos_token
            pieces.backend_tokenizer.post_processor = TemplateProcessing(
                single=f"{token} $A", special_tokens=[(token, pieces.bos_token_id)]
            )
        most = max(1, limit // 15) if limit and task == "wikitext2" else limit  # an article has thousands of tokens
        lm = HFLM(pretrained=model, tokenizer=pieces, batch_size=8, max_length=length, add_bos_token=bos)
        with tempfile.TemporaryDirectory() as directory:
            name = define(Path(directory), task, Path(lm_eval.__file__).parent / "tasks", alike)
            manager = TaskManager(include_path=directory, include_defaults=False)
            started = time.perf_counter()
            out = lm_eval.simple_evaluate(
                lm, tasks=[name], task_manager=manager, limit=most, bootstrap_iters=0, log_samples=True
            )
        found[task] = {
            "seconds": round(time.perf_counter() - started, 1),
            "results": {k.removesuffix(",none"): v for k, v in out["results"][name].items() if k.endswith(",none")},
            "samples": sorted(out["samples"][name], key=lambda sample: sample["doc_id"]),
        }
    return found


def compare(task: str, model, spm, theirs: dict) -> dict:
    """Ours and theirs on one task, and how far they are apart."""
    started = time.perf_counter()
    published, path = PUBLISHED[task], PUBLISHED[task].find()
    if task == "wikitext2":
        articles = language.articles(published.load(path))[: len(theirs["samples"])]
        ours = language.wikitext2(Subject(model, spm), "".join(articles))
        names = {"word_perplexity": "word_perplexity", "byte_perplexity": "byte_perplexity"}
        names["bits_per_byte"] = "bits_per_byte"
        items = {"items": len(theirs["samples"])}
    else:
        questions = published.load(path)[: len(theirs["samples"])]
        scores, _ = choices.score(Subject(model, spm), questions, task)
        ours = choices.summary(questions, scores, published.majority)
        names = {"accuracy": "acc"} | ({"accuracy_norm": "acc_norm"} if "acc_norm" in theirs["results"] else {})
        likelihoods = [[float(choice[0][0]) for choice in sample["resps"]] for sample in theirs["samples"]]
        answers = [int(np.argmax(own)) for own in scores]
        items = {
            "items": len(questions),
            "other_answers": sum(a != int(np.argmax(b)) for a, b in zip(answers, likelihoods, strict=True)),
            "largest_difference_in_nats": max(
                float(np.abs(own - np.array(b)).max()) for own, b in zip(scores, likelihoods, strict=True)
            ),
            "ties": ours["ties"],
        }
    seconds = time.perf_counter() - started
    return {
        **{name: {"ours": ours[name], "harness": theirs["results"][other]} for name, other in names.items()},
        **items,
        "seconds": {"ours": round(seconds, 1), "harness": theirs["seconds"]},
    }


def export(config: str, checkpoint: Path, out: Path) -> None:
    """Writes the model as convert.py exports it."""
    process = command("convert.py", "to-hf", config, "--checkpoint", str(checkpoint), str(out))
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the export ended with status {process.exitcode}; its error stands above")


def apart(alike: dict) -> list[str]:
    """Prints both numbers of each metric, and returns the metrics that differ in the first three digits."""
    found = []
    for task, each in alike.items():
        for name, pair in each.items():
            if isinstance(pair, dict) and name != "seconds":
                print(f"{task:<11} {name:<16} ours {pair['ours']:.6g}  lm-eval {pair['harness']:.6g}")
                if abs(pair["ours"] - pair["harness"]) > 5e-4 * max(1.0, abs(pair["harness"])):
                    found.append(f"{name} of {task}")
    return found


def main(arguments: argparse.Namespace) -> None:
    cli.extra("lm_eval", '"lm-eval[hf]"', "the comparison with lm-evaluation-harness")
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    if arguments.quick:
        write_questions(data.sources.raw())
        pipeline.main(pipeline.parser().parse_args([arguments.config, "pretrain"]))
    experiment, limit = configs.load(arguments.config), arguments.limit
    final = Path(arguments.checkpoint) if arguments.checkpoint else experiment.trained("pretrain")
    tasks = [task for task in PUBLISHED if PUBLISHED[task].find()]
    logging.getLogger("lm_eval").setLevel("ERROR")
    with tempfile.TemporaryDirectory() as directory:
        exported = Path(directory) / "hf"
        export(arguments.config, final, exported)
        spm, model = experiment.load_tokenizer(final), checkpoint.load_model(final)
        os.environ["HF_DATASETS_CACHE"] = str(Path(directory) / "cache")
        length = model.config.context_length
        alike = harness(exported, tasks, True, length, limit)
        asked = [task for task in tasks if task != "wikitext2"]
        plain = harness(exported, asked, False, length, min(limit or PLAIN, PLAIN))
    found = {
        "versions": stage.versions() | {package: metadata.version(package) for package in ("lm-eval", "transformers")},
        "parameters": model.num_parameters(),
        "alike": {task: compare(task, model, spm, alike[task]) for task in tasks},
        "as_it_is": {task: {"items": len(each["samples"])} | each["results"] for task, each in plain.items()},
    }
    said = " ".join(["python -m benchmarks.harness", arguments.config, *([f"--limit {limit}"] if limit else [])])
    if different := apart(found["alike"]):
        raise UserError(f"{', '.join(different)} differ in the first three digits")
    write("harness", said, found, arguments.quick)


if __name__ == "__main__":
    p = parser(__doc__, "configs/tiny.py")
    p.add_argument("--checkpoint", metavar="DIR", help="a trained model by path, instead of the experiment's")
    p.add_argument("--limit", type=cli.positive, metavar="N", help="items a task at most (all)")
    run(main, p)
