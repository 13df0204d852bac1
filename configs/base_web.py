"""base_web: 276,861,696 parameters in two phases of 1.5 billion tokens each, first of high quality, then diverse."""

from dataclasses import replace

from configs.base import experiment as base
from configs.tiny_web import experiment as tiny_web
from configs.tokenizer_web import M, mix
from data.batches import Phase

BATCH = 256
PHASE = 1_500 * M // (BATCH * base.model.context_length)  # steps

experiment = replace(
    tiny_web,
    name="base_web",
    model=base.model,
    # Of the first three, a third of phase A and a quarter of phase B; a little more, to pay for what is held out.
    corpus=mix(c4=400 * M, books=925 * M, fineweb_edu=925 * M, wikipedia=925 * M),
    pretrain=replace(
        tiny_web.pretrain,
        epochs=None,
        steps=2 * PHASE,
        learning_rate=4e-4,
        min_lr=4e-5,
        batch_size=BATCH,
        warmup_steps=1_000,
        save_every=250,
    ),
    mixture=(
        Phase(start=0, weights={"fineweb_edu": 1, "wikipedia": 1, "books": 1}),
        Phase(start=PHASE, weights={"fineweb_edu": 1, "wikipedia": 1, "books": 1, "c4": 1}),
    ),
)
