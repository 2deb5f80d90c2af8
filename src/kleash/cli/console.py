"""What a command line is read into, and how small results look in a terminal.

Imports what is heavy when it is called, so that `kleash --help` is quick.
"""

import logging
from pathlib import Path

from kleash.config.recipe_library import configuration_file
from kleash.errors import UsageError
from kleash.kl.discrete import ExplicitKL


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
        UsageError: a value is missing, or there is more than one CONFIG.
        ConfigError: CONFIG is neither a file nor the name of a recipe.
    """
    path: Path | None = None
    overrides: dict[str, str] = {}
    rest = iter(arguments)
    for argument in rest:
        if argument.startswith("--"):
            key, equals, value = argument[2:].partition("=")
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


def explicit_as_json(result: ExplicitKL) -> dict[str, object]:
    """Every term of both directions; an infinite one is the string "Infinity"."""

    def finite(value: float) -> float | str:
        return "Infinity" if value == float("inf") else value

    return {
        "unit": "nats",
        "p": result.p,
        "q": result.q,
        "kl_p_q": finite(result.forward),
        "kl_p_q_terms": [finite(term) for term in result.forward_terms],
        "kl_q_p": finite(result.reverse),
        "kl_q_p_terms": [finite(term) for term in result.reverse_terms],
    }


def print_explicit(result: ExplicitKL) -> None:
    """Every term of both directions, as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    headers = ("outcome", "p", "q", "p·ln(p/q)", "q·ln(q/p)")
    for header in headers:
        table.add_column(header, justify="right")
    rows = zip(result.p, result.q, result.forward_terms, result.reverse_terms, strict=True)
    for index, (p, q, forward, reverse) in enumerate(rows):
        cells = (f"{p:.4g}", f"{q:.4g}", f"{forward:+.4f}", f"{reverse:+.4f}")
        table.add_row(str(index), *cells)
    console = Console(highlight=False)
    console.print(table)
    console.print(f"\nKL(p‖q) = {result.forward:.4f} nats   KL(q‖p) = {result.reverse:.4f} nats")
    if float("inf") in (result.forward, result.reverse):
        console.print("Infinite: an outcome that one gives, the other never does.")


def quiet_libraries() -> None:
    """Keep loading bars of other libraries out of our display; their errors still reach us."""
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
