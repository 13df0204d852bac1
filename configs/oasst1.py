"""oasst1: tiny_web's model learns to hold conversations, from the trees of Open Assistant: of each the best path.

The conversations are streamed from the Hugging Face Hub (pip install datasets).
"""

from dataclasses import replace

from configs.tiny_web import experiment as tiny_web
from sft.conversations import HubChats
from sft.data import ConversationConfig
from sft.train import SFTConfig

OASST1 = HubChats(name="oasst1", dataset="OpenAssistant/oasst1", format="oasst1", licence="Apache-2.0")

experiment = replace(
    tiny_web,
    name="oasst1",
    sft=SFTConfig(data=ConversationConfig(sources=(OASST1,))),
    shared=tiny_web.shared | dict.fromkeys(("corpus", "pack", "pretrain"), tiny_web),
)
