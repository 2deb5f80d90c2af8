"""Rewards written in Python: functions and objects, plain or async, called with what they name.

How a callable is called follows from its parameters alone:

    f(prompts, responses)                        two lists of texts, by position
    f(prompts, completions, **columns)           by name, as TRL does: a conversation's prompt is
                                                 its messages, and its completion a list of one
    f(prompt, completion, answer)                in the singular: once for each response

Every further parameter is a column of the prompts (`**` takes them all), and there are always
`completion_ids` and `completions_with_special_tokens`: the tokens as written, end included, and
their text with nothing dropped. A list holds one value per response. An async callable waits for
others: in the singular up to `concurrency` calls are under way at once, each with its timeout and
retries; in the plural the one call for all has them.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from kleash.errors import RewardError
from kleash.models.async_calls import CallError, CallLimits, run_calls
from kleash.models.reward_model import (
    NO_COLUMNS,
    Columns,
    Content,
    RewardModel,
    excerpt,
    require_finite,
    text_of,
)
from kleash.models.user_code import described, find_callable, require_callable


class CallableReward:
    """A Python function or object that scores responses; see the module for how it is called."""

    def __init__(self, function: str | Callable[..., Any], limits: CallLimits | None = None):
        """Find a callable, and read from its parameters how it is to be called.

        Args:
            function: "module:function" (the current directory is searched too), or the function
                or object itself.
            limits: of an async callable; None: the defaults.

        Raises:
            RewardError: there is no such function, or limits are given for one that is not async.
        """
        if isinstance(function, str):
            self._name, self._function = function, find_callable(function)
        else:
            self._name = getattr(function, "__qualname__", type(function).__name__)
            self._function = require_callable(function, self._name)
        self._asynchronous = _is_async(self._function)
        self._style = _style_of(self._function)
        self._limits = limits or CallLimits()
        if self._limits != CallLimits() and not self._asynchronous:
            raise RewardError(
                f"expected an async function for `concurrency`, `timeout_s` and `retries`, got "
                f"{self._name!r}, which is not: leave them out, or write `async def`"
            )

    @property
    def name(self) -> str:
        """As it was given."""
        return self._name

    def score(
        self,
        prompts: Sequence[Content],
        responses: Sequence[str],
        columns: Columns = NO_COLUMNS,
    ) -> Float[Tensor, " batch"]:
        """See `RewardModel`; conversations reach it by position as `role: content` lines."""
        who = f"the reward function {self._name!r}"
        calls = self._arguments(prompts, responses, columns)
        returned = self._run(calls, responses)
        values = returned if self._style.singular else _listed(returned[0], who)
        numbers = _numbers(values, who, responses)
        require_finite(numbers, who, responses)
        return torch.tensor(numbers, dtype=torch.float32)

    def _arguments(
        self, prompts: Sequence[Content], responses: Sequence[str], columns: Columns
    ) -> list["_Arguments"]:
        """What each call is given: one call, or one for each response."""
        style = self._style
        if style.by_name:
            asked: list[Any] = [p if isinstance(p, str) else [dict(m) for m in p] for p in prompts]
            said: list[Any] = [
                r if isinstance(p, str) else [{"role": "assistant", "content": r}]
                for p, r in zip(prompts, responses, strict=True)
            ]
        else:
            asked, said = [text_of(prompt) for prompt in prompts], list(responses)
        wanted = self._columns(columns)
        if not style.singular:
            return [style.arguments(asked, said, {k: _copied(list(v)) for k, v in wanted.items()})]
        return [
            style.arguments(asked[i], said[i], {k: _copied(v[i]) for k, v in wanted.items()})
            for i in range(len(said))
        ]

    def _columns(self, columns: Columns) -> Columns:
        """The columns that it takes.

        Raises:
            RewardError: one has the name of the prompts or responses, or one is not there.
        """
        style = self._style
        taken = sorted(style.own & columns.keys()) if style.takes_all else []
        if taken:
            raise RewardError(
                f"expected columns with names of their own for the reward function {self._name!r}, "
                f"got {', '.join(map(repr, taken))}, which it takes from the run: rename them in "
                "the prompts"
            )
        missing = sorted(style.required - columns.keys())
        if missing:
            raise RewardError(
                f"expected the columns {', '.join(map(repr, missing))} in the prompts, which the "
                f"reward function {self._name!r} takes, got "
                f"{', '.join(map(repr, columns)) or 'none'}"
            )
        return {k: v for k, v in columns.items() if style.takes_all or k in style.accepted}

    def _run(self, calls: Sequence["_Arguments"], responses: Sequence[str]) -> list[Any]:
        """What each call returns."""
        returned: list[Any] = []
        try:
            if self._asynchronous:
                made = [functools.partial(self._function, *one[0], **one[1]) for one in calls]
                return run_calls(made, self._limits)
            for positional, named in calls:
                returned.append(self._function(*positional, **named))
            return returned
        except CallError as error:
            index, attempts, cause = error.index, error.attempts, error.__cause__
            late = f"no answer within {self._limits.timeout_s:g} s"
            reason = described(error.reason) if error.reason else late
        except Exception as error:  # The user's code: anything can come.
            index, attempts, cause = len(returned), 1, error
            reason = described(error)
        which = "a response" if self._style.singular else f"{len(responses)} responses"
        times = f" {attempts} times" if attempts > 1 else ""
        raise RewardError(
            f"expected the reward function {self._name!r} to score {which} "
            f"({index}: {excerpt(responses[index] if responses else '')}), got{times} {reason}"
        ) from cause


def as_reward_model(reward: str | Callable[..., Any] | RewardModel) -> RewardModel:
    """A reward as people have it, as a reward model: itself if it is one.

    Raises:
        RewardError: it is no name of a function, and neither a function nor a callable object.
    """
    return reward if isinstance(reward, RewardModel) else CallableReward(reward)


_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class _Style:
    """How a callable is called, read from its parameters."""

    own: frozenset[str]
    """Names of its parameters for prompts and responses."""
    by_name: bool
    """Called by name, with messages as they are; else by position, with texts."""
    singular: bool
    """Called once for each response."""
    accepted: frozenset[str] = frozenset()
    """Columns that it names."""
    required: frozenset[str] = frozenset()
    """Columns that it cannot do without."""
    takes_all: bool = False
    """Takes every column (`**columns`)."""

    def arguments(self, prompt: Any, response: Any, columns: dict[str, Any]) -> _Arguments:
        """Positional and named arguments of one call."""
        if not self.by_name:
            return (prompt, response), columns
        names = ("prompt", "completion") if self.singular else ("prompts", "completions")
        both: dict[str, Any] = dict(zip(names, (prompt, response), strict=True))
        return (), {**{name: both[name] for name in names if name in self.own}, **columns}


def _style_of(function: Callable[..., Any]) -> _Style:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a builtin that does not say
        return _Style(frozenset(), by_name=False, singular=False)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names = {p.name for p in named}
    by_name = bool(names & {"completion", "completions"})
    singular = bool(names & {"completion", "response"} and not names & {"completions", "responses"})
    if by_name:
        both = frozenset(("prompt", "completion") if singular else ("prompts", "completions"))
        own = both if takes_all else both & names
    else:
        by_position = [
            p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        own = frozenset(p.name for p in by_position[:2])
    further = [p for p in named if p.name not in own]
    return _Style(
        own=own,
        by_name=by_name,
        singular=singular,
        accepted=frozenset(p.name for p in further),
        required=frozenset(p.name for p in further if p.default is p.empty),
        takes_all=takes_all,
    )


def _is_async(function: Callable[..., Any]) -> bool:
    called = getattr(function, "__call__", None)  # noqa: B004 - the method of an object
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called)


def _copied(value: Any) -> Any:
    """Lists and objects made anew: what the callable does to its own is not done to the prompts."""
    if isinstance(value, list):
        return [_copied(item) for item in cast(list[Any], value)]
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in cast(dict[Any, Any], value).items()}
    return value


def _listed(returned: object, who: str) -> list[Any]:
    """What a function returned, as a list."""
    if isinstance(returned, list | tuple):
        return list(cast(Sequence[Any], returned))
    if hasattr(returned, "tolist"):
        listed = cast(Any, returned).tolist()
        return cast(list[Any], listed) if isinstance(listed, list) else [listed]
    _refuse_coroutines([returned], who)
    raise RewardError(f"expected {who} to return a list of numbers, got {type(returned).__name__}")


def _refuse_coroutines(values: Sequence[object], who: str) -> None:
    """Refuse values that were not awaited, and close them, so that Python does not warn as well."""
    found = [value for value in values if inspect.isawaitable(value)]
    for value in found:
        if inspect.iscoroutine(value):
            value.close()
    if found:
        raise RewardError(
            f"expected {who} to return numbers, got a {type(found[0]).__name__} that was not "
            "awaited: write the function with `async def`, and await inside it"
        )


def _numbers(values: Sequence[Any], who: str, responses: Sequence[str]) -> list[float]:
    """One float per response."""
    if len(values) != len(responses):
        raise RewardError(
            f"expected {who} to return {len(responses)} scores, one per response, got {len(values)}"
        )
    _refuse_coroutines(values, who)
    numbers: list[float] = []
    for index, value in enumerate(values):
        try:
            numbers.append(float(value))
        except OverflowError as error:
            raise RewardError(
                f"expected {who} to return a number that float32 holds for response {index}, "
                f"{excerpt(responses[index])}, got one beyond 1e308"
            ) from error
        except (TypeError, ValueError, RuntimeError) as error:
            raise RewardError(
                f"expected {who} to return a number for response {index}, "
                f"{excerpt(responses[index])}, got {excerpt(str(value))}"
            ) from error
    return numbers
