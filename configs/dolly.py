"""dolly: prose_tiny's model learns to follow instructions, from a part of Dolly 15k found under DATA."""

from dataclasses import replace

from configs.alpaca import experiment as alpaca
from sft.conversations import Chats
from sft.data import ConversationConfig
from sft.train import SFTConfig

DOLLY = Chats(name="dolly", paths=("dolly.jsonl.xz",), licence="CC BY-SA 3.0")

experiment = replace(alpaca, name="dolly", sft=SFTConfig(data=ConversationConfig(sources=(DOLLY,))))
