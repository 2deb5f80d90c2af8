"""kleash keeps a language model on a KL leash.

    run = kleash.train("run.yaml")      train a policy near a frozen reference
    kleash.check("run.yaml")            look for faults before training
    kleash.plan("run.yaml")             which β spends which KL for which score
    kleash.audit(policy, reference, prompts="prompts.jsonl")    how far two models are apart

and, for loops of one's own (`docs/own-loops.md`),

    kleash.score(model, reference, ids, mask)     log-probabilities and exact KL of every token
    kleash.Leash(target_kl=2.0)                   β that holds a budget: `leash.step(kl, scores)`
    kleash.Head.of(model), kleash.token_scores    the same from hidden states
    kleash.charges, kleash.loss_terms             placements of the KL: in the reward, in the loss
    kleash.clustered_mean, kleash.RunWriter       means with errors; a run for `kleash report`

`import kleash` loads neither torch nor transformers; they are loaded when a function is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kleash.algorithms.advantages import gae, group_relative, leave_one_out
    from kleash.algorithms.losses import clipped_policy_loss
    from kleash.api import TrainedRun as Run
    from kleash.api import check, plan, train
    from kleash.auditing import Audit, audit
    from kleash.kl.control.budget_leash import BudgetLeash as Leash
    from kleash.kl.control.controllers import AdaptiveBeta, BetaState, BudgetBeta, Measurement
    from kleash.kl.placements import (
        charges,
        gradient_of,
        loss_terms,
        loss_weights,
        off_policy_exact_loss,
    )
    from kleash.kl.statistics import Estimate, clustered_mean, clustered_ratio, response_kl
    from kleash.rollout.pair_scores import PairScores, score
    from kleash.scoring import TokenScores, token_scores
    from kleash.storage.run_directory import RunWriter
    from kleash.training.loop import Trainer
    from kleash.types import Head

__version__ = "0.1.0"

__all__ = [
    "AdaptiveBeta",
    "Audit",
    "BetaState",
    "BudgetBeta",
    "Estimate",
    "Head",
    "Leash",
    "Measurement",
    "PairScores",
    "Run",
    "RunWriter",
    "TokenScores",
    "Trainer",
    "__version__",
    "audit",
    "charges",
    "check",
    "clipped_policy_loss",
    "clustered_mean",
    "clustered_ratio",
    "gae",
    "gradient_of",
    "group_relative",
    "leave_one_out",
    "loss_terms",
    "loss_weights",
    "off_policy_exact_loss",
    "plan",
    "response_kl",
    "score",
    "token_scores",
    "train",
]

_HOMES = {
    "AdaptiveBeta": ("kleash.kl.control.controllers", "AdaptiveBeta"),
    "Audit": ("kleash.auditing", "Audit"),
    "BetaState": ("kleash.kl.control.controllers", "BetaState"),
    "BudgetBeta": ("kleash.kl.control.controllers", "BudgetBeta"),
    "Estimate": ("kleash.kl.statistics", "Estimate"),
    "Head": ("kleash.types", "Head"),
    "Leash": ("kleash.kl.control.budget_leash", "BudgetLeash"),
    "Measurement": ("kleash.kl.control.controllers", "Measurement"),
    "PairScores": ("kleash.rollout.pair_scores", "PairScores"),
    "Run": ("kleash.api", "TrainedRun"),
    "RunWriter": ("kleash.storage.run_directory", "RunWriter"),
    "TokenScores": ("kleash.scoring", "TokenScores"),
    "Trainer": ("kleash.training.loop", "Trainer"),
    "audit": ("kleash.auditing", "audit"),
    "charges": ("kleash.kl.placements", "charges"),
    "check": ("kleash.api", "check"),
    "clipped_policy_loss": ("kleash.algorithms.losses", "clipped_policy_loss"),
    "clustered_mean": ("kleash.kl.statistics", "clustered_mean"),
    "clustered_ratio": ("kleash.kl.statistics", "clustered_ratio"),
    "gae": ("kleash.algorithms.advantages", "gae"),
    "gradient_of": ("kleash.kl.placements", "gradient_of"),
    "group_relative": ("kleash.algorithms.advantages", "group_relative"),
    "leave_one_out": ("kleash.algorithms.advantages", "leave_one_out"),
    "loss_terms": ("kleash.kl.placements", "loss_terms"),
    "loss_weights": ("kleash.kl.placements", "loss_weights"),
    "off_policy_exact_loss": ("kleash.kl.placements", "off_policy_exact_loss"),
    "plan": ("kleash.api", "plan"),
    "response_kl": ("kleash.kl.statistics", "response_kl"),
    "score": ("kleash.rollout.pair_scores", "score"),
    "token_scores": ("kleash.scoring", "token_scores"),
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
