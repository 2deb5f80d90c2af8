"""Evidence about the law of drawn words: closed forms on small tables, and few false alarms."""

import math

import pytest
import torch
from torch import Tensor

from kleash.preflight.sampling_distribution import EXPONENTS, Evidence, add_evidence, no_evidence

TABLE = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625], dtype=torch.float64).log()
PROMPT = torch.tensor([4])


def read(logprobs: Tensor, words: list[int], prompt: Tensor = PROMPT) -> Evidence:
    evidence = no_evidence(logprobs.shape[1], len(words))
    add_evidence(evidence, logprobs, prompt, torch.tensor(words), (0,))
    return evidence


def test_a_cut_by_rank_mass_or_ratio_gains_what_it_leaves_out() -> None:
    """Three words of mass 7/8 are drawn and none beyond: each cut gains −log 7/8 a token."""
    words = [0, 1, 2, 0, 1, 0]
    evidence = read(TABLE.expand(6, -1), words)
    expected = -6 * math.log(7 / 8)
    assert evidence.rank == 2
    assert float(evidence.beyond_rank[2]) == pytest.approx(expected)
    assert evidence.above == pytest.approx(0.75)
    # The cut at 0.76 keeps words with less than that above them: the same three.
    # The cut at 0.76 keeps words with less than that above them: the same three.
    assert float(evidence.beyond_mass[76]) == pytest.approx(expected)
    assert evidence.ratio == pytest.approx(0.25)
    assert float(evidence.below_ratio[7]) == pytest.approx(expected)  # 10^−0.7 ≈ 0.2


def test_a_word_that_is_never_drawn() -> None:
    evidence = read(TABLE.expand(6, -1), [0, 1, 2, 0, 1, 0])
    assert evidence.drawn.tolist() == [3, 2, 1, 0, 0]
    assert float(evidence.never[3]) == pytest.approx(-6 * math.log1p(-0.0625))
    assert evidence.early_stop.tolist() == pytest.approx([-math.log(0.5)] * 6)


def test_repeats_are_counted_against_their_expectation() -> None:
    """Seen at each place: {4}, {4, 0}, {4, 0}; drawn 0, 0, 1."""
    evidence = read(TABLE.expand(3, -1), [0, 0, 1])
    assert evidence.repeats == pytest.approx(1 - (0.0625 + 0.5625 + 0.5625))
    variance = sum(p * (1 - p) for p in (0.0625, 0.5625, 0.5625))
    assert evidence.repeats_variance == pytest.approx(variance)


def test_clean_draws_gain_little() -> None:
    """A gain is −log of a p-value: over clean batches its mean is at most about 1."""
    generator = torch.Generator().manual_seed(0)
    gains: dict[str, list[float]] = {"rank": [], "heat": [], "never": [], "repeats": []}
    for _ in range(300):
        logits = 1.5 * torch.randn(40, 12, generator=generator, dtype=torch.float64)
        logprobs = logits.log_softmax(-1)
        words = torch.multinomial(logprobs.exp(), 1, generator=generator).squeeze(1)
        evidence = no_evidence(12, 40)
        add_evidence(evidence, logprobs, torch.tensor([0]), words, (0,))
        never = torch.where(evidence.drawn == 0, evidence.never, 0.0)
        gains["rank"].append(float(evidence.beyond_rank[evidence.rank]))
        gains["heat"].append(max(0.0, float(evidence.heated.max())))
        gains["never"].append(max(0.0, float(never.max()) - math.log(12)))
        gains["repeats"].append(evidence.repeats**2 / 2 / evidence.repeats_variance)
    for name, values in gains.items():
        assert sum(values) / len(values) < 1.2, name
        assert max(values) < 12, name


@pytest.mark.parametrize(("heat", "exponent"), [(0.5, 2.0), (2.0, 0.5)])
def test_a_temperature_is_recognised(heat: float, exponent: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs = (1.5 * torch.randn(400, 12, generator=generator).double()).log_softmax(-1)
    shaped = (logprobs / heat).softmax(-1)
    words = torch.multinomial(shaped, 1, generator=generator).squeeze(1)
    evidence = no_evidence(12, 400)
    add_evidence(evidence, logprobs, torch.tensor([0]), words, (0,))
    best = EXPONENTS[int(evidence.heated.argmax())]
    assert abs(math.log(best / exponent)) < 0.3
    assert float(evidence.heated.max()) > 14
