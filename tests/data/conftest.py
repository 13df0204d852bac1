"""Raw text in a directory of its own."""

from pathlib import Path

import pytest


@pytest.fixture
def raw(tmp_path: Path, monkeypatch) -> Path:
    """Where sources look for files."""
    (tmp_path / "raw").mkdir()
    monkeypatch.setenv("DATA", str(tmp_path / "raw"))
    return tmp_path / "raw"
