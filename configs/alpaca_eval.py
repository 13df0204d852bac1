"""alpaca_eval: prose_mini's model learns what people preferred in a part of AlpacaEval's annotations, found under DATA.

Most often that is the longer answer: win rates of this data are to be read beside those with lengths matched.
"""

from dataclasses import replace

from configs.alpaca import experiment as alpaca
from configs.prose_mini import experiment as prose_mini
from trainer import TrainConfig

experiment = replace(
    prose_mini,
    name="alpaca_eval",
    dpo=replace(
        alpaca.dpo,
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
