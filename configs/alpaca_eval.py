"""alpaca_eval: prose_mini's model learns what people preferred in a part of AlpacaEval's annotations, found under DATA.

Most often that is the longer answer: win rates of this data are to be read beside those with lengths matched.
"""

from dataclasses import replace

from configs.prose_mini import experiment as prose_mini

experiment = replace(
    prose_mini,
    name="alpaca_eval",
    shared=dict.fromkeys(("tokenizer", "pack", "pretrain", "sft"), prose_mini) | dict(prose_mini.shared),
)
