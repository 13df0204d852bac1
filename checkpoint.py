"""Checkpoints: saved whole or not at all, checked before they are read. Reading one cannot run code.

weights.pt       float32 weights by parameter name; if some are frozen, adapter.pt with only the trained ones instead
state.pt         the other things that resuming needs: optimizers, random generators, the step
manifest.json    SHA-256 of both; for an adapter also the path and the SHA-256 of its base
"""

import glob
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

import lora
import stage
import tokenizer
from cli import UserError, log
from model import ModelConfig, RopeScaling, Transformer
from stage import Stage


@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """Yields a temporary directory, which replaces `directory` at the end of the block, unless the block fails."""
    recover(directory.parent, directory.name)
    temporary = directory.with_name(f".{directory.name}.partial")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in temporary.rglob("*"):
            stage.sync(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    # A directory cannot be renamed over another. So first mark the new one as complete. From now on `recover` puts it
    # in place, in this process or in the next one.
    os.rename(temporary, directory.with_name(f".{directory.name}.new"))
    stage.sync(directory.parent)
    recover(directory.parent, directory.name)


def recover(parent: Path, name: str | None = None) -> None:
    """Finishes what `replacing` began: puts new directories in their places, removes partial ones."""
    # name: of the directory; None: all in the parent. No other process may be writing them.
    pattern = glob.escape(name) if name else "*"
    for new in parent.glob(f".{pattern}.new"):
        directory = parent / new.name[1:-4]
        remove(directory)
        os.rename(new, directory)
        stage.sync(parent)
    for partial in parent.glob(f".{pattern}.partial"):
        remove(partial)


def remove(path: Path) -> None:
    """Removes a directory, a file, or a link without its target. Nothing happens if the path does not exist."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def save(directory: Path, files: dict[str, dict], about: dict) -> None:
    """Writes a checkpoint directory, atomically: see `write`."""
    with replacing(directory) as temporary:
        write(temporary, files, about)


def write(directory: Path, files: dict[str, dict], about: dict) -> None:
    """Writes tensors, numbers, strings and containers of them to files, by name. about: the rest of the manifest."""
    try:
        for name, content in files.items():
            with open(directory / name, "wb") as file:
                torch.save(_interned(content), file)
    except RuntimeError as error:
        raise error.__context__ or error from None  # torch hides "no space left" behind an error of its own
    stage.write_manifest(directory, about | {"wrote": stage.digests(directory, directory.glob("*.pt"))})


def _interned(x):
    """The same content with equal strings as one object: pickle writes an object once, and then refers to it."""
    if isinstance(x, dict):
        return {_interned(key): _interned(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)(map(_interned, x))
    return sys.intern(x) if type(x) is str else x


def read_manifest(directory: Path) -> dict:
    """A checkpoint's manifest. UserError if the directory is no checkpoint, or the manifest is damaged."""
    manifest = stage.read_manifest(directory)
    if manifest and manifest["wrote"].keys() & {"weights.pt", "adapter.pt"}:
        return manifest
    final = directory / "final"
    hint = f"did you mean {final}?" if final.is_dir() else "expected a directory such as runs/NAME/pretrain/final"
    problem = "holds no weights" if directory.exists() else "does not exist"
    raise UserError(f"{directory} is not a checkpoint: it {problem}; {hint}")


def read(directory: Path, file: str) -> dict:
    """One of a checkpoint's files, on the CPU. UserError if it is missing or its digest is wrong."""
    wrote = read_manifest(directory)["wrote"]
    if file not in wrote:
        raise UserError(f"{directory} has no {file}; it holds {', '.join(wrote)}")
    if wrong := stage.damage(directory, {file: wrote[file]}):
        raise UserError(f"{wrong}: the checkpoint is damaged; use another")
    try:
        return torch.load(directory / file, map_location="cpu", weights_only=True)
    except Exception as error:  # of any type, if a file is malicious; torch's own message suggests to trust the file
        what = f"{directory / file} holds something other than tensors and numbers ({type(error).__name__})"
        raise UserError(f"{what}; use another checkpoint") from None


def steps(parent: Path) -> list[tuple[int, Path]]:
    """(step, directory) of every checkpoint that a run can resume from, newest first."""
    table = []
    for path in parent.glob("*"):
        try:
            if re.fullmatch(r"step_\d+|final", path.name) and (manifest := stage.read_manifest(path)):
                table.append((manifest["counts"]["step"], path))
        except UserError as error:
            log.warning(f"{error}: passing over {path}")
    return sorted(table, reverse=True)


def newest(parent: Path) -> Iterator[Path]:
    """Checkpoints to resume from, newest first. Damaged ones are left out with a warning."""
    for _, directory in steps(parent):
        if wrong := stage.damage(directory, read_manifest(directory)["wrote"]):
            log.warning(f"{wrong}: passing over {directory}")
        else:
            yield directory


def find(job: Stage, resume: str) -> Path | None:
    """The named or newest undamaged checkpoint; None if there is none. UserError if it does not fit this run."""
    if resume == "auto":
        start = next(newest(job.directory), None)
    else:
        start = Path(resume)
        if not start.is_dir() or (start / "final").is_dir():
            known = ", ".join(str(path) for _, path in steps(job.directory)) or "none"
            raise UserError(f"{start} is not a checkpoint; this run has: {known}")
        read(start, "state.pt")
        step = read_manifest(start)["counts"]["step"]
        if later := [path.name for s, path in steps(job.directory) if s > step]:
            newer = f"{', '.join(later)} in {job.directory}"
            raise UserError(f"{start} is older than {newer}; move these away, or give the experiment another name")
    if start is not None:
        job.must_match(start)
    return start


def digest(directory: Path) -> str:
    """The SHA-256 of a checkpoint's weights or adapter. UserError if the directory is no checkpoint."""
    wrote = read_manifest(directory)["wrote"]
    return wrote["weights.pt" if "weights.pt" in wrote else "adapter.pt"]["sha256"]


def trained_with(directory: Path) -> str:
    """The SHA-256 of the tokenizer that a checkpoint was trained with; "none" if it names no tokenizer."""
    read = read_manifest(directory)["read"]
    return next((digest for path, digest in read.items() if path.endswith(tokenizer.FILES)), "none")


def must_match(directory: Path, tokenizer_sha256: str) -> None:
    """UserError if a checkpoint was not trained with this tokenizer."""
    if (sha256 := trained_with(directory)) != tokenizer_sha256:
        what = f"{directory} was trained with tokenizer {sha256[:12]}…, not with {tokenizer_sha256[:12]}…"
        raise UserError(f"{what}; use the config that it was trained with, or train it again with this tokenizer")


def template(directory: Path) -> str | None:
    """The template in which a checkpoint's model learnt to answer. None: it only continues a text."""
    return read_manifest(directory)["config"].get("template")


def weights(model: torch.nn.Module) -> tuple[str, dict]:
    """The name and content of a checkpoint's file: all tensors, or only the trained ones if some are frozen."""
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    kept = {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}
    return "adapter.pt" if frozen else "weights.pt", kept


def load_weights(directory: Path, model: torch.nn.Module, name: str = "default") -> None:
    """Loads a checkpoint's tensors into a model. UserError if they are damaged, or belong to another model."""
    # name: the adapter's name in this model; on disk it is always "default".
    file, expected = weights(model)
    tensors = read(directory, file)
    if file == "adapter.pt":
        tensors = {key.removesuffix("default") + name: tensor for key, tensor in tensors.items()}
    try:
        if different := sorted(expected.keys() ^ tensors.keys()):
            raise RuntimeError(f"only one of them has {different[0]}")
        model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise UserError(f"{directory} does not hold the model its manifest describes: {error}") from None


def load_model(
    directory: Path | str, device: str = "cpu", shape: ModelConfig | None = None, dtype: torch.dtype = torch.float32
) -> Transformer:
    """The trained model in a checkpoint directory, ready to generate. An adapter is merged into its base."""
    # dtype: of the parameters; bfloat16 takes half of the memory. The tables of rotary positions stay float32.
    # UserError: a file is missing or damaged, the adapter's base has changed, or the shape is not the expected one.
    directory = Path(directory)
    if adapts(directory):
        model = load_model(base(directory), shape=shape)
        load_adapter(directory, model)
        lora.fold(model)
    else:
        fields = dict(read_manifest(directory)["config"]["model"])
        del fields["type"], fields["kernels"]  # this machine chooses its own kernels
        if scaling := fields.get("rope_scaling"):
            del scaling["type"]
            fields["rope_scaling"] = RopeScaling(**scaling)
        saved = ModelConfig(**fields)
        shape = shape or saved
        # The names and shapes of tensors do not show rope_theta or rms_norm_eps: compare every field.
        if different := "; ".join(stage.differences(full(saved), full(shape))):
            problem = f"{directory} holds a model of another shape than the config describes: {different}"
            raise UserError(f"{problem}; correct `model` in the config, or make the model again")
        model = Transformer(shape)
        load_weights(directory, model)
    model.digest = digest(directory)
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model.eval().to(device)


def full(shape: ModelConfig) -> dict:
    """The fields of a shape, with None replaced by its number. Without `kernels`, which changes no result."""
    fields = asdict(shape) | {"n_kv_heads": shape.n_kv_heads or shape.n_heads, "d_ff": shape.d_ff or 4 * shape.d_model}
    del fields["kernels"]
    return fields


def adapts(directory: Path) -> bool:
    """True if a checkpoint holds only an adapter."""
    return "adapter.pt" in read_manifest(directory)["wrote"]


def base(directory: Path) -> Path:
    """The checkpoint that an adapter was trained on. UserError if it is missing or has changed."""
    manifest = read_manifest(directory)
    path = Path(os.path.normpath(directory.resolve() / manifest["config"]["base"]))  # relative or absolute
    if stage.read_manifest(path) is None or digest(path) not in manifest["read"].values():
        what = f"{directory} holds an adapter of the model in {path}, which is not there or has changed"
        raise UserError(f"{what}; put the old one back, or train the adapter again")
    return path


def load_adapter(directory: Path | str, model: Transformer, name: str = "default") -> None:
    """Adds an adapter to its base, from `load_model(base(directory))`, and activates it. UserError for another base."""
    directory = Path(directory)
    manifest = read_manifest(directory)
    if getattr(model, "digest", "none") not in manifest["read"].values():
        raise UserError(f"{directory} holds an adapter of another model; load the one in {base(directory)}")
    if pieces := manifest["config"].get("begin"):
        lora.init_end_piece(model, **pieces)  # may change a row of the output projection
    fields = dict(manifest["config"]["lora"])
    del fields["type"]
    lora.attach(model, lora.LoRAConfig(**fields | {"targets": tuple(fields["targets"])}), name)
    load_weights(directory, model, name)
