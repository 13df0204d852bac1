"""prose_mini: 4 layers × 128, 3,146,880 parameters, an hour of prose_tiny's text on one CPU core; then instructions.

A model this small knows little; it is enough to see what fine-tuning and preferences do on real text.
"""

from dataclasses import replace

from configs.prose_tiny import ALPACA
from configs.prose_tiny import experiment as prose_tiny
from model import ModelConfig
from sft.data import ConversationConfig
from sft.train import SFTConfig
from tokenizer.train import TokenizerConfig
from trainer import TrainConfig

experiment = replace(
    prose_tiny,
    name="prose_mini",
    model=ModelConfig(vocab_size=8_192, context_length=512, n_layers=4, d_model=128, n_heads=2),
    tokenizer=TokenizerConfig(vocab_size=8_192),
    mixture=(),  # all tokens alike
    pretrain=TrainConfig(
        steps=5_000,
        batch_size=8,
        learning_rate=3e-3,
        optimizer="muon",
        schedule="linear",
        beta2=0.99,
        warmup_steps=100,
        eval_every=500,
        eval_rows=64,
        save_every=500,
    ),
    sft=SFTConfig(
        data=ConversationConfig(sources=(ALPACA,)),
        train=TrainConfig(
            epochs=2,
            batch_size=8,
            learning_rate=4e-3,
            warmup_fraction=0.1,
            schedule="linear",
            weight_decay=0.0,
            eval_every=100,
            eval_rows=64,
            save_every=200,
        ),
    ),
    shared={"corpus": prose_tiny},
)
