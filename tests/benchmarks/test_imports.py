"""Benchmarks follow the code: each module imports, and an optimizer step of demo's two optimizers changes the model."""

import importlib
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_each_module_imports(path: Path):
    importlib.import_module(f"benchmarks.{path.stem}")


def test_a_step_is_of_every_optimizer():
    from benchmarks.cpu import training_step

    matrix, vector = (torch.nn.Parameter(torch.ones(size)) for size in ((2, 2), (3,)))
    model = torch.nn.ParameterList([matrix, vector])
    optimizers = [torch.optim.SGD([parameter], lr=0.1) for parameter in model]
    training_step(model, lambda: matrix.sum() + vector.sum(), optimizers)()
    assert all((parameter < 1).all() for parameter in model)
    assert all(parameter.grad is None for parameter in model)
