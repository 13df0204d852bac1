"""prose_tiny: 23,072,000 parameters on English prose (novels, film reviews, news and speeches, encyclopaedia), then
instructions, then preferences: two hours of pretraining on two CPU cores. The data is the user's own, found under DATA.

docs/experiments.md says how batch size and learning rate were chosen.
"""

from dataclasses import replace

from configs.tiny import experiment as tiny
from data.batches import Phase
from data.corpus import CorpusConfig
from data.quality import PROSE
from data.sources import Files
from dpo.data import PairConfig
from dpo.pairs import Pairs
from dpo.train import DPOConfig
from sft.conversations import Chats
from sft.data import ConversationConfig
from sft.train import SFTConfig
from trainer import TrainConfig

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

ALPACA = Chats(name="alpaca", paths=("alpaca.jsonl.xz",), licence="CC BY-NC 4.0")
DOLLY = Chats(name="dolly", paths=("dolly.jsonl.xz",), licence="CC BY-SA 3.0")
ALPACA_EVAL = Pairs(name="alpaca_eval", paths=("alpaca_eval_pairs.jsonl.xz",), licence="CC BY-NC 4.0")

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
    # By size, novels would be two thirds of each batch and the encyclopaedia one token in eighty. With these weights,
    # 33 million tokens read the encyclopaedia four times and the news 2.2 times.
    mixture=(Phase(start=0, weights={"novels": 8, "reviews": 8, "news_speeches": 2, "wikipedia": 2}),),
    pretrain=TrainConfig(
        steps=4_000,  # 33 million tokens
        batch_size=8,
        micro_batch_size=4,
        learning_rate=5e-3,
        optimizer="muon",
        beta2=0.99,
        schedule="wsd",  # can be extended to more steps later, from the checkpoint before the rate falls
        decay_fraction=0.3,
        warmup_steps=100,
        eval_every=550,
        eval_rows=64,
        save_every=275,
    ),
    sft=SFTConfig(
        data=ConversationConfig(sources=(ALPACA, DOLLY)),
        weights={"alpaca": 11, "dolly": 3, "pretraining": 2},  # with text, the model forgets less
        train=TrainConfig(
            steps=509,  # 1.75 epochs
            batch_size=8,
            micro_batch_size=4,
            learning_rate=1e-3,
            warmup_fraction=0.1,
            schedule="linear",
            weight_decay=0.0,
            eval_every=100,
            eval_rows=64,
            save_every=100,
        ),
    ),
    dpo=DPOConfig(
        data=PairConfig(sources=(ALPACA_EVAL,), val_fraction=0.2),  # a prompt has twelve pairs, so prompts are few
        train=TrainConfig(
            epochs=1,
            batch_size=16,
            micro_batch_size=8,
            learning_rate=2e-4,
            warmup_fraction=0.1,
            schedule="linear",
            weight_decay=0.0,
            eval_every=100,
            eval_rows=256,
            save_every=100,
        ),
    ),
)
