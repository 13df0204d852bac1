"""The published tasks: where their data is, what of a record is read, and what is scored.

A task's data is one file under DATA, as `python -m eval.download` puts it there, or the same records by another way.
Prompts are those of lm-evaluation-harness, so that numbers compare; a text begins, as in training, with the piece that
ends documents.
"""

import json
import lzma
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import data.sources
from cli import UserError
from eval import choices, language
from eval.choices import Question
from model import Transformer
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Published:
    """A task with data of its own. file: its name under DATA, without the ends `.jsonl` or `.raw` and `.xz`. dataset,
    subset, split: where the Hub has it; subset "*" is all of them. question: what a record asks; None: running text.
    majority: whether always giving the commonest answer is a baseline."""

    file: str
    dataset: str
    subset: str | None
    split: str
    question: Callable[[dict], Question] | None = None
    majority: bool = False

    def find(self) -> Path | None:
        """Its file, if there is one. UserError if there are several."""
        directory, name = (data.sources.raw() / self.file).parent, Path(self.file).name
        end = r"\.raw" if self.question is None else r"\d*\.jsonl"
        there = directory.iterdir() if directory.is_dir() else ()
        found = sorted(p for p in there if re.fullmatch(rf"{re.escape(name)}{end}(\.(xz|gz|bz2))?", p.name))
        if len(found) > 1:
            raise UserError(f"{' and '.join(map(str, found))}: which is it? Move all but one away")
        if found and not found[0].is_file():
            raise UserError(f"{found[0]} is not a file; expected the data of {self.dataset}, or nothing there")
        return found[0] if found else None

    def load(self, path: Path) -> str | list[Question]:
        """Its data. UserError, naming file and line, for what it should not be."""
        text = read(path).replace("\r\n", "\n")
        if not text.strip():
            raise UserError(f"{path} is empty; replace it, or move it away and do without the task")
        if self.question is not None:
            return self.questions(text, path)
        if not all(article.startswith(" = ") for article in language.articles(text)):
            raise UserError(
                f"{path} does not begin with a title, a line ' = Title = '; expected WikiText as it is, raw"
            )
        return text

    def measure(self, model: Transformer, tokenizer: Tokenizer, loaded: str | list[Question], name: str) -> dict:
        """Its numbers."""
        if self.question is None:
            return language.wikitext2(model, tokenizer, loaded)
        scores, truncated = choices.score(model, tokenizer, loaded, name)
        return choices.summary(loaded, scores, self.majority) | {"truncated": truncated}

    def questions(self, text: str, path: Path) -> list[Question]:
        """The questions in JSON lines."""
        found = []
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    question = self.question(json.loads(line))
                    for context, ending in question.choices:
                        (context + ending).encode()  # half a surrogate pair is no text
                        if not ending.strip():
                            raise ValueError("a choice is empty")
                    "".join(question.kind.values()).encode()
                    if not 0 <= question.answer < len(question.choices) or len(question.choices) < 2:
                        raise ValueError(f"answer {question.answer} of {len(question.choices)} choices")
                except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                    what = f"no {error}" if isinstance(error, KeyError) else str(error)
                    raise UserError(
                        f"{path}, line {number}: not a record of {self.dataset} ({what}); mend or remove it"
                    ) from None
                found.append(question)
        return found


def read(path: Path) -> str:
    """A text file, compressed or not. UserError if it is damaged."""
    try:
        with open(path, "rb") as file:
            unpack = data.sources.OPEN.get(path.suffix)
            return (unpack(file).read() if unpack else file.read()).removeprefix(data.sources.BOM).decode()
    except (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}; replace the file") from None


# ---------------------------------------------------------------------------------------------------------- questions


def among(context: str, endings: list[str], answer: int) -> Question:
    """One context, and endings that follow it after a space."""
    return Question(tuple((context, " " + ending) for ending in endings), answer)


def listed(choices) -> list:
    """The choices of a record, which would be letters if they were a text."""
    if not isinstance(choices, list):
        raise TypeError(f"the choices are {choices!r}, not a list")
    return choices


def index(label) -> int:
    """A label, which some datasets spell as text."""
    if isinstance(label, bool) or not isinstance(label, (int, str)):
        raise TypeError(f"the label is {label!r}, not a whole number")
    return int(label)


def boolq(record: dict) -> Question:
    """BoolQ (arXiv:1905.10044): a passage, and a question to be answered by yes or no."""
    if not isinstance(record["answer"], bool):
        raise ValueError(f"answer is {record['answer']!r}, not true or false")
    context = record["passage"] + "\nQuestion: " + record["question"].removesuffix("?") + "?\nAnswer:"
    return among(context, ["no", "yes"], int(record["answer"]))


def blimp(record: dict) -> Question:
    """BLiMP (arXiv:1912.00582): two sentences, of which one is English."""
    sentences = (("", record["sentence_good"]), ("", record["sentence_bad"]))
    field = record["field"].replace("/", "_")  # syntax/semantics is spelt either way
    return Question(sentences, 0, {"field": field, "term": record["linguistics_term"].strip()})


def arc_easy(record: dict) -> Question:
    """ARC-Easy (arXiv:1803.05457): science for school."""
    labels, texts = listed(record["choices"]["label"]), listed(record["choices"]["text"])
    if len(labels) != len(texts) or len(set(labels)) != len(labels):
        raise ValueError(f"labels {labels!r} for {len(texts)} choices")
    return among("Question: " + record["question"] + "\nAnswer:", texts, labels.index(record["answerKey"]))


def piqa(record: dict) -> Question:
    """PIQA (arXiv:1911.11641): how things are done in the physical world."""
    return among("Question: " + record["goal"] + "\nAnswer:", [record["sol1"], record["sol2"]], index(record["label"]))


def hellaswag(record: dict) -> Question:
    """HellaSwag (arXiv:1905.07830): how a description of everyday life goes on."""
    context = record["ctx"]
    if "activity_label" in record:
        context = record["activity_label"] + ": " + record["ctx_a"] + " " + record["ctx_b"].capitalize()
    return among(tidy(context), [tidy(ending) for ending in listed(record["endings"])], index(record["label"]))


def tidy(text: str) -> str:
    """A text of WikiHow without the marks in brackets that its origin left."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def winogrande(record: dict) -> Question:
    """WinoGrande (arXiv:1907.10641): who or what a blank stands for. The rest of the sentence is scored after both."""
    before, rest = record["sentence"].split("_", 1)
    options = record["option1"], record["option2"]
    if not all(option.strip() for option in options):
        raise ValueError("an option is empty")
    return Question(tuple((before + option, " " + rest.strip()) for option in options), index(record["answer"]) - 1)


PUBLISHED = {
    "wikitext2": Published("wikitext-2/wiki.test", "Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    "boolq": Published("boolq_val", "google/boolq", None, "validation", boolq, majority=True),
    "blimp": Published("blimp", "nyu-mll/blimp", "*", "train", blimp),
    "arc_easy": Published("arc_easy_val", "allenai/ai2_arc", "ARC-Easy", "validation", arc_easy),
    "piqa": Published("piqa_val", "baber/piqa", None, "validation", piqa),
    "hellaswag": Published("hellaswag_val", "Rowan/hellaswag", None, "validation", hellaswag),
    "winogrande": Published("winogrande_val", "allenai/winogrande", "winogrande_xl", "validation", winogrande),
}

TASKS = ("validation", *PUBLISHED, "answers", "preference", "smoke", "prompts", "everyday", "continuations")
"""Every task, in the order of results.json."""
