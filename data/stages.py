"""The stages up to packed tokens: for each, what identifies it (config and input digests) and how to make it.

experiment: a `configs.Experiment`. Its `owner` is the experiment that a stage belongs to: several can share a corpus.
"""

from collections.abc import Collection
from pathlib import Path

import data.corpus
import data.pack
import tokenizer.train as train_tokenizer
from stage import Step


def corpus(experiment, workers: int, force: bool) -> Step:
    experiment = experiment.owner("corpus")
    config = experiment.corpus
    job = data.corpus.job(config, experiment.directory("corpus"), experiment.command("corpus"))
    return Step(job, lambda: data.corpus.build(job, config, workers, force))


def tokenizer(experiment, workers: int, force: bool, replaced: Collection[Path] = ()) -> Step:
    """replaced: directories that are made again after it, and so may hold what the old tokenizer made."""
    experiment = experiment.owner("tokenizer")
    config, val_fraction, corpus = experiment.tokenizer, experiment.pack.val_fraction, experiment.directory("corpus")
    directory, command = experiment.directory("tokenizer"), experiment.command("tokenizer")
    job = train_tokenizer.job(config, corpus, val_fraction, directory, command)
    if experiment.imported:  # the tokenizer came with the imported model
        return Step(job, experiment.load_tokenizer)
    return Step(job, lambda: train_tokenizer.build(job, config, corpus, val_fraction, force, replaced))


def pack(experiment, workers: int, force: bool) -> Step:
    experiment = experiment.owner("pack")
    config, corpus, spm = experiment.pack, experiment.directory("corpus"), experiment.directory("tokenizer")
    job = data.pack.job(config, corpus, spm, experiment.directory("pack"), experiment.command("pack"))
    return Step(job, lambda: data.pack.build(job, config, corpus, spm, workers, force))


DATA = {"corpus": corpus, "tokenizer": tokenizer, "pack": pack}


def make_inputs(name: str, experiment, workers: int, made: set[Path]) -> None:
    """Makes the missing inputs of a stage, and their own inputs first. made: directories that are done already."""
    for owner, needed in experiment.inputs(name):
        directory = owner.directory(needed)
        if directory not in made:
            made.add(directory)
            make_inputs(needed, owner, workers, made)
            DATA[needed](owner, workers, force=False).make()
