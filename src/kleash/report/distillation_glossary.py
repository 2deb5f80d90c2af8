"""What the numbers of distillation mean: a part of the table in `glossary`."""

from kleash.report.metric_definition import Metric

DISTILLATION: tuple[Metric, ...] = (
    Metric(
        "distill/reverse_kl",
        "KL(student‖teacher)",
        "How far the student is from its teacher on its own responses: the mean over responses of "
        "the exact divergence, summed over the tokens of a response.",
        "mean_y Σ_t KL(π(·|y<t) ‖ π_teacher(·|y<t)), y ~ π",
        "nats per response",
        "falls, then levels off at what the student cannot follow",
    ),
    Metric(
        "distill/reverse_kl_se",
        "Standard error of KL(student‖teacher)",
        "Sampling error of distill/reverse_kl.",
        "clustered by prompt",
        "nats per response",
        "below the change one wants to see",
    ),
    Metric(
        "distill/reverse_kl_per_token",
        "KL(student‖teacher) per token",
        "Total exact KL to the teacher divided by the number of response tokens.",
        "Σ_y Σ_t KL_t / Σ_y length(y)",
        "nats per token",
        "falls also where responses grow longer",
    ),
    Metric(
        "distill/reverse_kl_per_token_se",
        "Standard error of KL(student‖teacher) per token",
        "Sampling error of distill/reverse_kl_per_token.",
        "clustered by prompt",
        "nats per token",
        "below the change one wants to see",
    ),
    Metric(
        "distill/forward_kl",
        "KL(teacher‖student)",
        "The other direction at the same states, those of the student's responses: large where the "
        "teacher would have written what the student does not think of.",
        "mean_y Σ_t KL(π_teacher(·|y<t) ‖ π(·|y<t)), y ~ π",
        "nats per response",
        "falls with the other direction; a rise while that falls is lost variety",
    ),
    Metric(
        "distill/forward_kl_se",
        "Standard error of KL(teacher‖student)",
        "Sampling error of distill/forward_kl.",
        "clustered by prompt",
        "nats per response",
        "below the change one wants to see",
    ),
    Metric(
        "loss/distill",
        "Distillation loss",
        "The divergence that is trained on, at the tokens of the rollout; with `gradient: "
        "sequence` each weighted by how much likelier the student has become to come there.",
        "mean_u mean_t w_t · D_t, w_t = 1 or Π_{s<t} π(y_s) / π_rollout(y_s)",
        "nats per token",
        "falls",
    ),
)
