"""The README.md of a checkpoint: what it is, how far from its reference, how to open it.

A pure function from facts to text. Names and paths come from users and hubs: in the front matter
they are JSON strings, which YAML reads as they stand, and in the text they are code spans that
nothing can end, so that no name can add a heading, a link, HTML or another key.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ModelCardFacts:
    """What a card says. None where a run does not know it: the card then says nothing of it."""

    reference: str
    """Path or hub name of the frozen reference."""
    base_model: str
    """What an adapter is an adapter of, or the full model was trained from."""
    kind: Literal["full", "lora"]
    algorithm: str
    """ppo, grpo or rloo."""
    step: int
    version: str
    """Of kleash."""
    beta: float
    beta_unit: str
    """Score per nat, or group standard deviations per nat."""
    placement: str
    """Where the KL is charged, such as reward_k1."""
    kl: float
    """Exact KL to the reference, nats per response."""
    kl_interval: tuple[float, float] | None = None
    """95 % interval of that KL."""
    kl_responses: int | None = None
    """How many responses the KL is a mean of."""
    kl_of: str | None = None
    """Whose responses: to which prompts, and of which policy where it is not this very one."""
    target_kl: float | None = None
    score: float | None = None
    score_error: float | None = None
    """Standard error, clustered by prompt."""
    reference_score: float | None = None
    reward_models: Mapping[str, str] | None = None
    """Path or callable of each reward model, by name."""
    prompts: str | None = None
    """The file or data set of training prompts."""
    seed: int | None = None
    dtype: str = "float32"
    """In which the checkpoint was verified."""
    quantized_base: bool = False
    """Whether the base of an adapter is quantised, as the file beside it says."""


def model_card(facts: ModelCardFacts) -> str:
    """Text of the README.md beside the weights.

    Raises:
        ValueError: the interval does not hold the KL.

    Example:
        >>> card = model_card(ModelCardFacts(
        ...     reference="models/sft", base_model="models/sft", kind="full", algorithm="ppo",
        ...     step=200, version="0.2", beta=0.1, beta_unit="score per nat",
        ...     placement="reward_k1", kl=4.9, kl_interval=(4.5, 5.3),
        ... ))
        >>> "4.9 nats per response, 95 % interval 4.5 to 5.3" in card
        True
    """
    interval = facts.kl_interval
    if interval is not None and not interval[0] <= facts.kl <= interval[1]:
        raise ValueError(f"expected an interval that holds the KL {facts.kl:g}, got {interval}")
    parts = [_front_matter(facts), _heading(facts), _table(facts), _opening(facts), _reading(facts)]
    return "\n\n".join(parts) + "\n"


def _front_matter(facts: ModelCardFacts) -> str:
    tags = ["kleash", "rlhf", facts.algorithm, *(["lora"] if facts.kind == "lora" else [])]
    lines = [
        f"base_model: {_yaml(facts.base_model)}",
        f"library_name: {'peft' if facts.kind == 'lora' else 'transformers'}",
        "pipeline_tag: text-generation",
        "tags:",
        *(f"- {_yaml(tag)}" for tag in tags),
    ]
    return "\n".join(["---", *lines, "---"])


def _heading(facts: ModelCardFacts) -> str:
    what = "A LoRA adapter" if facts.kind == "lora" else "A causal language model"
    return (
        f"# Policy after {facts.step} steps of {facts.algorithm.upper()} on a KL leash\n\n"
        f"{what}, trained from {_code(facts.base_model)} with kleash {facts.version} to raise a "
        f"score while its KL divergence to the frozen reference {_code(facts.reference)} is "
        "penalised."
    )


def _table(facts: ModelCardFacts) -> str:
    budget = None if facts.target_kl is None else f"{facts.target_kl:g} nats per response"
    rows = [
        ("reference", _code(facts.reference)),
        ("exact KL(policy ‖ reference)", _kl(facts)),
        ("KL budget", budget),
        ("objective", f"score − β·KL, KL charged as {_code(facts.placement)}"),
        ("β in force", f"{facts.beta:.4g} {facts.beta_unit}"),
        ("score", _score(facts)),
        *((f"reward model {_code(k)}", _code(v)) for k, v in (facts.reward_models or {}).items()),
        ("training prompts", None if facts.prompts is None else _code(facts.prompts)),
        ("seed", None if facts.seed is None else str(facts.seed)),
    ]
    body = [f"| {name} | {value} |" for name, value in rows if value is not None]
    return "\n".join(["| | |", "|---|---|", *body])


def _kl(facts: ModelCardFacts) -> str:
    text = f"{facts.kl:.4g} nats per response"
    if facts.kl_interval is not None:
        text += ", 95 % interval {:.4g} to {:.4g}".format(*facts.kl_interval)
    text += "" if facts.kl_responses is None else f", {facts.kl_responses:,} responses"
    return text + ("" if facts.kl_of is None else f" {facts.kl_of}")


def _score(facts: ModelCardFacts) -> str | None:
    if facts.score is None:
        return None
    error = "" if facts.score_error is None else f" ± {facts.score_error:.2g} (s.e.)"
    start = (
        "" if facts.reference_score is None else f"; the reference's {facts.reference_score:+.4g}"
    )
    return f"{facts.score:+.4g}{error}{start}"


def _opening(facts: ModelCardFacts) -> str:
    dtype = f"dtype=torch.{facts.dtype}" if facts.dtype.isidentifier() else ""
    opened = ["import torch", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if facts.kind == "lora":
        opened = ["import torch", "from peft import AutoPeftModelForCausalLM",
                  "from transformers import AutoTokenizer", ""]  # fmt: skip
    name = "AutoPeftModelForCausalLM" if facts.kind == "lora" else "AutoModelForCausalLM"
    given, read = ["folder", *([dtype] if dtype else [])], list[str]()
    if facts.quantized_base:
        opened = ["import json", "from pathlib import Path", "", *opened[:-1],
                  "from transformers import BitsAndBytesConfig", ""]  # fmt: skip
        read = ['settings = json.loads((Path(folder) / "quantization_config.json").read_text())']
        given.append("quantization_config=BitsAndBytesConfig.from_dict(settings)")
    opened += [
        'folder = "."  # this folder',
        *read,
        f"model = {name}.from_pretrained({', '.join(given)})",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
    ]
    code = "\n".join(opened)
    note = (
        f"\n\nThe adapter needs its base model {_code(facts.base_model)}, at the path that "
        "`adapter_config.json` names"
        + (", in 4 bits (`pip install bitsandbytes`)." if facts.quantized_base else ".")
        if facts.kind == "lora"
        else ""
    )
    return f"## How to open it\n\n```python\n{code}\n```{note}"


def _reading(facts: ModelCardFacts) -> str:
    return (
        "## How to read the numbers\n\n"
        "The KL is exact at every token (over the whole vocabulary, not sampled), summed over a "
        "response and averaged over responses that the policy wrote; it is positive when the "
        "policy has drifted. The score is the reward model's: what was optimised, not quality. "
        "`kleash audit FOLDER REFERENCE --prompts FILE` measures the KL again on other prompts."
    )


def _yaml(text: str) -> str:
    """A JSON string, which is a YAML double-quoted scalar on one line."""
    return json.dumps(text)


def _code(text: str) -> str:
    """A code span of any text on one line of a table: backticks, bars, line ends do not end it."""
    shown = "".join(f"[U+{ord(c):04X}]" if _unprintable(c) else c for c in text)
    # A bar ends a cell even within code, and a backslash before one would be shown.
    shown = shown.replace("|", "[U+007C]")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    padding = " " if "`" in shown or not shown.strip() or shown != shown.strip() else ""
    return f"{fence}{padding}{shown}{padding}{fence}"


def _unprintable(character: str) -> bool:
    return not character.isprintable()
