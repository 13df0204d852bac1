"""tiny: 23,072,000 parameters on the embedded corpus, for 6 epochs. The other sizes share its corpus and tokenizer."""

from configs import Experiment
from data.corpus import CorpusConfig
from data.pack import PackConfig
from data.sources import PythonDocs
from model import ModelConfig
from tokenizer.train import TokenizerConfig
from trainer import TrainConfig

experiment = Experiment(
    name="tiny",
    model=ModelConfig(vocab_size=32_768, context_length=1_024, n_layers=6, d_model=256, n_heads=4),
    corpus=CorpusConfig(sources=(PythonDocs(),)),
    tokenizer=TokenizerConfig(vocab_size=32_768),
    pack=PackConfig(),
    pretrain=TrainConfig(
        epochs=6,
        batch_size=16,
        micro_batch_size=4,
        learning_rate=1e-3,
        min_lr=1e-4,
        warmup_steps=100,
        eval_every=100,
        eval_rows=64,
        save_every=100,
    ),
)
