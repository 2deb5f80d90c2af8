"""Every error a user can meet.

    KleashError                  one sentence: what was expected, what came, what to do
    ├── UsageError               the command line itself is wrong            exit 2
    ├── ConfigError              a setting is unknown, missing, contradictory
    ├── PromptError              a prompt file cannot be used
    ├── ModelError               a model or tokenizer cannot be used
    ├── RewardError              a reward model or callable misbehaves
    ├── ScoringError             a log-probability or KL is impossible
    ├── NonFiniteError           something became NaN or infinite; names response and token
    ├── RunError                 a run directory cannot be written, read or resumed
    └── PreflightError           a check before the run failed                   exit 5

Each also inherits the standard exception it stands for, so `except ValueError` keeps working.
Mathematical functions raise plain `ValueError`: they have no user, only a caller.
"""


class KleashError(Exception):
    """Base of all errors that are the user's to mend; the command line prints them plainly."""

    exit_code = 1


class UsageError(KleashError, ValueError):
    """The command line cannot be understood."""

    exit_code = 2


class ConfigError(KleashError, ValueError):
    """A setting is unknown, missing or contradicts another."""


class PromptError(KleashError, ValueError):
    """A prompt file is missing, empty or malformed, or a prompt cannot be used."""


class ModelError(KleashError, ValueError):
    """A model or tokenizer is missing, incomplete or does not fit the others."""


class RewardError(KleashError, ValueError):
    """A reward model was not trained, or a reward callable did not keep its contract."""


class ScoringError(KleashError, ArithmeticError):
    """A scored number is impossible: a log-probability above 0, a KL below 0."""


class NonFiniteError(KleashError, ArithmeticError):
    """A number that must be finite is not; the message names the response and the token."""


class RunError(KleashError, OSError):
    """A run directory cannot be written, read or continued."""


class PreflightError(KleashError, ValueError):
    """A check before the run failed; the message names the fault and what to change."""

    exit_code = 5
