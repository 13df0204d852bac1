"""Checkpoints: saved whole or not at all, verified before they are read, and never able to run code.

A checkpoint is a directory with `weights.pt` (float32, by parameter name), `state.pt` (what resuming needs beside them)
and `manifest.json` with the digests of both. It is written under a temporary name, flushed to disk, and renamed. Of a
model that is frozen in part, `adapter.pt` has the rest, and the manifest says where its base is and with what digest.
"""

import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

import lora
import stage
from cli import UserError, log
from model import ModelConfig, Transformer


def save(directory: Path, files: dict[str, dict], about: dict) -> None:
    """Writes a checkpoint directory, atomically, in place of one of the same name.

    files: by name, what `torch.load(weights_only=True)` reads: tensors, numbers, strings, and containers of them.
    about: the rest of the manifest, as `Stage.about` gives it.
    """
    temporary = directory.with_name(f".{directory.name}.partial")
    remove(temporary)
    temporary.mkdir(parents=True)
    try:
        for name, content in files.items():
            with open(temporary / name, "wb") as file:
                torch.save(_interned(content), file)
        wrote = stage.digests(temporary, temporary.glob("*.pt"))
        stage.write_manifest(temporary, about | {"wrote": wrote})
    except (OSError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = error.__context__  # torch covers what the disk said with an error of its own
        raise reason if isinstance(reason, OSError) else error from None
    put(temporary, directory)


def _interned(x):
    """Equal strings as one object: a pickle notes which are, and equal content is to give equal bytes."""
    if isinstance(x, dict):
        return {_interned(key): _interned(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)(map(_interned, x))
    return sys.intern(x) if type(x) is str else x


def put(temporary: Path, directory: Path) -> None:
    """Renames a finished directory to its name, in place of one that is there."""
    if os.path.lexists(directory):  # two renames, with the old one whole beside until the new one stands: see `recover`
        old = directory.with_name(f".{directory.name}.old")
        remove(old)
        os.rename(directory, old)
        os.rename(temporary, directory)
        stage.sync(directory.parent)
        remove(old)
    else:
        os.rename(temporary, directory)
        stage.sync(directory.parent)


def remove(path: Path) -> None:
    """Removes what may stand at a path: a directory, a file, or a link, without what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def recover(parent: Path) -> None:
    """Clears up after a process killed while saving: restores what was moved aside, removes what is partial."""
    for old in parent.glob(".*.old"):
        if not (target := parent / old.name[1:-4]).exists():
            remove(target)  # a link that leads nowhere
            os.rename(old, target)
        else:
            remove(old)
    for partial in parent.glob(".*.partial"):
        remove(partial)


def read_manifest(directory: Path) -> dict:
    """A checkpoint's manifest. UserError if it is missing or damaged."""
    if (manifest := stage.read_manifest(directory)) is None:
        raise UserError(f"{directory} is not a checkpoint: it has no manifest.json")
    return manifest


def read(directory: Path, file: str) -> dict:
    """One of a checkpoint's files, on the CPU, its digest checked first. UserError if it is missing or damaged."""
    manifest = read_manifest(directory)
    if file not in manifest["wrote"]:
        raise UserError(f"{directory} has no {file}; it holds {', '.join(manifest['wrote'])}")
    if wrong := stage.damage(directory, {file: manifest["wrote"][file]}):
        raise UserError(f"{wrong}: the checkpoint is damaged; use another")
    try:
        with warnings.catch_warnings(action="ignore"):  # of other pickles: those are refused
            return torch.load(directory / file, map_location="cpu", weights_only=True)
    except Exception as error:  # a file made to harm can break the reader anywhere; torch advises to read it unsafely
        what = f"holds something other than tensors and numbers ({type(error).__name__})"
        raise UserError(f"{directory / file} {what}; use another checkpoint") from None


def weights(model: torch.nn.Module) -> tuple[str, dict]:
    """What a checkpoint keeps of a model, and in which file: all of it, or, if part of it is frozen, the rest."""
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    kept = {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}
    return "adapter.pt" if frozen else "weights.pt", kept


def load_weights(directory: Path, model: torch.nn.Module, name: str = "default") -> None:
    """Puts into a model what `weights` has kept of it. UserError if that is missing, damaged, or another model's.

    name: of the adapter, if it is one; on disk it is always "default".
    """
    file, expected = weights(model)
    found = read(directory, file)
    if file == "adapter.pt":
        found = {key.removesuffix("default") + name: tensor for key, tensor in found.items()}
    try:
        if missing := sorted(expected.keys() - found.keys()):
            raise RuntimeError(f"it has no {missing[0]}")
        if unexpected := model.load_state_dict(found, strict=False).unexpected_keys:
            raise RuntimeError(f"the model has no {unexpected[0]}")
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{directory} does not hold the model its manifest describes: {error}") from None


def steps(parent: Path) -> list[tuple[int, Path]]:
    """(step, directory) of every checkpoint that a run can resume from, newest first."""
    found = []
    for path in parent.glob("*"):
        if re.fullmatch(r"step_\d+|final", path.name):
            try:
                if manifest := stage.read_manifest(path):
                    found.append((int(manifest["counts"]["step"]), path))
            except (UserError, LookupError, TypeError, ValueError) as error:
                log.warning(f"{error!s}: passing over {path}")
    return sorted(found, reverse=True)


def newest(parent: Path) -> Iterator[Path]:
    """Checkpoints to resume from, newest first, those with a damaged file left out with a warning."""
    for _, directory in steps(parent):
        if wrong := stage.damage(directory, stage.read_manifest(directory)["wrote"]):
            log.warning(f"{wrong}: passing over {directory}")
        else:
            yield directory


def must_match(directory: Path, tokenizer_sha256: str) -> None:
    """UserError if a checkpoint was not trained on the output of this tokenizer."""
    manifest = read_manifest(directory)
    found = next((digest for path, digest in manifest["read"].items() if path.endswith("spm.model")), "none")
    if found != tokenizer_sha256:
        raise UserError(
            f"{directory} was trained with tokenizer {found[:12]}…, but the tokenizer here is "
            f"{tokenizer_sha256[:12]}…; use the config that it was trained with, or train it anew"
        )


def load_model(directory: Path | str, device: str = "cpu") -> Transformer:
    """The trained model in a checkpoint directory, ready to generate; an adapter merged into its base. UserError if one
    of them is missing, damaged, or not what the other was trained with."""
    directory = Path(directory)
    if adapts(directory):
        model = load_model(base(directory))
        load_adapter(directory, model)
        lora.fold(model)
    else:
        shape = dict(read_manifest(directory)["config"]["model"])
        del shape["type"], shape["kernels"]  # the kernels are those of this machine
        model = Transformer(ModelConfig(**shape))
        load_weights(directory, model)
    model.digest = digest(directory)
    return model.eval().to(device)


def load_adapter(directory: Path | str, model: Transformer, name: str = "default") -> None:
    """Puts the adapter in a checkpoint directory on its base, beside those that are there, and in use.

    model: as `load_model` gives it for `base(directory)`. The row of a control piece in its output projection may
    change (`lora.init_end_piece`). UserError for an adapter of another model.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    if getattr(model, "digest", "none") not in manifest["read"].values():
        raise UserError(f"{directory} holds an adapter of another model; load the one in {base(directory)}")
    if pieces := manifest["config"].get("begin"):
        lora.init_end_piece(model, **pieces)
    fields = {key: value for key, value in manifest["config"]["lora"].items() if key != "type"}
    lora.attach(model, lora.LoRAConfig(**fields | {"targets": tuple(fields["targets"])}), name)
    load_weights(directory, model, name)


def template(directory: Path) -> str | None:
    """How a checkpoint's model was taught to answer; None: it was not, and goes on with a text."""
    return read_manifest(directory)["config"].get("template")


def digest(directory: Path) -> str:
    """The SHA-256 of a checkpoint's weights or adapter. UserError if it has neither."""
    wrote = read_manifest(directory)["wrote"]
    if not (found := [file["sha256"] for name, file in wrote.items() if name in ("weights.pt", "adapter.pt")]):
        meant = f"; did you mean {directory / 'final'}?" if (directory / "final").is_dir() else ""
        raise UserError(f"{directory} is not a checkpoint: it has no weights.pt and no adapter.pt{meant}")
    return found[0]


def adapts(directory: Path) -> bool:
    """Whether a checkpoint holds an adapter only."""
    return "adapter.pt" in read_manifest(directory)["wrote"]


def base(directory: Path) -> Path:
    """The checkpoint that an adapter was trained on. UserError if it is not there, or not what it was."""
    manifest = read_manifest(directory)
    found = Path(os.path.normpath(directory.resolve() / manifest["config"]["base"]))  # which may be absolute
    if stage.read_manifest(found) is None:
        raise UserError(f"{directory} holds an adapter of the model in {found}, which is not there; put it back there")
    if digest(found) not in manifest["read"].values():
        raise UserError(
            f"{directory} holds an adapter of another model than the one that is now in {found} "
            f"({digest(found)[:12]}…); put that back, or train the adapter anew"
        )
    return found
