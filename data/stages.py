"""The stages up to packed tokens: for each, what identifies it and how to make it."""

import data.corpus
import data.pack
import tokenizer.train
from stage import Stage, Step

# owner: the `configs.Experiment` that owns the stage. switches: of the command line, with `workers` and `force`.


def corpus(owner, switches) -> Step:
    job = data.corpus.job(owner.corpus, owner.directory("corpus"), owner.command("corpus"))
    return Step(job, lambda: data.corpus.build(job, owner.corpus, switches.workers, switches.force))


def tokenizer_(owner, switches) -> Step:
    directory, command = owner.directory("tokenizer"), owner.command("tokenizer")
    if owner.imported:  # the tokenizer came with the imported model
        return Step(Stage(directory, {}, {}, command, __file__), owner.load_tokenizer)
    inputs = owner.tokenizer, owner.directory("corpus"), owner.pack.val_fraction
    job = tokenizer.train.job(*inputs, directory, command)
    return Step(job, lambda: tokenizer.train.build(job, *inputs, switches.force, switches.replaced))


def pack(owner, switches) -> Step:
    inputs = owner.pack, owner.directory("corpus"), owner.directory("tokenizer")
    job = data.pack.job(*inputs, owner.directory("pack"), owner.command("pack"))
    return Step(job, lambda: data.pack.build(job, *inputs, switches.workers, switches.force))


STAGES = {"corpus": corpus, "tokenizer": tokenizer_, "pack": pack}
