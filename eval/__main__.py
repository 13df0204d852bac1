"""Trained models to numbers.

    python -m eval configs/tiny.py   ->  runs/tiny/eval: results.json, continuations.json

A stage whose model is missing is not trained here: that takes hours, and is asked of the user.
"""

import argparse
import time
from pathlib import Path

import checkpoint
import configs
import data.pack
import stage
from eval.continuations import continuations
from eval.language import validation
from machine import pick_device
from stage import Stage, log


def main(arguments: argparse.Namespace) -> None:
    experiment = configs.load(arguments.config)
    if arguments.checkpoint:
        final = Path(arguments.checkpoint)
        directory = final.parent / f"eval_{final.name}"
    else:
        final, directory = experiment.trained("pretrain"), experiment.directory("eval")
    packed = experiment.directory("pack")
    remake = f"python -m eval {experiment.path}"
    read = (stage.outputs(final) | stage.outputs(packed)) if stage.read_manifest(packed) else {}
    job = Stage(directory, {"eval": experiment.eval}, read, remake)
    if job.up_to_date(arguments.force):
        log.info(f"{directory} is up to date")
        return
    spm = experiment.load_tokenizer(final)
    splits = data.pack.load(packed, spm.sha256, f"python -m data.pack {experiment.path}")
    checkpoint.must_match(final, spm.sha256)
    model = checkpoint.load_model(final, str(pick_device()))
    with job.making():
        started = time.perf_counter()
        numbers = validation(model, splits["val"], spm)
        log.info(
            f"validation: loss {numbers['loss']:.4f}, perplexity {numbers['perplexity']:.2f}, bits per byte "
            f"{numbers['bits_per_byte']:.4f} ± {numbers['stderr']:.4f} (xz -9: {numbers['xz_bits_per_byte']:.4f}), "
            f"{numbers['n']:,} tokens in {time.perf_counter() - started:.1f} s"
        )
        stage.write_json(directory / "results.json", {"pretrain": {"validation": numbers}})
        examples = continuations(model, splits["val"], spm, experiment.eval)
        stage.write_json(directory / "continuations.json", examples)
        job.finish({"tokens": numbers["n"], "continuations": len(examples)})
        log.info(f"evaluated: {directory / 'results.json'}")


if __name__ == "__main__":
    p = stage.parser(__doc__, makes=True)
    p.add_argument("--checkpoint", metavar="DIR", help="a trained model by path; results go to eval_NAME beside it")
    stage.run(main, p.parse_args())
