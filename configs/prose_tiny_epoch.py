"""prose_tiny_epoch: prose_tiny goes on to a whole epoch, 64 million tokens, from the last step before its rate falls.

python train.py configs/prose_tiny_epoch.py --resume runs/prose_tiny/pretrain/step_0002800
"""

from dataclasses import replace

from configs.prose_tiny import experiment as prose_tiny

experiment = replace(
    prose_tiny,
    name="prose_tiny_epoch",
    pretrain=replace(prose_tiny.pretrain, steps=None, epochs=1),
    shared=dict.fromkeys(("corpus", "tokenizer", "pack", "sft_data", "dpo_data"), prose_tiny),
)
