"""Writes docs/report/ from a finished experiment: the report, its plots, its numbers, its logged losses. No weights.

    python -m benchmarks.publish configs/prose_tiny.py    ->  docs/report/

The report is `pipeline.py CONFIG report`'s, without the samples that quote a dataset: its licence may forbid that.
Next: write about it in docs/. `make test` compares the numbers of a table's row that ends in `results.json: KEY`.
"""

import argparse
import shutil

import cli
import configs
import stage
from cli import UserError, log
from eval import plots
from eval.report import page
from eval.summary import Run

REPORT = stage.ROOT / "docs/report"
QUOTING = ("answers", "continuations")  # tasks whose prompts come from a dataset


def stages(run: Run) -> dict[str, dict]:
    """Command, seconds, digest and counts of each stage."""
    found = {}
    for name, manifest in run.manifests.items():
        directory, counts = run.experiment.directory(name), manifest["counts"]
        seconds = stage.read_seconds(directory.parent).get(directory.name)
        command = counts.get("command", run.experiment.command(name))
        found[name] = {"command": command, "seconds": seconds, "sha256": manifest["sha256"], "counts": counts}
    return found


def main(arguments: argparse.Namespace) -> None:
    run = Run(configs.load(arguments.config))
    if not run.finals:
        raise UserError(f"{run.experiment.name} has no trained model; run: python pipeline.py {run.experiment.path}")
    cli.extra("matplotlib", "matplotlib", "the report")
    for texts in run.texts.values():
        for task in QUOTING:
            texts.pop(task, None)
    REPORT.mkdir(exist_ok=True)
    for path in (*REPORT.glob("*.jsonl"), *REPORT.glob("plots/*.png")):  # of an earlier report
        path.unlink()
    pictures = plots.draw(run, REPORT / "plots")
    stage.write(REPORT / "REPORT.md", page(run, pictures).encode())
    versions = next(reversed(run.manifests.values()))["versions"]
    stage.write_json(REPORT / "results.json", run.results | {"stages": stages(run), "versions": versions})
    for name in run.finals:
        metrics = run.experiment.directory(name) / "metrics.jsonl"
        if metrics.exists():  # an imported model has none
            shutil.copy(metrics, REPORT / f"{name}.jsonl")
    log.info(f"published: {REPORT}")


if __name__ == "__main__":
    p = cli.parser(__doc__)
    cli.run(main, p.parse_args())
