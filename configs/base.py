"""base: 276,861,696 parameters, on the data of tiny."""

from dataclasses import replace

from configs.tiny import experiment as tiny

experiment = replace(
    tiny,
    name="base",
    model=replace(tiny.model, n_layers=24, d_model=768, n_heads=12),
    pretrain=replace(tiny.pretrain, learning_rate=4e-4, min_lr=4e-5),
    shared={"corpus": tiny, "tokenizer": tiny, "pack": tiny},
)
