"""Raw text to batches: sources, cleaning, quality, deduplication, corpus, packed tokens."""

import importlib
import types

from cli import UserError


def extra(module: str, package: str, why: str) -> types.ModuleType:
    """Imports an optional package. UserError, with the command that installs it, if it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] != module.partition(".")[0]:
            raise  # a package that this one needs
        raise UserError(f"{why} needs {package}; install it with: pip install {package}") from None
