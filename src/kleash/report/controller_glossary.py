"""What the numbers of the controllers mean: read and decided in each step, for each group."""

from kleash.report.metric_definition import Metric

CONTROLLER: tuple[Metric, ...] = (
    Metric(
        "controller/kl_ref",
        "KL as read",
        "The measurement that the controller of β receives: objective/kl_ref, under a target per "
        "token that of a response as long as the reference's. Controller metrics are there where "
        "β follows a target.",
        "objective/kl_ref, or objective/kl_ref · mean length of the reference / mean length",
        "nats per response",
        "near the target",
    ),
    Metric(
        "controller/kl_ref_se",
        "Its standard error",
        "The noise that the controller allows for; none with a single prompt.",
        "clustered by prompt",
        "nats per response",
        "below a tenth of the KL",
    ),
    Metric(
        "controller/responses",
        "Responses read",
        "How many responses the reading is of.",
        "count",
        "responses",
        "—",
    ),
    Metric(
        "controller/score_variance",
        "Variance as read",
        "Variance of the scores, within prompts where there are several responses to each; none "
        "where a starting β was given, which is taken at its word.",
        "Var(score)",
        "score²",
        "falls as the policy nears its optimum",
    ),
    Metric(
        "controller/beta_next",
        "Next β",
        "What was decided: β of the next step.",
        "β",
        "score per nat",
        "settles",
    ),
    Metric(
        "controller/error",
        "Error acted upon",
        "How far the reading, with the drift to come, is off the target; 0 where the reading was "
        "not used. Of Ziegler's controllers KL/target − 1, clipped.",
        "clip(ln(KL_ahead/target), ±1)",
        "1",
        "around 0",
    ),
    Metric(
        "controller/gain",
        "Gain believed",
        "How strongly the KL responds to β; none where no controller needs it.",
        "−d ln KL*/d ln β",
        "1",
        "0.5 to 4",
    ),
    Metric(
        "controller/speed",
        "Speed",
        "Smoothed change of √KL per reading, from which the drift to come is foreseen.",
        "Δ√KL",
        "√nats",
        "towards 0",
    ),
    Metric(
        "controller/feedforward",
        "β by the closed form",
        "β that the closed form, or the plan, holds right for the target.",
        "β",
        "score per nat",
        "near the β that holds",
    ),
    Metric(
        "controller/trim",
        "Integral",
        "What feedback has added to ln β on top of the closed form.",
        "Σ w·error/(gain·settling)",
        "1",
        "settles; steady growth is a target out of reach",
    ),
    Metric(
        "controller/ignored",
        "Reading ignored",
        "1 where the reading was NaN, infinite or negative and moved nothing.",
        "0 or 1",
        "1",
        "0",
    ),
    Metric(
        "controller/quiet",
        "Dead band",
        "1 where all of the drift could have been noise and counted as none.",
        "0 or 1",
        "1",
        "1 near the target",
    ),
    Metric(
        "controller/limited",
        "Rate limit",
        "1 where the step of β was cut to the largest allowed.",
        "0 or 1",
        "1",
        "1 in the first steps at most",
    ),
    Metric(
        "controller/bounded",
        "Bound",
        "1 where β stands at a hard bound.",
        "0 or 1",
        "1",
        "0; a target out of reach otherwise",
    ),
    Metric(
        "<key>/<group>",
        "The same, of one group",
        "Where leash.groups gives groups of prompts a budget of their own: objective/kl_ref, "
        "scores, beta, target_kl and kl_efficiency, and every controller number, of the responses "
        "to its prompts alone. The plain objective keys are then means over all responses; absent "
        "in a step that has no prompt of the group.",
        "as the key",
        "as the key",
        "as the key",
    ),
)
