"""Optional packages: import one, or say in one line how to install it."""

from __future__ import annotations

import importlib
from types import ModuleType

from moco.errors import DataError


def import_optional(module: str, purpose: str, package: str | None = None) -> ModuleType:
    """Import a module that only some commands need; call it before any work starts.

    Args:
        module: its dotted name, such as "sklearn.manifold".
        purpose: what needs it, the beginning of the message.
        package: its name for pip, where that is not the module's.

    Raises:
        DataError: it is not installed, or one that it imports is not.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = package or module.partition(".")[0]
        missing = (error.name or module).partition(".")[0]
        because = "" if missing == module.partition(".")[0] else f" (importing it: {error})"
        raise DataError(
            f"{purpose} needs the package {package}: pip install {package}{because}"
        ) from None
