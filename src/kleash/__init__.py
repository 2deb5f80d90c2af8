"""kleash keeps a language model on a KL leash.

    run = kleash.train("run.yaml")      train a policy near a frozen reference
    kleash.check("run.yaml")            look for faults before training
    kleash.plan("run.yaml")             which β spends which KL for which score
    kleash.audit(policy, reference, prompts="prompts.jsonl")    how far two models are apart

`import kleash` loads neither torch nor transformers; they are loaded when a function is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kleash.api import TrainedRun as Run
    from kleash.api import check, plan, train
    from kleash.auditing import Audit, audit
    from kleash.training.loop import Trainer

__version__ = "0.1.0"

__all__ = ["Audit", "Run", "Trainer", "__version__", "audit", "check", "plan", "train"]

_HOMES = {
    "Audit": ("kleash.auditing", "Audit"),
    "Run": ("kleash.api", "TrainedRun"),
    "Trainer": ("kleash.training.loop", "Trainer"),
    "audit": ("kleash.auditing", "audit"),
    "check": ("kleash.api", "check"),
    "plan": ("kleash.api", "plan"),
    "train": ("kleash.api", "train"),
}


def __getattr__(name: str) -> Any:
    """Load what needs torch when it is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'kleash' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
