"""demo: the whole life of a small language model, in minutes on two CPU cores. Run it with `make demo`."""

# Start here. An experiment is one file like this: copy it, rename it, change a number, and run
# `python pipeline.py configs/mine.py`. A field that is not set here has a default: see its class.

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
    name="demo",  # everything it makes goes to runs/demo/
    # 1. The model: a LLaMA with 4 layers and width 128. It reads at most 256 tokens.
    model=ModelConfig(vocab_size=4_096, context_length=256, n_layers=4, d_model=128, n_heads=2),
    # 2. The text: the documentation inside Python and the packages on this machine. No download.
    corpus=CorpusConfig(sources=(PythonDocs(),)),
    # 3. The tokenizer cuts text into 4,096 different pieces. It is trained on the corpus.
    tokenizer=TokenizerConfig(vocab_size=4_096),
    # 4. The corpus as one long file of tokens, a small share of it held out to measure on.
    pack=PackConfig(),
    # 5. Pretraining: the model learns to predict the next token.
    pretrain=TrainConfig(
        steps=1_800,
        compile=False,  # compiling takes half a minute: too long for a run of two minutes
        batch_size=4,  # rows of 256 tokens per step
        learning_rate=3e-3,  # the peak: the rate rises to it, then falls to 0
        optimizer="muon",
        schedule="linear",
        beta2=0.99,  # gradients of such small batches are noisy: average over more steps
        warmup_steps=100,
        eval_every=500,
        eval_rows=128,
        save_every=500,
    ),
    # 6. Supervised fine-tuning (SFT): the model learns to answer questions about the same documentation.
    #    Only an adapter (LoRA) is trained; add lora=None to train every weight.
    sft=SFTConfig(
        train=TrainConfig(
            epochs=1.5,  # passes over the conversations
            compile=False,
            batch_size=4,
            # An adapter takes a higher learning rate than a whole model. With 4e-3, held-out answers are 0.02 nats
            # better and plain text is 0.15 bits per byte worse.
            learning_rate=2e-3,
            warmup_fraction=0.1,
            schedule="linear",
            weight_decay=0.0,
            eval_every=250,
            save_every=500,
        ),
    ),
    # 7. Preference learning (DPO): the model learns to prefer the better of two answers.
    dpo=DPOConfig(
        loss=LossConfig(beta=0.5),  # a higher beta keeps the model closer to the SFT model
        reference="adapter_off",  # saves a pass over all pairs: this run reads less than an epoch
        train=TrainConfig(
            steps=300,
            compile=False,
            batch_size=16,  # pairs
            learning_rate=2e-4,
            warmup_fraction=0.1,
            schedule="linear",
            weight_decay=0.0,
            eval_every=100,
            eval_rows=300,
            save_every=300,
        ),
    ),
    # 8. What a run of this file usually gives: the report marks what is outside. Other versions of Python and of the
    #    packages have other documentation; a machine without bfloat16 rounds differently.
    expected={
        "corpus.documents": (20_000, 40_000),
        "tokenizer.bytes_per_token": (3.1, 3.5),
        "pack.train.tokens": (3_500_000, 7_000_000),
        "pretrain.validation.bits_per_byte": (1.59, 1.72),
        "sft_data.train.conversations": (9_000, 20_000),
        "sft.answers.loss": (3.4, 3.8),
        "dpo_data.train.pairs": (27_000, 60_000),
        "dpo.preference.win_rate": (0.87, 0.95),
    },
)
