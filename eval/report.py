"""A run to a page, from the files that its stages left.

    python -m eval.report configs/tiny.py   ->  runs/tiny/REPORT.md, and the same on the terminal

Nothing is measured here: what the page says, a stage has written.
"""

import argparse
import json
import math

import configs
import stage
from configs import Experiment
from stage import log


def main(arguments: argparse.Namespace) -> None:
    experiment = configs.load(arguments.config)
    page = report(experiment)
    path = stage.runs() / experiment.name / "REPORT.md"
    path.write_text(page, encoding="utf-8")
    log.info(f"{page}\n{path}")


def report(experiment: Experiment) -> str:
    """The page, in Markdown. UserError, with the command that makes it, for a stage that is missing."""
    commands = {
        "corpus": "python -m data.corpus",
        "tokenizer": "python -m tokenizer.train",
        "pack": "python -m data.pack",
        "pretrain": "python train.py",
        "eval": "python -m eval",
    }
    manifests, seconds = {}, {}
    for name, command in commands.items():
        directory = experiment.directory(name)
        manifests[name] = stage.finished(directory, f"{command} {experiment.path}")
        seconds[name] = stage.read_seconds(directory.parent).get(directory.name, math.nan)
    counts = {name: manifest["counts"] for name, manifest in manifests.items()}
    results = json.loads((experiment.directory("eval") / "results.json").read_text(encoding="utf-8"))["pretrain"][
        "validation"
    ]
    examples = json.loads((experiment.directory("eval") / "generations.json").read_text(encoding="utf-8"))
    examples = examples["pretrain"].get("continuations", [])
    train, val, last = counts["pack"]["train"], counts["pack"]["val"], counts["pretrain"]["record"]
    parameters = counts["pretrain"]["parameters"]
    ratio = results["bits_per_byte"] / results["xz_bits_per_byte"]
    stages = "\n".join(f"| `{command} {experiment.path}` | {seconds[name]:.0f} |" for name, command in commands.items())
    shown = "\n".join(example({k: v for k, v in each.items() if k != "seed"}) for each in examples)
    return f"""# {experiment.name}

| | |
|---|---|
| documents | {counts["corpus"]["documents"]:,}, {counts["corpus"]["bytes"] / 1e6:.1f} MB of text |
| tokens | {train["tokens"]:,} to train on, {val["tokens"]:,} held out, {experiment.model.vocab_size:,} pieces |
| parameters | {parameters:,} |
| trained on | {last["tokens"]:,} tokens: {last["epoch"]:.2f} epochs, {last["tokens"] / parameters:.2f} a parameter |
| validation loss | {results["loss"]:.4f} nats a token, perplexity {results["perplexity"]:.2f} |
| bits per byte | {results["bits_per_byte"]:.4f} ± {results["stderr"]:.4f}, {ratio:.3f} of what xz needs |
| bits per byte of xz -9 | {results["xz_bits_per_byte"]:.4f} |

| stage | seconds |
|---|---|
{stages}

## Held-out beginnings, continued
{shown}
## Next

    python serve.py {experiment.path} generate "Return the"
    python train.py configs/tiny.py          # 23 million parameters; Ctrl-C saves, the same command goes on
    python train.py configs/mine.py          # your own text: README.md shows the ten lines of that config
"""


def example(texts: dict[str, str]) -> str:
    """One beginning with its two continuations, as Markdown."""
    texts = texts | {"continuation": texts["continuation"] or "(nothing: for the model the document ends here)"}
    quoted = {name: "\n".join(f"    {line}" for line in text.split("\n")) for name, text in texts.items()}
    return f"""
It begins

{quoted["prompt"]}

the model goes on

{quoted["continuation"]}

and the author

{quoted["truth"]}
"""


if __name__ == "__main__":
    stage.run(main, stage.parser(__doc__).parse_args())
