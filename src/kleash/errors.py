"""Every error a user can meet.

    KleashError                  one sentence: what was expected, what came, what to do
    ├── UsageError               the command line itself is wrong            exit 2
    ├── ConfigError              a setting is unknown, missing, contradictory    exit 2
    ├── PromptError              a prompt file cannot be used
    ├── ModelError               a model or tokenizer cannot be used
    ├── RewardError              a reward model or callable misbehaves
    ├── RefusedError             a step that must not be taken; names response and token
    │   ├── ScoringError         a log-probability or KL is impossible
    │   ├── NonFiniteError       something became NaN or infinite
    │   └── TripwireError        the KL went beyond its bound, or the entropy collapsed
    ├── EngineError              what writes the responses failed or is another than expected
    ├── RunError                 a run directory cannot be written, read or resumed
    │   └── LostProcessError     another process of the run ended, or does not answer
    └── PreflightError           a check before the run failed                   exit 5

Each also inherits the standard exception it stands for, so `except ValueError` keeps working.
Mathematical functions raise plain `ValueError`: they have no user, only a caller.
"""

from collections.abc import Sequence


class KleashError(Exception):
    """Base of all errors that are the user's to fix; the command line prints them plainly."""

    exit_code = 1


class UsageError(KleashError, ValueError):
    """The command line cannot be understood."""

    exit_code = 2


class ConfigError(KleashError, ValueError):
    """A setting is unknown, missing or contradicts another, in whichever place it was given."""

    exit_code = 2


class PromptError(KleashError, ValueError):
    """A prompt file is missing, empty or malformed, or a prompt cannot be used."""


class ModelError(KleashError, ValueError):
    """A model or tokenizer is missing, incomplete or does not fit the others."""


class RewardError(KleashError, ValueError):
    """A reward model was not trained, or a reward callable did not keep its contract."""


class RefusedError(KleashError, ArithmeticError):
    """A step that must not be taken. The run's state stays that of the step before.

    Attributes:
        wire: what was tripped; the name of a tripwire.
        response: number of the offending response in the batch, if it is one response's fault.
        token: number of the offending token in that response, if it is one token's.
    """

    wire = "impossible"

    def __init__(self, message: str, *, response: int | None = None, token: int | None = None):
        """Keep a sentence and the place it speaks of.

        Args:
            message: the sentence; "{place}" in it becomes "token 3 of response 7".
            response: see the class.
            token: see the class.
        """
        super().__init__(message)
        self.response, self.token = response, token

    def __str__(self) -> str:
        row = self.response
        place = "no response in particular" if row is None else f"response {row}"
        if self.token is not None:
            place = f"token {self.token} of {place}"
        return str(self.args[0]).replace("{place}", place)

    def among(self, rows: Sequence[int]) -> None:
        """Count the response in the whole batch, of which it was looked for in these rows."""
        if self.response is not None:
            self.response = rows[self.response]


class ScoringError(RefusedError):
    """A scored number is impossible: a log-probability above 0, a KL below 0."""


class NonFiniteError(RefusedError):
    """A number that must be finite is not; the message names the response and the token."""

    wire = "non_finite"


class NonFiniteScoreError(NonFiniteError, RewardError):
    """A reward model gave a score that is NaN or infinite; the message names the response."""


class TripwireError(RefusedError):
    """A bound of the configuration was passed; `wire` is the key of the bound."""

    def __init__(self, message: str, *, wire: str, response: int, token: int):
        """As `RefusedError`, with the key of the bound."""
        super().__init__(message, response=response, token=token)
        self.wire = wire


class EngineError(KleashError, RuntimeError):
    """The engine that writes responses cannot be used, did not answer, or holds other weights."""


class EngineLostError(EngineError):
    """The connection to the engine broke; what was asked may be asked again once it is back."""


class RunError(KleashError, OSError):
    """A run directory cannot be written, read or continued."""


class LostProcessError(RunError):
    """Another process of the run ended, or does not answer; the message says why, if it is known.

    Attributes:
        ranks: the processes that ended without saying why.
    """

    def __init__(self, message: str, *, ranks: Sequence[int] = ()):
        """Keep a sentence and the processes it speaks of."""
        super().__init__(message)
        self.ranks = tuple(ranks)


class PreflightError(KleashError, ValueError):
    """A check before the run failed; the message names the fault and what to change."""

    exit_code = 5


class ReferenceChangedError(RefusedError, RunError):
    """The weights of the reference are not what they were when the run began."""

    wire = "reference"
