"""kleash keeps a language model on a KL leash."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kleash.auditing import Audit, audit

__version__ = "0.1.0"

__all__ = ["Audit", "__version__", "audit"]


def __getattr__(name: str) -> Any:
    """Load what needs torch when it is asked for: `import kleash` stays light."""
    if name in ("Audit", "audit"):
        from kleash import auditing

        return getattr(auditing, name)
    raise AttributeError(f"module 'kleash' has no attribute {name!r}")
