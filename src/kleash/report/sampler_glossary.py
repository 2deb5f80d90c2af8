"""What the numbers of the sampler mean: its distance from the trainer, and the correction."""

from kleash.report.metric_definition import Metric

SAMPLER: tuple[Metric, ...] = (
    Metric(
        "rollout/kl_sampler",
        "KL of the sampler",
        "Disagreement between the engine that sampled and the model that scored, from the sampled "
        "tokens: unbiased and noisy, a single batch may well be negative.",
        "mean_y Σ_t (log π_sampler(y_t) − log π_rollout(y_t)), y ~ π_sampler",
        "nats per response",
        "within a few of its standard errors of 0; beyond, the policy learns from another policy's "
        "tokens",
    ),
    Metric(
        "rollout/kl_sampler_se",
        "Standard error of the KL of the sampler",
        "Sampling error of rollout/kl_sampler.",
        "clustered by prompt",
        "nats per response",
        "small beside the KL to the reference",
    ),
    Metric(
        "rollout/kl_sampler_per_token",
        "KL of the sampler per token",
        "The same disagreement by an estimate that is never negative and has far less noise; it "
        "sees a cut tail (top-p) as smaller than it is.",
        "mean_t (r_t − 1 − log r_t), r = π_rollout / π_sampler, y ~ π_sampler",
        "nats per token",
        "at rollout/kl_sampler_floor: below 1e-6 where both compute in float32, about 1e-4 where "
        "the engine computes in bfloat16",
    ),
    Metric(
        "rollout/kl_sampler_per_token_se",
        "Standard error of the KL of the sampler per token",
        "Sampling error of rollout/kl_sampler_per_token.",
        "clustered by prompt",
        "nats per token",
        "below a third of it",
    ),
    Metric(
        "rollout/kl_sampler_reverse_per_token",
        "KL of the trainer against the sampler",
        "The other direction, in the states that the sampler came to: large where the sampler "
        "seldom writes what the trainer holds likely.",
        "mean_t (r_t log r_t − r_t + 1), r = π_rollout / π_sampler, y ~ π_sampler",
        "nats per token",
        "near rollout/kl_sampler_per_token",
    ),
    Metric(
        "rollout/kl_sampler_reverse_per_token_se",
        "Standard error of the KL of the trainer against the sampler",
        "Sampling error of rollout/kl_sampler_reverse_per_token.",
        "clustered by prompt",
        "nats per token",
        "below a third of it",
    ),
    Metric(
        "rollout/kl_sampler_exact_per_token",
        "KL of the sampler, exact",
        "Over the whole vocabulary, in the states of four responses; at the steps of "
        "logging.spot_check_every, where the engine gives whole distributions.",
        "mean_t KL(π_sampler(·|y<t) ‖ π_rollout(·|y<t)), y ~ π_sampler",
        "nats per token",
        "near rollout/kl_sampler_per_token; above it where the sampler cuts a tail",
    ),
    Metric(
        "rollout/kl_sampler_exact_reverse_per_token",
        "KL of the trainer against the sampler, exact",
        "The other direction in the same states; infinite where the sampler never writes what the "
        "trainer would.",
        "mean_t KL(π_rollout(·|y<t) ‖ π_sampler(·|y<t)), y ~ π_sampler",
        "nats per token",
        "near rollout/kl_sampler_reverse_per_token",
    ),
    Metric(
        "rollout/kl_sampler_floor",
        "Floor of the KL of the sampler",
        "rollout/kl_sampler_per_token of the first rollout, before any update: what kernels and "
        "number formats put between two copies of the same weights.",
        "rollout/kl_sampler_per_token at step 1",
        "nats per token",
        "constant; four times as much later on is weights that were not handed over, or with "
        "rollout.ahead: 1 the update in between",
    ),
    Metric(
        "rollout/correction_effective_samples",
        "Effective samples of the correction",
        "Share of the rollout's tokens that the weights of rollout.correction leave effective.",
        "(Σ w)² / (n · Σ w²)",
        "fraction of tokens",
        "0.9 to 1",
    ),
    Metric(
        "rollout/correction_clipped",
        "Clipped by the correction",
        "Share of tokens whose weight the clip of rollout.correction lowered, or which it left out "
        "of the update.",
        "mean_t 1[r_t > c]; masked: or r_t < 1/c; sequence_truncated: of the response's product",
        "fraction of tokens",
        "0 to 0.02",
    ),
    Metric(
        "rollout/correction_mean_weight",
        "Mean weight of the correction",
        "1 in expectation where nothing is clipped; what it lacks is the share of the policy's "
        "probability that the clip cut off.",
        "mean_t w_t",
        "weight",
        "0.98 to 1.02",
    ),
)
