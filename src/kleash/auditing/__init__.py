"""How far is one checkpoint from another, where, and how sure is that."""

from kleash.auditing.api import audit
from kleash.auditing.confidence_intervals import ConfidenceInterval
from kleash.auditing.result import Audit

__all__ = ["Audit", "ConfidenceInterval", "audit"]
