"""micro_web: 9,438,336 parameters on 200 million tokens of the sources of tiny_web."""

from dataclasses import replace

from configs.micro import experiment as micro
from configs.tiny_web import experiment as tiny_web
from configs.tokenizer_web import M, mix

experiment = replace(
    tiny_web,
    name="micro_web",
    model=micro.model,
    corpus=mix(c4=50 * M, books=50 * M, fineweb_edu=50 * M, wikipedia=50 * M),
    pretrain=replace(tiny_web.pretrain, learning_rate=2e-3, min_lr=2e-4, batch_size=32),
)
