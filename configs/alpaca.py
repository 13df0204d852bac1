"""alpaca: prose_tiny's model learns to follow instructions from Stanford Alpaca alone, with the default settings,
then DPO as in prose_tiny."""

from dataclasses import replace

from configs.prose_tiny import ALPACA
from configs.prose_tiny import experiment as prose_tiny
from sft.data import ConversationConfig
from sft.train import SFTConfig

experiment = replace(
    prose_tiny,
    name="alpaca",
    sft=SFTConfig(data=ConversationConfig(sources=(ALPACA,))),
    shared=dict.fromkeys(("corpus", "tokenizer", "pack", "pretrain"), prose_tiny),
)
