"""smollm2: a real model, SmolLM2-135M-Instruct, is measured, fine-tuned on a part of Alpaca, and served.

python convert.py from-hf HuggingFaceTB/SmolLM2-135M-Instruct models/smollm2_base --context-length 1024
python pipeline.py configs/smollm2.py sft eval          # then: dpo
python serve.py configs/smollm2.py chat
"""

from dataclasses import replace
from pathlib import Path

from configs import Experiment
from configs.prose_tiny import ALPACA, ALPACA_EVAL
from data.corpus import CorpusConfig
from data.pack import PackConfig
from data.sources import PythonDocs
from dpo.data import PairConfig
from dpo.train import DPOConfig
from model import ModelConfig
from sft.data import ConversationConfig
from sft.train import SFTConfig
from tokenizer.train import TokenizerConfig
from trainer import TrainConfig

TRAIN = TrainConfig(
    epochs=1,
    batch_size=8,
    micro_batch_size=1,
    learning_rate=2e-4,
    warmup_fraction=0.1,
    schedule="linear",
    weight_decay=0.0,
    eval_every=50,
    eval_rows=16,
    save_every=50,
)

experiment = Experiment(
    name="smollm2",
    imported=Path("models/smollm2_base"),  # what from-hf wrote; for another model, take `model` from its config.py too
    model=ModelConfig(
        vocab_size=49_152,
        context_length=1_024,
        n_layers=30,
        d_model=576,
        n_heads=9,
        n_kv_heads=3,
        d_ff=1_536,
        rope_theta=100_000.0,
        tie_embeddings=True,
    ),
    # The model's own chat template. With "chatml", say, the model would learn a new one.
    sft=SFTConfig(
        data=ConversationConfig(sources=(replace(ALPACA, max_documents=1_000),), template="imported"), train=TRAIN
    ),
    dpo=DPOConfig(
        data=PairConfig(sources=(replace(ALPACA_EVAL, max_pairs=500),), val_fraction=0.2),
        train=replace(TRAIN, learning_rate=5e-5),
    ),
    # Only for training on plain text, which this experiment does without.
    corpus=CorpusConfig(sources=(PythonDocs(),)),
    tokenizer=TokenizerConfig(),
    pack=PackConfig(),
    pretrain=TrainConfig(steps=1_000, batch_size=8, learning_rate=1e-4),
)
