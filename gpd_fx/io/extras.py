"""Packages that only parts of the library need, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

from gpd_fx.errors import ArgumentError


def need(module: str, purpose: str, extra: str = "train") -> Any:
    """Import `module`, or say which extra has it.

    Raises:
        ArgumentError: the package cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ArgumentError(
            f"{purpose} needs {package}, which cannot be imported ({error}); install it with "
            f"pip install 'gpd_fx[{extra}]'"
        ) from error
