"""hh_rlhf: oasst1's model learns from Anthropic's helpful and harmless pairs, streamed from the Hugging Face Hub (pip
install datasets)."""

from dataclasses import replace

from configs.oasst1 import experiment as oasst1
from dpo.data import PairConfig
from dpo.pairs import HubPairs
from dpo.train import DPOConfig

HH = HubPairs(name="hh_rlhf", dataset="Anthropic/hh-rlhf", licence="MIT", format="hh", unreadable="skip")
SHARED = ("corpus", "tokenizer", "pack", "pretrain", "sft")
DPO = DPOConfig()

experiment = replace(
    oasst1,
    name="hh_rlhf",
    dpo=replace(
        DPO,
        data=PairConfig(sources=(HH,), val_fraction=0.01),
        train=replace(DPO.train, epochs=None, steps=2_000, eval_every=200, save_every=200),
    ),
    shared=dict.fromkeys(SHARED, oasst1),
)
