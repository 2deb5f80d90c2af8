"""How far is one checkpoint from another, where, and how sure is that.

Start at `api.audit`; `runner` is the audit from top to bottom. May import models, rollout,
scoring, kl, report and storage. Loaded when asked for, so that `options` stays free of torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from kleash.auditing.options import AuditOptions

if TYPE_CHECKING:
    from kleash.auditing.api import audit
    from kleash.auditing.confidence_intervals import ConfidenceInterval
    from kleash.auditing.result import Audit

__all__ = ["Audit", "AuditOptions", "ConfidenceInterval", "audit"]


def __getattr__(name: str) -> Any:
    """Load what needs torch when it is asked for."""
    homes = {
        "Audit": "kleash.auditing.result",
        "ConfidenceInterval": "kleash.auditing.confidence_intervals",
        "audit": "kleash.auditing.api",
    }
    if name not in homes:
        raise AttributeError(f"module 'kleash.auditing' has no attribute {name!r}")
    return getattr(importlib.import_module(homes[name]), name)
