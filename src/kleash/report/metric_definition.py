"""What it takes to say what a number of a run means."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """The definition of one key of metrics.jsonl."""

    key: str
    """As in metrics.jsonl; `<name>` stands for the name of a reward model, `<group>` of a group."""
    title: str
    meaning: str
    formula: str
    unit: str
    healthy: str
