"""chat_mix: tiny_web's model learns from a balanced mix, 5 million tokens each of Open Assistant, WizardLM, OpenOrca.

The conversations are streamed from the Hugging Face Hub (pip install datasets).
"""

from dataclasses import replace

from configs.oasst1 import OASST1
from configs.oasst1 import experiment as oasst1
from configs.tokenizer_web import M
from sft.conversations import HubChats
from sft.data import ConversationConfig
from sft.train import SFTConfig

SOURCES = (
    OASST1,
    HubChats(
        name="wizardlm",
        dataset="WizardLMTeam/WizardLM_evol_instruct_70k",
        format="wizardlm",
        licence="MIT",
    ),
    HubChats(name="openorca", dataset="Open-Orca/OpenOrca", format="openorca", licence="MIT"),
)

experiment = replace(
    oasst1,
    name="chat_mix",
    sft=SFTConfig(
        data=ConversationConfig(sources=tuple(replace(source, max_tokens=5 * M) for source in SOURCES)),
        weights={source.name: 1 for source in SOURCES},
    ),
)
