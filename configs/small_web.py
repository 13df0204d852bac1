"""small_web: 83,898,880 parameters on 1.8 billion tokens of the sources of tiny_web."""

from dataclasses import replace

from configs.small import experiment as small
from configs.tiny_web import experiment as tiny_web
from configs.tokenizer_web import M, mix

experiment = replace(
    tiny_web,
    name="small_web",
    model=small.model,
    corpus=mix(c4=450 * M, books=450 * M, fineweb_edu=450 * M, wikipedia=450 * M),
    pretrain=replace(tiny_web.pretrain, learning_rate=6e-4, min_lr=6e-5, batch_size=128),
)
