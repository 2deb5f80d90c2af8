"""`kleash kl`: the divergence of two distributions that are written out."""

import json
from typing import Annotated

from cyclopts import Parameter

from kleash.cli.console import (
    explicit_as_json,
    numbers,
    print_explicit,
    print_sampled,
    sample_sizes,
    sampled_as_json,
)
from kleash.errors import UsageError
from kleash.kl.discrete import explicit_kl
from kleash.kl.sampled import sampled_explicit_kl


def kl_command(
    p: Annotated[str, Parameter(allow_leading_hyphen=True)],
    q: Annotated[str, Parameter(allow_leading_hyphen=True)],
    /,
    *,
    samples: Annotated[str, Parameter(show_default=False)] = "",
    seed: int = 0,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
    debug: Annotated[bool, Parameter(negative="", help="Show the traceback of an error.")] = False,
) -> None:
    """KL divergence of two explicit distributions: every term of the sum, both directions.

    With `--samples`, also what a trainer sees of it: k1, k2 and k3 from outcomes drawn from P.

    Parameters
    ----------
    p
        Probabilities of the policy, separated by commas.
    q
        Probabilities of the reference, separated by commas.
    samples
        Numbers of samples to estimate it from, separated by commas.
    seed
        Of the samples.
    as_json
        Print JSON instead of a table.
    """
    del debug  # read by `main.main`
    try:
        result = explicit_kl(numbers(p), numbers(q))
        sizes = sample_sizes(samples) if samples else []
    except ValueError as error:
        raise UsageError(str(error)) from None
    sampled = sampled_explicit_kl(result, sizes, seed=seed) if sizes else None
    if as_json:
        shown = explicit_as_json(result)
        if sampled is not None:
            shown["sampled"] = sampled_as_json(sampled)
        print(json.dumps(shown, indent=2, allow_nan=False))
    else:
        print_explicit(result)
        if sampled is not None:
            print_sampled(sampled)
