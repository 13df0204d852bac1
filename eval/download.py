"""The data of the published tasks, from the Hugging Face Hub to files under DATA.

    python -m eval.download              # all tasks whose data is missing
    python -m eval.download boolq piqa

Needs: pip install datasets
Next: python pipeline.py configs/tiny.py eval
"""

import argparse
import json
from pathlib import Path

import cli
import data.sources
from cli import UserError, extra, log
from eval.tasks import PUBLISHED, Published


def main(arguments: argparse.Namespace) -> None:
    for name in arguments.tasks or PUBLISHED:
        if name not in PUBLISHED:
            raise UserError(f"no task {name} has data of its own; there are {', '.join(PUBLISHED)}")
        published = PUBLISHED[name]
        log.info(f"{name}: {published.find() or download(published)}")


def download(published: Published) -> Path:
    """Writes a task's file, whole or not at all."""
    datasets = extra("datasets", "datasets", "the Hub")
    name = published.dataset
    path = data.sources.raw() / (published.file + (".jsonl" if published.question else ".raw"))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        subsets = sorted(datasets.get_dataset_config_names(name)) if published.subset == "*" else [published.subset]
        with open(temporary, "w", encoding="utf-8") as file:
            for subset in subsets:
                for record in datasets.load_dataset(name, subset, split=published.split):
                    line = json.dumps(record, ensure_ascii=False) + "\n"
                    # A record of WikiText is a line, and "" a blank line.
                    file.write(line if published.question else record["text"] or " \n")
        published.load(temporary)  # UserError if the dataset has changed its fields
        temporary.replace(path)
    except UserError:
        raise
    except Exception as error:  # no network, or no such dataset, subset or split
        raise UserError(f"cannot load the dataset {name}: {type(error).__name__}: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return path


if __name__ == "__main__":
    p = cli.parser(__doc__, config=False)
    # Without choices=: Python 3.11 refuses no argument at all then.
    p.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(PUBLISHED)}; default: all")
    cli.run(main, p.parse_args())
