"""Two checkpoints made comparable: opened, adapters put in, and checked to share their tokens.

A checkpoint may be a whole model or an adapter, which is merged into its base. Widths, depths,
dtypes and padding of the vocabulary may differ; the tokens may not.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from kleash.auditing.options import AuditDtype
from kleash.auditing.served_policy import PREFIX, open_served
from kleash.errors import ModelError
from kleash.models.loading import Dtype
from kleash.models.merging import adapter_settings, is_adapter
from kleash.models.policy import Identity, Policy, load_policy
from kleash.models.vocabulary import SharedVocabulary, shared_vocabulary
from kleash.storage.atomic_directories import checkpoint_of
from kleash.storage.run_directory import holds_run


@dataclass(frozen=True, eq=False)
class ModelPair:
    """A policy and the reference it is measured against. Both can write."""

    policy: Policy
    reference: Policy
    vocabulary: SharedVocabulary | None = None
    """The tokens that both are read over; None where the two need not share any."""

    @property
    def context(self) -> int | None:
        """Longest text that both can read; None: no limit known."""
        known = [m.context for m in (self.policy, self.reference) if m.context is not None]
        return min(known, default=None)


def load_pair(
    policy: str | Path,
    reference: str | Path,
    *,
    dtype: AuditDtype = "float32",
    device: str = "cpu",
) -> ModelPair:
    """Open both checkpoints and check that they can be compared.

    Args:
        policy: a Hugging Face directory or hub name, or the directory of a peft adapter.
        reference: the same.
        dtype: of parameters and arithmetic. "float32" measures the weights; "auto" takes each
            model as it is stored, and so measures its rounding as well.
        device: a torch device.

    Raises:
        ModelError: if a model cannot be used, or the two have different tokens.
    """
    ours = open_checkpoint(policy, dtype=dtype, device=device)
    return comparable_pair(ours, open_reference(reference, (policy, ours), dtype, device))


def open_reference(
    path: str | Path, policy: tuple[str | Path, Policy], dtype: AuditDtype, device: str
) -> Policy:
    """Open what a policy is measured against: the policy itself where it is the same directory.

    Args:
        path: as `open_checkpoint` takes it.
        policy: its path, and the policy as it was opened.
        dtype: of both.
        device: of both.

    Raises:
        ModelError, EngineError: as `open_checkpoint` does.
    """
    other, opened = policy
    path, other = model_directory(path), model_directory(other)
    # `vllm:DIR` is no directory: two engines are not one.
    if Path(path).is_dir() and Path(other).is_dir() and Path(path).samefile(other):
        return opened
    return open_checkpoint(path, dtype=dtype, device=device)


def model_directory(path: str | Path) -> str | Path:
    """The directory of a model: of a run the policy of its newest checkpoint, else the path itself.

    Raises:
        RunError: a run has no checkpoint.
    """
    run = Path(path)
    if not holds_run(run) or (run / "config.json").exists():
        return path
    return checkpoint_of(run) / "policy"


def open_checkpoint(path: str | Path, *, dtype: AuditDtype, device: str) -> Policy:
    """Open a model, or an adapter together with the base that it names; `vllm:DIR` with vLLM.

    Of a run's directory that is the policy of its newest checkpoint.

    Raises:
        ModelError: if either cannot be used.
        RunError: if a run has no checkpoint.
        EngineError: if vLLM cannot serve it.
    """
    if str(path).startswith(PREFIX):
        served = model_directory(str(path).removeprefix(PREFIX))
        return open_served(f"{PREFIX}{served}", device=device)
    path = model_directory(path)
    stored: Dtype = "float32" if dtype == "float64" else dtype
    if is_adapter(path):
        found = _open_adapter(Path(path), dtype=stored, device=device)
    else:
        # The audit measures padding itself, and can read one text at a time.
        found = load_policy(path, dtype=stored, device=device, padded=False)
    found.model.requires_grad_(False)
    if dtype == "float64":
        found.model.double()
    return found


def comparable_pair(policy: Policy, reference: Policy) -> ModelPair:
    """Both models, read over the tokens that both can produce.

    Raises:
        ModelError: naming the first token of the basic vocabulary that differs.
    """
    try:
        shared = shared_vocabulary(
            policy.tokenizer,
            reference.tokenizer,
            words=(policy.words, reference.words),
            path=reference.path,
        )
    except ModelError as error:
        raise ModelError(
            f"{error}; or compare whole texts with --texts FILE --bytes, in bits per byte"
        ) from None
    ours, theirs = (replace(model, words=shared.words) for model in (policy, reference))
    return ModelPair(ours, theirs, shared)


def same_weights(one: Identity, other: Identity) -> bool:
    """Whether two models are the same numbers, wherever they lie."""
    return one.sha256 == other.sha256


def _open_adapter(path: Path, *, dtype: Dtype, device: str) -> Policy:
    settings = adapter_settings(path)
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str):
        raise ModelError(
            f"expected an adapter_config.json that names its base in {str(path)!r}, got {base!r}"
        )
    revision = settings.get("revision") if not Path(base).is_dir() else None
    opened = load_policy(base, dtype=dtype, device=device, revision=revision, merge=str(path))
    return replace(opened, path=str(path), merged=None)
