"""demo: a small model on the embedded corpus, every stage of it, in minutes on two CPU cores."""

from configs import Experiment
from data.corpus import CorpusConfig
from data.pack import PackConfig
from data.sources import PythonDocs
from dpo.loss import LossConfig
from dpo.train import DPOConfig
from model import ModelConfig
from sft.train import SFTConfig
from tokenizer.train import TokenizerConfig
from trainer import TrainConfig

experiment = Experiment(
    name="demo",
    model=ModelConfig(vocab_size=4_096, context_length=256, n_layers=4, d_model=128, n_heads=2),
    corpus=CorpusConfig(sources=(PythonDocs(),)),
    tokenizer=TokenizerConfig(vocab_size=4_096),
    pack=PackConfig(),
    pretrain=TrainConfig(
        steps=1_800,
        compile=False,  # two minutes are too short a run for it to pay off
        batch_size=4,
        learning_rate=3e-3,
        optimizer="muon",
        schedule="linear",
        beta2=0.99,  # steps this small are noisy: a longer memory steadies them
        warmup_steps=100,
        eval_every=500,
        eval_rows=128,
        save_every=500,
    ),
    sft=SFTConfig(
        train=TrainConfig(
            epochs=1.5,
            compile=False,
            batch_size=4,
            learning_rate=4e-3,
            warmup_fraction=0.1,
            schedule="linear",
            weight_decay=0.0,
            eval_every=250,
            save_every=500,
        ),
    ),
    dpo=DPOConfig(
        loss=LossConfig(beta=0.5),
        reference="adapter_off",  # less than an epoch: to note what the reference thinks of all pairs would take longer
        train=TrainConfig(
            steps=300,
            compile=False,
            batch_size=16,
            learning_rate=2e-4,
            warmup_fraction=0.1,
            schedule="linear",
            weight_decay=0.0,
            eval_every=100,
            eval_rows=300,
            save_every=300,
        ),
    ),
)
