"""tiny_web: 23,072,000 parameters on 600 million tokens: web pages, educational pages, encyclopaedia, books."""

from dataclasses import replace

from configs.tokenizer_web import M, mix
from configs.tokenizer_web import experiment as tokenizer_web

experiment = replace(
    tokenizer_web,
    name="tiny_web",
    corpus=mix(c4=150 * M, books=150 * M, fineweb_edu=150 * M, wikipedia=150 * M),
    pretrain=replace(
        tokenizer_web.pretrain,
        epochs=1,
        batch_size=64,
        micro_batch_size=16,
        warmup_steps=400,
        eval_every=500,
        save_every=500,
    ),
    shared={"tokenizer": tokenizer_web},
)
