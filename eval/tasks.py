"""The published tasks: where their data is, and the question in each record."""

# A task's data is one file under DATA, as `python -m eval.download` writes it. Prompts are the same as in
# lm-evaluation-harness, but each text begins, as in training, with the piece that ends documents.

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import data.sources
from cli import UserError
from eval import choices, language
from eval.choices import Question
from eval.language import Subject


@dataclass(frozen=True)
class Published:
    file: str  # its name under DATA, without .jsonl or .raw, and without .xz, .gz or .bz2
    dataset: str  # on the Hub
    subset: str | None  # "*" for all of them
    split: str
    question: Callable[[dict], Question] | None = None  # makes a record's question; None: the data is running text
    majority: bool = False  # whether the baseline is the most frequent answer every time

    def find(self) -> Path | None:
        """The task's file, if there is one. UserError if there are several."""
        wanted = data.sources.raw() / self.file
        end = r"\d*\.jsonl" if self.question else r"\.raw"
        pattern = rf"{re.escape(wanted.name)}{end}(\.(xz|gz|bz2))?"
        paths = [path for path in wanted.parent.glob("*") if re.fullmatch(pattern, path.name)]
        if len(paths) > 1:
            raise UserError(f"{' and '.join(map(str, paths))} hold data of one task; remove all but one")
        return paths[0] if paths else None

    def load(self, path: Path) -> str | list[Question]:
        """The task's data. UserError that names file and line if it is damaged."""
        where = path
        questions = []
        try:
            text = read(path)
            if self.question is None:
                if not re.match(r"(?m)\s*^ = [^=\n]+ = $", text):
                    raise ValueError("no title line ' = Title = ' opens it, as raw WikiText has")
                return text
            for number, line in enumerate(text.split("\n"), start=1):
                where = f"{path}, line {number}"
                if line.strip():
                    questions.append(checked(self.question(json.loads(line))))
            if not questions:
                raise ValueError("the file is empty")
        except Exception as error:  # whatever goes wrong, the file is not what it should be
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{where}: not the data of {self.dataset}: {reason}; remove or replace the file") from None
        return questions

    def measure(self, subject: Subject, loaded: str | list[Question], name: str) -> dict:
        if self.question is None:
            return language.wikitext2(subject, loaded)
        scores, truncated = choices.score(subject, loaded, name)
        return choices.summary(loaded, scores, self.majority) | {"truncated": truncated}


def read(path: Path) -> str:
    """A text file, compressed or not."""
    with open(path, "rb") as file:
        unpack = data.sources.OPEN.get(path.suffix)
        return (unpack(file) if unpack else file).read().decode("utf-8-sig").replace("\r\n", "\n")


def checked(question: Question) -> Question:
    """The question. ValueError if it cannot be scored."""
    for context, ending in question.choices:
        (context + ending).encode()  # half a surrogate pair is no text
        if not ending.strip():
            raise ValueError("a choice is empty")
    count = len(question.choices)
    if not 0 <= question.answer < count or count == 1:  # the test sets of some datasets say -1: not published
        raise ValueError(f"the answer is number {question.answer} of {count} choices")
    return question


def among(context: str, endings: list[str], answer: int | str) -> Question:
    """One context and several endings, each after a space."""
    return Question([(context, " " + ending) for ending in endings], int(str(answer)))


def listed(texts: list[str]) -> list[str]:
    """The texts. TypeError for a text, which would pass for a list of letters."""
    if type(texts) is not list:
        raise TypeError(f"{texts!r} is no list of choices")
    return texts


def boolq(record: dict) -> Question:
    """BoolQ (arXiv:1905.10044): a passage, and a question to answer with yes or no."""
    context = record["passage"] + "\nQuestion: " + record["question"].removesuffix("?") + "?\nAnswer:"
    return among(context, ["no", "yes"], [False, True].index(record["answer"]))


def blimp(record: dict) -> Question:
    """BLiMP (arXiv:1912.00582): two sentences, one of them grammatical."""
    sentences = [("", record["sentence_good"]), ("", record["sentence_bad"])]
    field = record["field"].replace("/", "_")  # the files write both syntax/semantics and syntax_semantics
    return Question(sentences, 0, {"field": field, "term": record["linguistics_term"].strip()})


def arc_easy(record: dict) -> Question:
    """ARC-Easy (arXiv:1803.05457): science questions from school."""
    options = record["choices"]
    texts = dict(zip(options["label"], listed(options["text"]), strict=True))
    answer = list(texts).index(record["answerKey"])
    return among("Question: " + record["question"] + "\nAnswer:", list(texts.values()), answer)


def piqa(record: dict) -> Question:
    """PIQA (arXiv:1911.11641): how to do things in the physical world."""
    context = "Question: " + record["goal"] + "\nAnswer:"
    return among(context, [record["sol1"], record["sol2"]], record["label"])


def hellaswag(record: dict) -> Question:
    """HellaSwag (arXiv:1905.07830): how a description of everyday life continues."""
    context = record["ctx"]
    if "activity_label" in record:
        context = record["activity_label"] + ": " + record["ctx_a"] + " " + record["ctx_b"].capitalize()
    endings = list(map(tidy, listed(record["endings"])))
    return among(tidy(context), endings, record["label"])


def tidy(text: str) -> str:
    """A text of WikiHow without its marks in brackets."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def winogrande(record: dict) -> Question:
    """WinoGrande (arXiv:1907.10641): who or what a blank stands for. The rest of the sentence is scored after both."""
    before, rest = record["sentence"].split("_", 1)
    ending = " " + rest.strip()
    sentences = [(before + record["option1"], ending), (before + record["option2"], ending)]
    return Question(sentences, int(record["answer"]) - 1)


PUBLISHED = {
    "wikitext2": Published("wikitext-2/wiki.test", "Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    "boolq": Published("boolq_val", "google/boolq", None, "validation", boolq, majority=True),
    "blimp": Published("blimp", "nyu-mll/blimp", "*", "train", blimp),
    "arc_easy": Published("arc_easy_val", "allenai/ai2_arc", "ARC-Easy", "validation", arc_easy),
    "piqa": Published("piqa_val", "baber/piqa", None, "validation", piqa),
    "hellaswag": Published("hellaswag_val", "Rowan/hellaswag", None, "validation", hellaswag),
    "winogrande": Published("winogrande_val", "allenai/winogrande", "winogrande_xl", "validation", winogrande),
}

METRICS = {"validation": "bits_per_byte"} | dict.fromkeys(PUBLISHED, "accuracy") | {"wikitext2": "bits_per_byte"}
METRICS |= {"answers": "loss", "preference": "win_rate", "smoke": "passed", "prompts": "repetition"}
METRICS |= {"everyday": "repetition", "continuations": "repetition"}
"""Every task in the order of results.json, and its main metric: `stderr` and `baseline` are about this one."""
