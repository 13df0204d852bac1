"""alpaca: prose_tiny's model learns to follow instructions, from a part of Stanford Alpaca, and what people preferred,
from a part of AlpacaEval's annotations, both found under DATA."""

from dataclasses import replace

from configs.prose_tiny import experiment as prose_tiny
from dpo.data import PairConfig
from dpo.pairs import Pairs
from dpo.train import DPOConfig
from sft.conversations import Chats
from sft.data import ConversationConfig
from sft.train import SFTConfig

ALPACA = Chats(name="alpaca", paths=("alpaca.jsonl.xz",), licence="CC BY-NC 4.0")
ALPACA_EVAL = Pairs(name="alpaca_eval", paths=("alpaca_eval_pairs.jsonl.xz",), licence="CC BY-NC 4.0")

experiment = replace(
    prose_tiny,
    name="alpaca",
    sft=SFTConfig(data=ConversationConfig(sources=(ALPACA,))),
    dpo=DPOConfig(data=PairConfig(sources=(ALPACA_EVAL,), val_fraction=0.2)),  # twelve pairs a prompt: few prompts
    shared=dict.fromkeys(("corpus", "tokenizer", "pack", "pretrain"), prose_tiny),
)
