"""orca_dpo: oasst1's model learns from Intel's Orca pairs, streamed from the Hugging Face Hub (with `datasets`)."""

from dataclasses import replace

from configs.hh_rlhf import experiment as hh_rlhf
from dpo.data import PairConfig
from dpo.pairs import HubPairs

ORCA = HubPairs(name="orca_dpo", dataset="Intel/orca_dpo_pairs", licence="Apache-2.0", format="orca")

experiment = replace(
    hh_rlhf,
    name="orca_dpo",
    dpo=replace(hh_rlhf.dpo, data=PairConfig(sources=(ORCA,))),
)
