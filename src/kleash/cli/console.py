"""What a command line is read into, and how small results look in a terminal.

Imports what is heavy when it is called, so that `kleash --help` is quick.
"""

import contextlib
import gc
import logging
import math
import os
from collections.abc import Generator
from pathlib import Path

from kleash.config.recipe_library import configuration_file
from kleash.errors import UsageError
from kleash.kl.discrete import ExplicitKL
from kleash.kl.sampled import SampledKL

MOST_SAMPLES = 10_000_000
"""Of `kleash kl --samples`: what plain Python draws in some seconds."""


@contextlib.contextmanager
def without_collection() -> Generator[None]:
    """Within, no garbage is looked for: what imports make stays, and looking is a tenth of them."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def numbers(text: str) -> list[float]:
    """Numbers separated by commas.

    Raises:
        ValueError: a part is no number.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"expected numbers separated by commas, got {text!r}") from None


def split_overrides(arguments: tuple[str, ...]) -> tuple[Path | None, dict[str, str]]:
    """Split `CONFIG --dotted.key VALUE …` into the path and the overrides.

    Raises:
        UsageError: an option does not exist, is given twice or without a value, or there is more
            than one CONFIG.
        ConfigError: CONFIG is neither a file nor the name of a recipe.
    """
    from kleash.config.loading import key_of_flag, require_option

    path: Path | None = None
    overrides: dict[str, str] = {}
    seen: set[tuple[str, ...]] = set()
    rest = iter(arguments)
    for argument in rest:
        if argument.startswith("--"):
            key, equals, value = argument[2:].partition("=")
            require_option(key)
            if key_of_flag(key) in seen:
                raise UsageError(f"--{key} is given twice: leave one of them out")
            seen.add(key_of_flag(key))
            if not equals:
                found = next(rest, None)
                if found is None or found.startswith("--"):
                    raise UsageError(f"--{key} needs a value: --{key} VALUE")
                value = found
            overrides[key] = value
        elif path is None:
            path = configuration_file(argument)
        else:
            raise UsageError(f"expected one CONFIG, got {str(path)!r} and {argument!r}")
    return path, overrides


def sample_sizes(text: str) -> list[int]:
    """Whole numbers from 1 on, separated by commas.

    Raises:
        ValueError: a part is none.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 0 < int(part) <= MOST_SAMPLES for part in parts):
        raise ValueError(
            f"expected numbers of samples from 1 to {MOST_SAMPLES:,}, separated by commas, "
            f"got {text!r}"
        )
    return [int(part) for part in parts]


def _finite(value: float) -> float | str:
    """JSON has no infinity and no NaN: the words for them."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value


def explicit_as_json(result: ExplicitKL) -> dict[str, object]:
    """Every term of both directions; an infinite one is the string "Infinity"."""

    return {
        "unit": "nats",
        "p": result.p,
        "q": result.q,
        "kl_p_q": _finite(result.forward),
        "kl_p_q_terms": [_finite(term) for term in result.forward_terms],
        "kl_q_p": _finite(result.reverse),
        "kl_q_p_terms": [_finite(term) for term in result.reverse_terms],
    }


def sampled_as_json(sampled: SampledKL) -> dict[str, object]:
    """The estimates by number of samples, and the first sample worked out."""
    token = sampled.token
    return {
        "seed": sampled.seed,
        "token": {
            "outcome": token.outcome,
            "log_p": token.log_p,
            "log_q": _finite(token.log_q),
            **{name: _finite(value) for name, value in token.values.items()},
        },
        "limits": {name: _finite(limit) for name, limit in sampled.limits.items()},
        "estimates": [
            {
                "samples": size,
                **{
                    name: {
                        "mean": _finite(one.mean),
                        "standard_error": None
                        if one.standard_error is None
                        else _finite(one.standard_error),
                    }
                    for name, one in row.items()
                },
            }
            for size, row in sampled.rows.items()
        ],
    }


def print_sampled(sampled: SampledKL) -> None:
    """One sampled token worked out, and the estimates with what they converge to."""
    from rich.console import Console

    from kleash.report.svg_chart import format_with_error
    from kleash.report.terminal import TableColumn, print_table

    token, console = sampled.token, Console(highlight=False)
    p, q = (f"{math.exp(log):.4g}" for log in (token.log_p, token.log_q))
    worked = ", ".join(f"{name} = {value:.4g}" for name, value in token.values.items())
    text = f"log {p} − log {q} = {token.values['k1']:.4g}; {worked}".replace("-", "−")
    console.print(f"\na token drawn from p (outcome {token.outcome}): {text}")
    rows = [
        (
            f"{size:,}",
            *(
                f"{one.mean:.4g}".replace("-", "−")
                if one.standard_error is None
                else format_with_error(one.mean, one.standard_error)
                for one in row.values()
            ),
        )
        for size, row in sampled.rows.items()
    ]
    rows.append(("∞", *(f"{limit:.6g}" for limit in sampled.limits.values())))
    console.print()
    titles = ("samples", "k1 ± s.e.", "k2 ± s.e. (biased)", "k3 ± s.e.")
    print_table(console, [TableColumn(title) for title in titles], rows)
    console.print(f"KL(p‖q) in nats from samples of p, seed {sampled.seed}")


def print_explicit(result: ExplicitKL) -> None:
    """Every term of both directions, as a table."""
    from rich.console import Console

    from kleash.report.terminal import TableColumn, print_table

    headers = ("outcome", "p", "q", "p·ln(p/q)", "q·ln(q/p)")
    terms = zip(result.p, result.q, result.forward_terms, result.reverse_terms, strict=True)
    rows = [
        (str(index), f"{p:.4g}", f"{q:.4g}", f"{forward:+.4f}", f"{reverse:+.4f}")
        for index, (p, q, forward, reverse) in enumerate(terms)
    ]
    console = Console(highlight=False)
    print_table(console, [TableColumn(header) for header in headers], rows)
    console.print(f"\nKL(p‖q) = {result.forward:.4f} nats   KL(q‖p) = {result.reverse:.4f} nats")
    if float("inf") in (result.forward, result.reverse):
        console.print("Infinite: an outcome that one gives, the other never does.")


def quiet_libraries() -> None:
    """Keep loading bars of other libraries out of our display; their errors still reach us."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    # `datasets` is imported only where a prompt file needs it, and reads this when it is.
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    logging.getLogger("accelerate").setLevel(logging.ERROR)
