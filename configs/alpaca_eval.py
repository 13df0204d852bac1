"""alpaca_eval: prose_mini's model learns what people preferred in a part of AlpacaEval's annotations, found under DATA.

Most often that is the longer answer: win rates of this data are to be read beside those with lengths matched.
"""

from dataclasses import replace

from configs.prose_mini import experiment as prose_mini
from dpo.data import PairConfig
from dpo.pairs import Pairs
from dpo.train import DPOConfig
from train import TrainConfig

ALPACA_EVAL = Pairs(name="alpaca_eval", paths=("alpaca_eval_pairs.jsonl.xz",), licence="CC BY-NC 4.0")

experiment = replace(
    prose_mini,
    name="alpaca_eval",
    dpo=DPOConfig(
        data=PairConfig(sources=(ALPACA_EVAL,), val_fraction=0.2),  # twelve pairs a prompt: few prompts
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
    shared=dict.fromkeys(("tokenizer", "pack", "pretrain", "sft"), prose_mini) | dict(prose_mini.shared),
)
