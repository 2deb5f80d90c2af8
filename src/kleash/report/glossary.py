"""What every number of a run means: one table for the report, the documentation and the tests.

`docs/metrics.md` is this table, written by
`python -m kleash.report.glossary_page > docs/metrics.md`.
"""

from kleash.report.controller_glossary import CONTROLLER
from kleash.report.distillation_glossary import DISTILLATION
from kleash.report.metric_definition import Metric
from kleash.report.sampler_glossary import SAMPLER

GLOSSARY: tuple[Metric, ...] = (
    Metric(
        "objective/kl_ref",
        "KL to the reference",
        "How far the policy has gone from the frozen reference: the mean over responses of the "
        "exact divergence, summed over the tokens of a response. Never clamped.",
        "mean_y Σ_t KL(π(·|y<t) ‖ π_ref(·|y<t)), y ~ π",
        "nats per response",
        "within 20 % of the target; 0 at the first step",
    ),
    Metric(
        "objective/kl_ref_se",
        "Standard error of the KL",
        "Sampling error of objective/kl_ref. Responses to the same prompt are one cluster.",
        "clustered by prompt",
        "nats per response",
        "below a tenth of the KL",
    ),
    Metric(
        "objective/reverse_kl_ref",
        "KL from the reference",
        "The other direction, summed over the policy's own responses: large where the policy gives "
        "up what the reference would have said. Measured inside other trainers, on request.",
        "mean_y Σ_t KL(π_ref(·|y<t) ‖ π(·|y<t)), y ~ π",
        "nats per response",
        "of the order of objective/kl_ref",
    ),
    Metric(
        "objective/reverse_kl_ref_se",
        "Standard error of the KL from the reference",
        "Sampling error of objective/reverse_kl_ref.",
        "clustered by prompt",
        "nats per response",
        "below a tenth of it",
    ),
    Metric(
        "objective/kl_original",
        "KL to the original reference",
        "Where the anchor of the leash is moved (leash.reanchor_every), objective/kl_ref is the KL "
        "to the anchor; this is the KL to the reference that the run began with. tripwires.stop_kl "
        "is a bound on it.",
        "mean_y Σ_t KL(π(·|y<t) ‖ π_original(·|y<t)), y ~ π",
        "nats per response",
        "below tripwires.stop_kl; a steady rise says that the leash only slows the drift",
    ),
    Metric(
        "objective/kl_original_se",
        "Standard error of the KL to the original",
        "Sampling error of objective/kl_original.",
        "clustered by prompt",
        "nats per response",
        "below a tenth of the KL",
    ),
    Metric(
        "objective/kl_ref_k1",
        "KL to the reference, sampled",
        "The same quantity from the sampled tokens alone. Unbiased but noisy, and a single batch "
        "may well be negative.",
        "mean_y Σ_t (log π(y_t) − log π_ref(y_t)), y ~ π",
        "nats per response",
        "within a few of its standard errors of objective/kl_ref; a lasting gap means that the "
        "tokens were not sampled from the policy that was scored",
    ),
    Metric(
        "objective/kl_ref_k1_se",
        "Standard error of the sampled KL",
        "Sampling error of objective/kl_ref_k1.",
        "clustered by prompt",
        "nats per response",
        "two to four times that of the exact KL",
    ),
    Metric(
        "objective/kl_ref_per_token",
        "KL to the reference per token",
        "Total exact KL divided by the number of response tokens.",
        "Σ_y Σ_t KL_t / Σ_y length(y)",
        "nats per token",
        "moves with objective/kl_ref unless the length changes",
    ),
    Metric(
        "objective/entropy",
        "Entropy",
        "How undecided the policy is: mean over responses of the summed entropy of its "
        "next-token distributions. Grows with the length of the responses.",
        "mean_y Σ_t H(π(·|y<t))",
        "nats per response",
        "falls slowly; a fall towards 0, or a rise after a fall, is a policy that collapses",
    ),
    Metric(
        "objective/entropy_per_token",
        "Entropy per token",
        "Total entropy divided by the number of response tokens; tripwires.min_entropy is a bound "
        "on it.",
        "Σ_y Σ_t H(π(·|y<t)) / Σ_y length(y)",
        "nats per token",
        "falls slowly",
    ),
    Metric(
        "objective/scores",
        "Score",
        "What the reward model gives a response: the proxy that is being optimised, after "
        "normalisation and after the rule for responses that did not end.",
        "mean_y score(x, y)",
        "score",
        "rises, then levels off",
    ),
    Metric(
        "objective/scores_se",
        "Standard error of the score",
        "Sampling error of objective/scores.",
        "clustered by prompt",
        "score",
        "below the change one wants to see",
    ),
    Metric(
        "objective/non_score_reward",
        "Penalty",
        "What the exact KL costs at β. What the rewards were charged, by the estimate of the "
        "placement, is objective/charge. Absent with GRPO.",
        "−β · mean_y Σ_t KL_t",
        "score",
        "at most a good part of the score gained",
    ),
    Metric(
        "objective/rlhf_reward",
        "Objective",
        "What training maximises: the score less the price of the exact KL. Absent with GRPO, "
        "whose β is not in score per nat.",
        "mean(score) − β · mean_y Σ_t KL_t",
        "score",
        "rises; a fall while the score rises is a policy that overspends",
    ),
    Metric(
        "objective/kl_efficiency",
        "KL efficiency",
        "How much of the score that the plan holds possible at this KL was gained. Absent where "
        "the plan is silent: without one, below its first KL and beyond the last that its samples "
        "know.",
        "(mean(score) − mean(score of the reference)) / (E*[score] − mean(score of the reference))",
        "share",
        "rises towards 1; above it only by the noise of both; low means KL spent on noise",
    ),
    Metric(
        "objective/beta",
        "β",
        "The price of a nat in force during the step; with GRPO in standard deviations of a group "
        "per nat.",
        "β",
        "score per nat",
        "settles when KL has met its target; pinned to a bound means the target is out of reach",
    ),
    Metric(
        "objective/target_kl",
        "Target KL",
        "The budget that β is steered by; absent where β is fixed.",
        "given",
        "nats per response",
        "—",
    ),
    Metric(
        "objective/trained_scores",
        "Score trained on",
        "The score part of the rewards, over the responses that were trained on; with GRPO in "
        "standard deviations of a group, as are the next two.",
        "mean_y score(x, y)",
        "score",
        "as objective/scores",
    ),
    Metric(
        "objective/charge",
        "Charge",
        "What the placement took off the rewards for the KL: β times its own estimate, such as k1. "
        "The part of the KL that is in the loss is not in it: 0 with the placements loss_*.",
        "β · mean_y Σ_t charge_t",
        "score",
        "near −objective/non_score_reward with reward_k1, but for sampling noise",
    ),
    Metric(
        "objective/trained_reward",
        "Reward trained on",
        "Sum of a response's rewards as the algorithm got them: objective/trained_scores less "
        "objective/charge, but for objective/accounting_residual.",
        "mean_y Σ_t reward_t",
        "score",
        "rises",
    ),
    Metric(
        "objective/accounting_residual",
        "Accounting residual",
        "What is left of the identity reward = score − charge, computed by two routes: "
        "objective/trained_reward less objective/trained_scores and objective/charge.",
        "|mean_y Σ_t reward_t − (mean_y score − β · mean_y Σ_t charge_t)|",
        "score",
        "below 1e-5",
    ),
    Metric(
        "objective/kl_after",
        "KL after the last update",
        "Where there are tripwires, the policy that a run leaves is measured once more, on "
        "responses that nothing is learnt from: no later step would show what the last update "
        "did. To the original reference.",
        "mean_y Σ_t KL(π(·|y<t) ‖ π_original(·|y<t)), y ~ π after the last update",
        "nats per response",
        "below tripwires.stop_kl, or the last step is refused",
    ),
    Metric(
        "objective/kl_after_se",
        "Standard error of the KL after",
        "Sampling error of objective/kl_after.",
        "clustered by prompt",
        "nats per response",
        "below a tenth of the KL",
    ),
    *CONTROLLER,
    *DISTILLATION,
    Metric(
        "policy/approx_kl",
        "KL of the update",
        "How far the policy moved within the step, from the policy that wrote the rollout: k3, "
        "averaged over the tokens of a minibatch, then over the step's updates. Not the KL to the "
        "reference.",
        "mean_u mean_t (e^(−δ) − 1 + δ), δ = log π_rollout − log π",
        "nats per token",
        "0.001 to 0.02",
    ),
    Metric(
        "policy/clipfrac",
        "Clipped fraction",
        "Share of a minibatch's tokens whose ratio left the clip range, mean over the step's "
        "updates.",
        "mean_u mean_t 1[|ratio_t − 1| > ε]",
        "fraction of tokens",
        "0.01 to 0.3",
    ),
    Metric(
        "policy/effective_samples",
        "Effective samples",
        "Share of a minibatch's tokens that is left effective by how much likelier the policy has "
        "become to come to them; the least of the step.",
        "(Σ w)² / (n · Σ w²), w_t = Π_{s<t} π(y_s) / π_rollout(y_s); π_sampler for π_rollout where "
        "exact_weighted is corrected",
        "fraction of tokens",
        "0.5 to 1",
    ),
    Metric(
        "policy/updates",
        "Updates",
        "Optimiser steps made with this rollout. Fewer than epochs × minibatches: the share of "
        "effective samples fell below its bound.",
        "count",
        "updates",
        "1 to 16",
    ),
    Metric(
        "policy/ratio_first_error",
        "First ratio, off 1 by",
        "Largest deviation from 1 of any token's ratio on the first minibatch, before anything was "
        "learned from the rollout; none where that minibatch used the reading of scoring itself.",
        "max_t |π(y_t) / π_rollout(y_t) − 1|",
        "ratio",
        "below 1e-4; anything more means that two paths score the same tokens differently",
    ),
    Metric(
        "policy/ratio_max",
        "Largest ratio",
        "Largest ratio of any token in the step.",
        "max_t π(y_t) / π_rollout(y_t)",
        "ratio",
        "below 10",
    ),
    Metric(
        "policy/ratio_min",
        "Smallest ratio",
        "Smallest ratio of any token in the step.",
        "min_t π(y_t) / π_rollout(y_t)",
        "ratio",
        "above 0.1",
    ),
    Metric(
        "loss/policy",
        "Policy loss",
        "The clipped surrogate; its level says little, since it is built anew at each step.",
        "−mean_u mean_t min(ratio·A, clip(ratio, 1 ± ε)·A)",
        "score",
        "near 0",
    ),
    Metric(
        "loss/value",
        "Value loss",
        "Squared error of the value model against the returns; with ppo.value_clip_range the "
        "larger of that error and of the clipped value's.",
        "½ mean_u mean_t max((V_t − R_t)², (clip(V_t, V_rollout ± ε) − R_t)²)",
        "score²",
        "falls",
    ),
    Metric(
        "loss/kl",
        "KL loss",
        "The part of the KL that is differentiated directly; absent where the whole penalty is in "
        "the rewards.",
        "mean_u mean_t w_t · KL_t, w_t = β or the weight that the placement gives",
        "score",
        "moves with the KL",
    ),
    Metric(
        "loss/pretraining",
        "Pretraining loss",
        "Negative log-likelihood of the texts mixed in, where there are any (PPO-ptx).",
        "−mean_t log π(x_t | x<t), x from the mixed-in texts",
        "nats per token",
        "steady; a rise is forgetting",
    ),
    Metric(
        "value/explained_variance",
        "Explained variance",
        "How much of the returns the value model foresees.",
        "1 − var(R − V) / var(R)",
        "fraction",
        "rises towards 1; below 0 it does harm",
    ),
    Metric(
        "rollout/length",
        "Response length",
        "Tokens the policy wrote, its end-of-sequence token included.",
        "mean_y length(y)",
        "tokens",
        "steady; creeping to the limit is a taste of the reward model for length",
    ),
    Metric(
        "rollout/eos_fraction",
        "Ended by itself",
        "Share of responses that the policy ended, rather than the length limit.",
        "mean_y 1[y ended]",
        "fraction of responses",
        "near 1 where responses should end",
    ),
    *SAMPLER,
    Metric(
        "rollout/distinct_2",
        "Distinct-2",
        "Share of pairs of neighbouring words that are different within a response.",
        "mean_y |{(w_i, w_i+1)}| / (words(y) − 1)",
        "fraction of pairs",
        "near that of the reference; a fall is repetition",
    ),
    Metric(
        "reward/<name>",
        "One reward",
        "Score of one reward model before weighting, where several are summed.",
        "mean_y score_name(x, y)",
        "score",
        "none falls while the sum rises",
    ),
    Metric(
        "reward/total",
        "Score, before normalisation",
        "Weighted sum of the reward models, as they give it.",
        "mean_y Σ_name weight_name · score_name(x, y)",
        "score",
        "rises, then levels off",
    ),
    Metric(
        "heldout/gold",
        "Gold score, held out",
        "The known rubric on prompts the policy never trained on. Training never sees it.",
        "mean_y gold(x, y), x held out",
        "gold score",
        "rises with the score; a fall while the score rises is over-optimisation",
    ),
    Metric(
        "heldout/gold_se",
        "Standard error of the gold score",
        "Sampling error of heldout/gold.",
        "clustered by prompt",
        "gold score",
        "below the change one wants to see",
    ),
    Metric(
        "heldout/responses",
        "Held-out responses",
        "How many responses the held-out numbers of this step are means of.",
        "count",
        "responses",
        "—",
    ),
    Metric(
        "heldout/<objective>",
        "The same on held-out prompts",
        "Any objective/… or rollout/… number, measured on prompts that are not trained on; scores "
        "as the reward models give them.",
        "as objective/…, x held out",
        "as objective/…",
        "close to the number in training",
    ),
    Metric(
        "optim/lr",
        "Learning rate",
        "Learning rate of the policy at the end of the step.",
        "given",
        "1",
        "as scheduled; too high wastes KL",
    ),
    Metric(
        "optim/grad_norm",
        "Gradient norm",
        "Norm of the policy's gradient before clipping, mean over the step's updates.",
        "‖g‖₂",
        "score",
        "no spikes by a factor of ten",
    ),
    Metric(
        "samples/kl_by_position",
        "KL by position",
        "Where in a response the policy departs: mean exact KL at each position over the responses "
        "kept in the last third of the kept steps. A step keeps its farthest responses and some at "
        "random; each counts for as many as it stands for. The band is one standard error, "
        "clustered by step. Not a key of metrics.jsonl: it is read from samples.jsonl.",
        "Σ_y w_y KL_t / Σ_y w_y, y reaching t; w = 1 (worst) or rest / drawn (random)",
        "nats per token",
        "—",
    ),
    Metric("step", "Step", "One rollout and the updates from it.", "count", "steps", "—"),
    Metric(
        "seconds",
        "Time",
        "Wall time of the steps so far. Setting up, held-out evaluations and interruptions are "
        "not in it.",
        "Σ_step seconds of the step",
        "s",
        "—",
    ),
    Metric("episodes", "Episodes", "Responses written so far.", "count", "responses", "—"),
    Metric(
        "tokens_per_second",
        "Throughput",
        "Response tokens of the step over its wall time.",
        "Σ_y length(y) / seconds of the step",
        "tokens/s",
        "steady",
    ),
    Metric(
        "time/generate",
        "Time to write",
        "Writing the responses, and what the reward models say of them.",
        "—",
        "s",
        "—",
    ),
    Metric("time/score", "Time to score", "Policy, reference and values.", "—", "s", "—"),
    Metric("time/update", "Time to learn", "All updates of the step.", "—", "s", "—"),
)

_BY_KEY = {metric.key: metric for metric in GLOSSARY}


def define(key: str) -> Metric | None:
    """Look up what a key of metrics.jsonl means; None if the table does not know it.

    Example:
        >>> define("heldout/objective/kl_ref").title
        'KL to the reference'
        >>> define("reward/helpful").title
        'One reward'
        >>> define("objective/beta/code").title
        'β'
    """
    of_group = "/".join(key.split("/")[:2])
    if key in _BY_KEY or of_group in _BY_KEY:
        return _BY_KEY.get(key) or _BY_KEY[of_group]
    if key.startswith("reward/"):
        return _BY_KEY["reward/<name>"]
    if key.startswith("heldout/"):
        rest = key.removeprefix("heldout/").removeprefix("objective/")
        found = (_BY_KEY.get(f"{group}/{rest}") for group in ("objective", "rollout", "distill"))
        return next((metric for metric in found if metric is not None), None)
    return None
