"""Whether a name that is no directory can be a model of the hub: asked once, before loading.

The library asks for every file and repeats each question for half a minute where nothing answers.
"""

from pathlib import Path

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from kleash.errors import ModelError

SECONDS = 5.0
"""How long to wait for the hub's answer."""


def require_source(what: str, path: str | Path, revision: str | None) -> None:
    """Check that there is something to load: a local path, files kept from before, or a hub model.

    Args:
        what: what is looked for, as "a model".
        path: a path or hub name.
        revision: of a hub name.

    Raises:
        ModelError: there is no such path, and the hub has no such model or cannot be reached.
    """
    name = str(path)
    if Path(path).exists() or _is_cached(name, revision):
        return
    reason = _why_not_on_hub(name, revision)
    if reason is not None:
        where = "" if Path(path).is_absolute() else f" (it is looked for in {Path.cwd()})"
        raise ModelError(
            f"expected {what} at {name!r} (a Hugging Face directory or hub name), got: nothing "
            f"there{where}{reason}"
        )


def _is_cached(name: str, revision: str | None) -> bool:
    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision or "main")
    except HFValidationError:
        return False
    return isinstance(found, str)


def _why_not_on_hub(name: str, revision: str | None) -> str | None:
    """Why the hub cannot provide this model; None: it can, or the loader's own words say why."""
    # A hub name has one slash at most, and goes nowhere upwards.
    if len(Path(name).parts) > 2 or name.startswith((".", "/", "~")) or name.endswith("/"):
        return ": check the path"
    if constants.HF_HUB_OFFLINE:
        return ", no copy of such a hub model, and HF_HUB_OFFLINE is set: check the path"
    try:
        HfApi().model_info(name, revision=revision, timeout=SECONDS)
    except HFValidationError:
        return ": check the path"
    except RevisionNotFoundError:
        return f", and the hub's model has no revision {revision!r}: check the revision"
    except RepositoryNotFoundError:
        return ", and the hub has no such model (or it is private): check the path or the name"
    except HfHubHTTPError:
        return None
    except Exception:
        # Whatever the library's transport raises where nothing answers.
        return ", and the hub cannot be reached: check the path, or the network"
    return None
