"""micro: 9,438,336 parameters, on the data of tiny."""

from dataclasses import replace

from configs.tiny import experiment as tiny

experiment = replace(
    tiny,
    name="micro",
    model=replace(tiny.model, n_layers=4, d_model=128, n_heads=2),
    pretrain=replace(tiny.pretrain, learning_rate=2e-3, min_lr=2e-4),
    shared={"corpus": tiny, "tokenizer": tiny, "pack": tiny},
)
