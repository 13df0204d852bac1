"""The published tasks' data, from the Hugging Face Hub to files under DATA, where evaluation finds them.

    python -m eval.download              # whatever is not there yet
    python -m eval.download boolq piqa

Needs: pip install datasets
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import cli
import data.sources
import stage
from cli import UserError, log
from data.sources import extra
from eval.tasks import PUBLISHED, Published


def main(arguments: argparse.Namespace) -> None:
    for name in arguments.tasks:
        if name not in PUBLISHED:
            raise UserError(f"no task {name} has data of its own; there are {', '.join(PUBLISHED)}")
    for name in arguments.tasks or PUBLISHED:
        published = PUBLISHED[name]
        if path := published.find():
            log.info(f"{path} is there")
        else:
            log.info(f"{name}: {download(published)}")


def download(published: Published) -> Path:
    """Writes a task's file, in whole or not at all. UserError if the Hub does not give it, or something else."""
    path = data.sources.raw() / (published.file + (".raw" if published.question is None else ".jsonl"))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(lines(published))
        published.load(temporary)
        stage.sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def lines(published: Published) -> Iterator[str]:
    """The lines of its file. Of WikiText the Hub has a line a record, and "" for a blank one."""
    datasets = extra("datasets", "datasets", "the Hub")
    try:
        subsets = [published.subset]
        if published.subset == "*":
            subsets = sorted(datasets.get_dataset_config_names(published.dataset))
        for subset in subsets:
            for record in datasets.load_dataset(published.dataset, subset, split=published.split):
                text = record["text"] or " \n" if published.question is None else None
                yield json.dumps(record, ensure_ascii=False) + "\n" if text is None else text
    except (OSError, ValueError) as error:  # no network, no such dataset, subset or split
        raise UserError(f"the dataset {published.dataset} cannot be had: {type(error).__name__}: {error}") from None


if __name__ == "__main__":
    p = cli.parser(__doc__, config=False)
    p.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(PUBLISHED)}; default: all")
    cli.run(main, p.parse_args())
