"""alpaca: prose_tiny's model learns to follow instructions, from a part of Stanford Alpaca found under DATA."""

from dataclasses import replace

from configs.prose_tiny import experiment as prose_tiny
from sft.conversations import Chats
from sft.data import ConversationConfig
from sft.train import SFTConfig

ALPACA = Chats(name="alpaca", paths=("alpaca.jsonl.xz",), licence="CC BY-NC 4.0")

experiment = replace(
    prose_tiny,
    name="alpaca",
    sft=SFTConfig(data=ConversationConfig(sources=(ALPACA,))),
    shared=dict.fromkeys(("corpus", "tokenizer", "pack", "pretrain"), prose_tiny),
)
