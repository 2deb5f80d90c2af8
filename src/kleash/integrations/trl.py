"""Exact KL, a KL budget and tripwires inside TRL's GRPOTrainer and RLOOTrainer.

    from kleash.integrations.trl import KLAudit, KLBudget

    KLAudit(every=10).attach(trainer)
    KLBudget(target_kl=2.0).attach(trainer)

The KL is that of whole next-token distributions at the sampling temperature, summed over each
response and averaged over responses, with standard errors clustered by prompt. TRL's own `kl` is
an estimate per token: multiply by the length before comparing.

What is measured at step s is the policy that wrote the completions of step s, before its update.
Numbers go into the trainer's log as `kleash/…` and into a run directory that `kleash report`
opens. `Tripwires` bound a run, and `exact_kl_loss` replaces GRPO's KL term.
"""

from kleash.integrations._trl_callbacks import KLAudit, KLBudget
from kleash.integrations._trl_loss import exact_kl_loss
from kleash.integrations._trl_tripwires import Tripwires

__all__ = ["KLAudit", "KLBudget", "Tripwires", "exact_kl_loss"]
