"""What every number of an audit means: for the page and for `docs/audit.md`."""

from kleash.report.glossary import Metric

GLOSSARY: tuple[Metric, ...] = (
    Metric(
        "kl",
        "KL(policy ‖ reference)",
        "How far the policy has gone from the reference, exact at every token: the whole "
        "vocabulary is summed, nothing is sampled but the texts. On the policy's own writing its "
        "mean per response is the KL between the two models' responses.",
        "Σ_v π_v log(π_v / π_ref,v), mean over tokens, or summed over a response",
        "nats per token, nats per response",
        "0 only for models that say the same",
    ),
    Metric(
        "reverse_kl",
        "KL(reference ‖ policy)",
        "The other direction: what the reference allows and the policy has forgotten.",
        "Σ_v π_ref,v log(π_ref,v / π_v)",
        "nats per token, nats per response",
        "much larger than the other direction where the policy has collapsed",
    ),
    Metric(
        "k1",
        "KL by k1",
        "The same KL from the sampled tokens alone: unbiased, noisy, possibly negative. Shown so "
        "that the exact value can be compared with what others report.",
        "log π(x) − log π_ref(x), x ~ π",
        "nats",
        "within its interval of the exact value",
    ),
    Metric(
        "k3",
        "KL by k3",
        "The same KL by the estimator that cannot be negative.",
        "π_ref(x)/π(x) − 1 + log π(x) − log π_ref(x), x ~ π",
        "nats",
        "within its interval of the exact value; its variance may be infinite",
    ),
    Metric(
        "entropy",
        "Entropy",
        "How undecided a model is at the next token.",
        "−Σ_v π_v log π_v",
        "nats",
        "—",
    ),
    Metric(
        "perplexity",
        "Perplexity",
        "e to the mean negative log-likelihood per token of the given texts.",
        "exp(−Σ log π(x_t) / number of tokens)",
        "words",
        "lower is better, on texts that matter",
    ),
    Metric(
        "same_top",
        "Top-1 agreement",
        "Share of tokens at which both models find the same word likeliest.",
        "mean 1[argmax π = argmax π_ref]",
        "share",
        "1 for a copy",
    ),
    Metric(
        "interval",
        "95 % interval",
        "Where the mean over all prompts of this kind lies. Prompts, not tokens, are what was "
        "sampled: responses to one prompt count as one observation. Anytime-valid where sampling "
        "went on until it was narrow enough.",
        "mean ± t · s.e., clustered by prompt",
        "as the mean",
        "—",
    ),
    Metric(
        "root_kl",
        "√KL",
        "The distance of which KL is, near the reference, the square: a policy that is pulled away "
        "at a steady speed goes along a straight line.",
        "√(mean KL per response)",
        "√nats",
        "—",
    ),
    Metric(
        "standing",
        "Score against √KL",
        "For a checkpoint in the directory of its run, audited against the reference of that run: "
        "the score that the run measured of it, over the audited √KL. The trail is the run's own "
        "KL and score, step by step; the line is the optimum of its plan. A score that still rises "
        "while gold falls is exploited.",
        "score of the checkpoint over √(mean KL per response)",
        "score",
        "below the plan's line, which no policy passes",
    ),
    Metric(
        "floor",
        "Floor",
        "KL per token of a model to itself, read in a batch and alone, on responses drawn at "
        "random: what rounding makes; the larger one of policy and reference. "
        "A mean below 3 times this is not resolvable.",
        "mean |KL(π in a batch ‖ π alone)|",
        "nats per token",
        "below 1e-7 in float32",
    ),
    Metric(
        "percentiles",
        "Percentiles",
        "The KL per token below which so many percent of tokens lie, to 1 % of its value; the "
        "largest is exact.",
        "—",
        "nats",
        "a maximum of hundreds of medians is ordinary",
    ),
    Metric(
        "tail",
        "Tail",
        "Whether a few responses carry the mean. Below an index of 2 the spread is infinite and "
        "every interval promises too much.",
        "Hill's index of the largest tenth",
        "—",
        "above 2",
    ),
    Metric(
        "moved",
        "Gained and lost",
        "Probability that a word gained or lost from reference to policy, a mean over the tokens "
        "of randomly kept responses.",
        "mean_t (π_t,v − π_ref,t,v)",
        "probability per token",
        "—",
    ),
    Metric(
        "bits_per_byte",
        "Bits per byte",
        "For models of different tokens: the texts' log-probabilities, each by its own tokens, "
        "per byte of UTF-8. Their difference is a log-ratio on given texts and no KL.",
        "−log₂ p(text) / bytes",
        "bits per byte",
        "—",
    ),
)
