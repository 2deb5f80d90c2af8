"""The user's own Python: found by `module:name`, and reported by its own lines where it raises."""

import importlib
import importlib.util
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from kleash.errors import RewardError

_PACKAGE = str(Path(__file__).parents[1])
_LIBRARIES = tuple(sysconfig.get_paths()[kind] for kind in ("stdlib", "purelib", "platlib"))
_SHOWN = 3
"""Frames of a traceback that fit into a sentence."""


def find_callable(name: str) -> Callable[..., Any]:
    """A function or callable object of a module; the current directory is searched too.

    Args:
        name: `module:function`, or `module:object` with a method `__call__`; a file `x.py` may
            stand for the module.

    Raises:
        RewardError: there is none, or importing the module raises; the user's line is named.
    """
    module_name, _, function_name = name.rpartition(":")
    if not module_name or not function_name:
        raise RewardError(f"expected a reward function as 'module:function', got {name!r}")
    here = str(Path.cwd())
    # The console script's own directory is searched by default, not the user's.
    if here not in sys.path:
        sys.path.append(here)
    try:
        is_file = module_name.endswith(".py")
        module = _load(Path(module_name)) if is_file else importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # Importing runs the user's code: anything can come.
        raise RewardError(
            f"expected a module {module_name!r} for the reward function {name!r}, got "
            f"{described(error)}"
        ) from error
    return require_callable(getattr(module, function_name, None), name)


def _load(file: Path) -> ModuleType:
    """A module by its file, loaded once; it imports its neighbours as a script would."""
    name = str(file.resolve())
    if name in sys.modules:
        return sys.modules[name]
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise ImportError(f"no Python file at {file}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def require_callable(value: object, name: str) -> Callable[..., Any]:
    """The value, if it can be called with prompts and responses.

    Raises:
        RewardError: it is no function and no callable object.
    """
    if isinstance(value, type):
        raise RewardError(
            f"expected a function or an object for the reward {name!r}, got the class "
            f"{value.__name__}: make an object of it, and name that"
        )
    if not callable(value):
        raise RewardError(
            f"expected a function for the reward {name!r}, got "
            f"{'none' if value is None else type(value).__name__}: check the name"
        )
    return cast(Callable[..., Any], value)


def described(error: BaseException) -> str:
    """An error of the user's code on one line: its kind, its message, and the lines it came from.

    Frames of this package and of libraries are left out; the innermost comes first.
    """
    message = (str(error).strip().splitlines() or [""])[0][:200]
    said = f"{type(error).__name__}: {message}" if message else type(error).__name__
    if isinstance(error, SyntaxError) and error.filename:
        return f"{said}, at {error.filename}:{error.lineno}"
    outside = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((_PACKAGE, "<frozen importlib"))
    ]
    # A library that the user calls says what is wrong; the user's own line says where.
    frames = [frame for frame in outside if not frame.filename.startswith(_LIBRARIES)] or outside
    places = [f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in reversed(frames)]
    if not places:
        return said
    return f"{said}, raised at {', called from '.join(places[:_SHOWN])}"
