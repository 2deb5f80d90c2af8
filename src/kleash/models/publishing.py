"""A checkpoint's policy on the Hugging Face Hub, whole or not at all.

What goes up is the directory that training wrote and verified: weights, configuration, generation
configuration, tokenizer, and a card that says the reference, β, the exact KL with its interval, and
the score. A directory that lacks one of them, or that others could not open, stays here.
"""

import json
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from kleash.errors import ModelError
from kleash.models.probing import first_lines
from kleash.storage.atomic_directories import checkpoint_of, step_of, verify_checkpoint

_NEEDED = ("README.md", "generation_config.json", "tokenizer_config.json")
_FOR_RESUMING = ("adapter_state/*",)


@runtime_checkable
class HubClient(Protocol):
    """The two calls that are needed of `huggingface_hub.HfApi`."""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any:
        """Make a repository, or find it."""
        ...

    def upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: str,
        commit_message: str,
        ignore_patterns: list[str],
    ) -> Any:
        """Put a directory's files into it, in one commit."""
        ...


def push_run(
    run: Path, repo: str, *, client: HubClient, step: int | None = None, private: bool = True
) -> str:
    """Put the policy of a run's checkpoint on the hub.

    Args:
        run: the run directory.
        repo: `owner/name`.
        client: of the hub.
        step: whose checkpoint; None: the newest.
        private: who may see a repository that is made now.

    Returns:
        Where it is.

    Raises:
        RunError: the run has no such checkpoint, or it is damaged.
        ModelError: its policy is not complete, or the hub refuses it.
    """
    checkpoint = checkpoint_of(run, step=step)
    verify_checkpoint(checkpoint)
    policy = checkpoint / "policy"
    require_complete(policy)
    try:
        client.create_repo(repo, private=private, exist_ok=True)
        client.upload_folder(
            repo_id=repo,
            folder_path=str(policy),
            commit_message=f"Policy after step {step_of(checkpoint)}, from kleash",
            ignore_patterns=list(_FOR_RESUMING),
        )
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        raise ModelError(
            f"expected the hub to take {repo!r}, got {type(error).__name__}: {first_lines(error)}; "
            "check the name and log in with `hf auth login`"
        ) from error
    return f"https://huggingface.co/{repo}"


def require_complete(policy: Path) -> None:
    """Check that a directory is all that others need.

    Raises:
        ModelError: naming what is missing, or a base that only this machine has.
    """
    missing = [name for name in _NEEDED if not (policy / name).is_file()]
    if not any(policy.glob("*.safetensors")):
        missing.append("*.safetensors")
    if not ((policy / "config.json").is_file() or (policy / "adapter_config.json").is_file()):
        missing.append("config.json")
    if missing:
        why = (
            "; the card is written where the KL was measured after the update: give "
            "prompts.heldout, and take a checkpoint that an evaluation follows"
            if "README.md" in missing
            else ""
        )
        raise ModelError(
            f"expected a complete policy in {str(policy)!r}, got none of {', '.join(missing)}{why}"
        )
    settings = policy / "adapter_config.json"
    if settings.is_file():
        made = cast("dict[str, Any]", json.loads(settings.read_text(encoding="utf-8")))
        base = str(made.get("base_model_name_or_path"))
        if Path(base).is_absolute() or Path(base).exists():
            raise ModelError(
                f"expected an adapter whose base is on the hub, got {base!r}, which only this "
                "machine has: train with the hub's name as policy.path"
            )
