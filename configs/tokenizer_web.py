"""tokenizer_web: the tokenizer of all *_web experiments, trained once on its own 100 million tokens of their sources.

    python pipeline.py configs/tokenizer_web.py tokenizer

The sources are streamed from the Hugging Face Hub (pip install datasets).
"""

from dataclasses import replace

from configs.tiny import experiment as tiny
from data.corpus import CorpusConfig
from data.quality import PROSE, Quality
from data.sources import Hub

C4 = Hub(name="c4", dataset="allenai/c4", subset="en", licence="ODC-BY", quality=Quality())
BOOKS = Hub(
    name="books",
    dataset="sedthh/gutenberg_english",
    field="TEXT",
    licence="public domain in the USA",
    quality=PROSE,
)
FINEWEB_EDU = Hub(
    name="fineweb_edu",
    dataset="HuggingFaceFW/fineweb-edu",
    subset="sample-10BT",
    licence="ODC-BY",
    quality=PROSE,
)
WIKIPEDIA = Hub(
    name="wikipedia",
    dataset="wikimedia/wikipedia",
    subset="20231101.en",
    licence="CC BY-SA 3.0 and GFDL",
    quality=PROSE,
)

# What models of these corpora are evaluated on stays out of them. BLiMP's sentences are shorter than 13 words.
EVALUATION = (
    Hub(name="wikitext2", dataset="Salesforce/wikitext", subset="wikitext-2-raw-v1", split="test"),
    Hub(name="boolq", dataset="google/boolq", split="validation", field="*"),
    Hub(name="arc_easy", dataset="allenai/ai2_arc", subset="ARC-Easy", split="validation", field="*"),
    Hub(name="piqa", dataset="baber/piqa", split="validation", field="*"),
    Hub(name="hellaswag", dataset="Rowan/hellaswag", split="validation", field="*"),
    Hub(name="winogrande", dataset="allenai/winogrande", subset="winogrande_xl", split="validation", field="*"),
)


def mix(**tokens: int) -> CorpusConfig:
    """So many tokens of each source, in this order."""
    sources = {"fineweb_edu": FINEWEB_EDU, "wikipedia": WIKIPEDIA, "books": BOOKS, "c4": C4}
    chosen = tuple(replace(source, max_tokens=tokens[name]) for name, source in sources.items() if name in tokens)
    return CorpusConfig(sources=chosen, decontaminate=EVALUATION)


M = 1_000_000

experiment = replace(
    tiny,
    name="tokenizer_web",
    corpus=mix(c4=25 * M, books=25 * M, fineweb_edu=25 * M, wikipedia=25 * M),
    tokenizer=replace(tiny.tokenizer, sample_bytes=100_000_000),
)
