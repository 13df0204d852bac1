"""prose_micro: 9,438,336 parameters, on the data of prose_tiny."""

from dataclasses import replace

from configs.micro import experiment as micro
from configs.prose_tiny import experiment as prose_tiny

experiment = replace(
    prose_tiny,
    name="prose_micro",
    model=micro.model,
    shared={"corpus": prose_tiny, "tokenizer": prose_tiny, "pack": prose_tiny},
)
