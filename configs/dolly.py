"""dolly: prose_tiny's model learns to follow instructions, from a part of Dolly 15k found under DATA."""

from dataclasses import replace

from configs.alpaca import experiment as alpaca
from configs.prose_tiny import DOLLY
from sft.data import ConversationConfig
from sft.train import SFTConfig

experiment = replace(alpaca, name="dolly", sft=SFTConfig(data=ConversationConfig(sources=(DOLLY,))))
