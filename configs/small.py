"""small: 83,898,880 parameters, on the data of tiny."""

from dataclasses import replace

from configs.tiny import experiment as tiny

experiment = replace(
    tiny,
    name="small",
    model=replace(tiny.model, n_layers=12, d_model=512, n_heads=8),
    pretrain=replace(tiny.pretrain, learning_rate=6e-4, min_lr=6e-5),
    shared={"corpus": tiny, "tokenizer": tiny, "pack": tiny},
)
