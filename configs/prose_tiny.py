"""prose_tiny: 23,072,000 parameters on 65 million tokens of English prose: novels, film reviews, news and speeches,
encyclopaedia. The text is the user's own, JSON lines found under DATA."""

from dataclasses import replace

from configs.tiny import experiment as tiny
from data.corpus import CorpusConfig
from data.quality import PROSE
from data.sources import Files

# What models of this corpus are evaluated on stays out of it.
EVALUATION = tuple(
    Files(name=name, paths=(path,), field="*")
    for name, path in {
        "wikitext2": "wikitext-2/wiki.test.raw.xz",
        "boolq": "boolq_val.jsonl.xz",
        "blimp": "blimp.jsonl.xz",
        "arc_easy": "arc_easy_val.jsonl.xz",
        "piqa": "piqa_val.jsonl.xz",
        "hellaswag": "hellaswag_val1000.jsonl.xz",
        "winogrande": "winogrande_val.jsonl.xz",
    }.items()
)

experiment = replace(
    tiny,
    name="prose_tiny",
    corpus=CorpusConfig(
        sources=(
            Files(name="novels", paths=("novels.jsonl.xz",), licence="public domain", quality=PROSE),
            Files(name="reviews", paths=("imdb.jsonl.xz",), licence="aclImdb: research", quality=PROSE),
            Files(name="news_speeches", paths=("news_speeches.jsonl.xz",), licence="research", quality=PROSE),
            Files(name="wikipedia", paths=("wiki_paragraphs.jsonl.xz",), licence="CC BY-SA 3.0", quality=PROSE),
        ),
        decontaminate=EVALUATION,
    ),
    pretrain=replace(tiny.pretrain, epochs=1, warmup_steps=200, eval_every=250, save_every=250),
)
