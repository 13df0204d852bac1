"""A run of three stages, evaluated once."""

import shutil
from pathlib import Path

import pytest

from tests.conftest import Place
from tests.eval.test_main import evaluate


@pytest.fixture(scope="session")
def measured(preferring: Place, tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(Path(shutil.copytree(preferring.path, tmp_path_factory.mktemp("measured"), dirs_exist_ok=True)))
    place.output = evaluate(place)
    return place
