"""Packages that an extra brings: imported when they are needed, missed in one sentence."""

import importlib
import logging
from typing import Any

from kleash.errors import ModelError


def require_package(name: str, purpose: str, extra: str) -> Any:
    """An optional package.

    Args:
        name: of the package.
        purpose: what it is expected for.
        extra: of kleash, which brings it.

    Raises:
        ModelError: it is not installed.
    """
    # Before it is imported, which peft does wherever it is installed: bitsandbytes says then that
    # it has no faster product for this CPU, the one that is not used here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ModelError(
            f"expected the package {name} for {purpose}, got none installed: "
            f"pip install 'kleash[{extra}]'"
        ) from error
