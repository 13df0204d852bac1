"""hh_harmless: prose_mini's model learns which answers people found less harmful, from a part of Anthropic's HH-RLHF
under DATA. Much of it is offensive: read none of it that you need not."""

from dataclasses import replace

from configs.alpaca_eval import experiment as alpaca_eval
from dpo.data import PairConfig
from dpo.pairs import Pairs

HARMLESS = Pairs(
    name="hh_harmless",
    paths=("hh_harmless.jsonl.xz",),
    licence="MIT",
    unreadable="skip",  # dialogues that part before their last answer
)

experiment = replace(
    alpaca_eval,
    name="hh_harmless",
    dpo=replace(
        alpaca_eval.dpo,
        data=PairConfig(sources=(HARMLESS,), val_fraction=0.2),
        train=replace(alpaca_eval.dpo.train, epochs=3, batch_size=32),
    ),
)
