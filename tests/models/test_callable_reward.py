"""Rewards written in Python: called with what they name, and reported by their own lines."""

import asyncio
import inspect
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from kleash.errors import NonFiniteScoreError, RewardError
from kleash.models.async_calls import CallLimits
from kleash.models.callable_reward import CallableReward, as_reward_model
from kleash.models.reward_model import RewardModel

PROMPTS = ["w1 w2", "w3", "w4 w5 w6 w7 w8 w9", "w1"]
RESPONSES = [" w3", " w4 w5 w6 w7 w8 w9 w10", " w1 <eos>", " w2 w2 w2"]


def good(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(p) + len(r)) for p, r in zip(prompts, responses, strict=True)]


def as_tensor(prompts: list[str], responses: list[str]) -> torch.Tensor:
    return torch.tensor([1, 2, 3, 4])


def as_scalar(prompts: list[str], responses: list[str]) -> torch.Tensor:
    return torch.tensor(1.5)


def raising(prompts: list[str], responses: list[str]) -> list[float]:
    raise KeyError("no such word")


def short(prompts: list[str], responses: list[str]) -> list[float]:
    return [0.0]


def nan(prompts: list[str], responses: list[str]) -> list[float]:
    return [0.0, float("nan"), 0.0, 0.0]


def infinite(prompts: list[str], responses: list[str]) -> tuple[float, ...]:
    return (0.0, 0.0, float("-inf"), 0.0)


def text(prompts: list[str], responses: list[str]) -> list[str]:
    return ["0.5", "0.5", "much", "0"]


def none(prompts: list[str], responses: list[str]) -> None:
    return None


number = 3


@pytest.fixture(autouse=True)
def this_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rewards_under_test", sys.modules[__name__])


def test_functions_score() -> None:
    reward = CallableReward("rewards_under_test:good")
    assert isinstance(reward, RewardModel)
    assert reward.score(PROMPTS, RESPONSES).tolist() == good(PROMPTS, RESPONSES)
    assert reward.score([[{"role": "user", "content": "hi"}]], [""]).tolist() == [8.0]
    assert CallableReward("rewards_under_test:as_tensor").score(PROMPTS, RESPONSES).sum() == 10
    assert CallableReward("rewards_under_test:as_scalar").score(["a"], ["b"]).tolist() == [1.5]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raising", r"to score 4 responses \(0: ' w3'\), got KeyError: 'no such word', raised at"),
        ("short", "to return 4 scores, one per response, got 1"),
        ("nan", r"finite score .*:nan' for response 1, ' w4 w5 w6 w7 w8 w9 w10', got nan"),
        ("infinite", r"for response 2, ' w1 <eos>', got -inf"),
        ("text", r"a number for response 2, ' w1 <eos>', got 'much'"),
        ("none", "to return a list of numbers, got NoneType"),
    ],
)
def test_functions_that_break_the_contract(name: str, message: str) -> None:
    reward = CallableReward(f"rewards_under_test:{name}")
    with pytest.raises(RewardError, match=message):
        reward.score(PROMPTS, RESPONSES)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("good", "as 'module:function', got 'good'"),
        (":good", "as 'module:function'"),
        ("rewards_under_test:", "as 'module:function'"),
        ("no_such_module:good", "module 'no_such_module' .* ModuleNotFoundError"),
        ("rewards_under_test:nothing", "the reward '.*:nothing', got none"),
        ("rewards_under_test:number", "the reward '.*:number', got int"),
    ],
)
def test_functions_that_are_not_there(name: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        CallableReward(name)


def test_functions_in_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_rewards_here.py").write_text("def ones(p, r):\n    return [1] * len(r)\n")
    (tmp_path / "my_broken_rewards.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    assert CallableReward("my_rewards_here:ones").score(["a"], ["b"]).tolist() == [1.0]
    with pytest.raises(RewardError, match="ZeroDivisionError"):
        CallableReward("my_broken_rewards:ones")


def test_excerpts_are_short() -> None:
    reward = CallableReward("rewards_under_test:raising")
    with pytest.raises(RewardError) as caught:
        reward.score(["p"], ["x" * 1000])
    assert len(str(caught.value)) < 220 + len(__file__)


# --- how a callable is called follows from its parameters --------------------------------------

CHAT = [{"role": "user", "content": "2 + 3 ="}]
COLUMNS: dict[str, list[Any]] = {
    "answer": ["5", "4", None, "x"],
    "completion_ids": [[1, 2], [3], [4, 5, 6], []],
}


class Recorder:
    """A callable that keeps what it was given."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def lists(self, prompts: Any, responses: Any) -> list[float]:
        self.calls.append((prompts, responses))
        return [0.0] * len(responses)

    def as_trl(self, prompts: Any, completions: Any, **columns: Any) -> list[float]:
        self.calls.append((prompts, completions, columns))
        return [0.0] * len(completions)

    def completions_alone(self, completions: Any, answer: Any) -> list[float]:
        self.calls.append((completions, answer))
        return [0.0] * len(completions)

    def by_position(self, p: Any, r: Any, answer: Any, *, absent: Any = 3) -> list[float]:
        self.calls.append((p, r, answer, absent))
        return [0.0] * len(r)

    def each(self, prompt: Any, completion: Any, answer: Any) -> float:
        self.calls.append((prompt, completion, answer))
        return float(completion.strip() == answer)


def test_columns_reach_a_function_by_name() -> None:
    seen = Recorder()
    said = [{"role": "assistant", "content": "r"}]
    for function, prompts, expected in (
        (seen.lists, ["a", CHAT], (["a", "user: 2 + 3 ="], ["r", "r"])),
        (seen.as_trl, ["a", CHAT], (["a", CHAT], ["r", said], {"answer": ["5", "4"]})),
        (seen.completions_alone, ["a", CHAT], (["r", said], ["5", "4"])),
        (seen.by_position, ["a", CHAT], (["a", "user: 2 + 3 ="], ["r", "r"], ["5", "4"], 3)),
    ):
        CallableReward(function).score(prompts, ["r", "r"], {"answer": ["5", "4"]})
        assert seen.calls.pop() == expected


def test_a_verifiable_reward_is_called_once_a_response() -> None:
    seen = Recorder()
    scores = CallableReward(seen.each).score(PROMPTS, [" 5", " 5", "", "x"], COLUMNS)
    assert scores.tolist() == [1.0, 0.0, 0.0, 1.0]
    assert seen.calls[1] == ("w3", " 5", "4")


class Judge:
    """An object with `__call__`, and with settings of its own."""

    def __init__(self, worth: float):
        self.worth = worth

    def __call__(self, completions: list[str], completion_ids: list[list[int]]) -> list[float]:
        return [self.worth * len(ids) for ids in completion_ids]


judge = Judge(2.0)


def test_objects_score() -> None:
    for given in ("rewards_under_test:judge", judge):
        assert CallableReward(given).score(PROMPTS, RESPONSES, COLUMNS).tolist() == [4, 2, 6, 0]
    with pytest.raises(RewardError, match="got the class Judge: make an object of it"):
        CallableReward("rewards_under_test:Judge")


def test_rewards_as_people_have_them() -> None:
    model = CallableReward(judge)
    assert as_reward_model(model) is model
    for given in (judge, "rewards_under_test:judge", lambda p, r: [4.0, 2.0, 6.0, 0.0]):
        scores = as_reward_model(given).score(PROMPTS, RESPONSES, COLUMNS)
        assert scores.tolist() == [4, 2, 6, 0]
    with pytest.raises(RewardError, match="for the reward 'Judge', got the class Judge"):
        as_reward_model(Judge)


def test_a_callable_cannot_change_the_prompts() -> None:
    def greedy(prompts: Any, completions: Any, notes: Any) -> list[float]:
        prompts[0][0]["content"] = "changed"
        notes[0].append("changed")
        return [0.0]

    prompts, notes = [[{"role": "user", "content": "as it was"}]], [["as it was"]]
    CallableReward(greedy).score(prompts, ["r"], {"notes": notes})
    assert prompts[0][0]["content"] == notes[0][0] == "as it was" and len(notes[0]) == 1


def test_columns_that_are_not_there_or_not_free() -> None:
    seen = Recorder()
    with pytest.raises(RewardError, match=r"columns 'answer' in the prompts, .*got 'gold'"):
        CallableReward(seen.completions_alone).score(["a"], ["r"], {"gold": ["5"]})
    with pytest.raises(RewardError, match=r"names of their own .* got 'completions', which"):
        CallableReward(seen.as_trl).score(["a"], ["r"], {"completions": ["5"]})
    with pytest.raises(RewardError, match=r"to score a response \(0: 'r'\), got AttributeError"):
        CallableReward(seen.each).score([CHAT], ["r"], {"answer": ["5"]})


# --- what goes wrong is reported by the user's own lines ----------------------------------------


def helper(response: str) -> float:
    return json.loads(response)  # the line at fault


def deep(prompts: list[str], responses: list[str]) -> list[float]:
    return [helper(r) for r in responses]


def line_of(function: Any, text: str) -> str:
    lines, first = inspect.getsourcelines(function)
    return f"{__file__}:{first + next(i for i, line in enumerate(lines) if text in line)}"


def test_the_frames_of_the_user_are_shown() -> None:
    with pytest.raises(RewardError, match="got JSONDecodeError: Expecting value") as caught:
        CallableReward(deep).score(["p"], ["no json"])
    message = str(caught.value)
    assert f"{line_of(helper, 'at fault')} in helper" in message
    assert message.index("in helper") < message.index(f"{line_of(deep, 'helper(r)')} in ")
    assert "src/kleash" not in message and "\n" not in message


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "x = 1\n1 / 0\n",
            r"ZeroDivisionError: division by zero, raised at .*broken_\d.py:2 in",
        ),
        ("def f(:\n", r"SyntaxError: .*, at .*broken_\d.py:1"),
        ("import sys\nsys.exit('no key')\n", r"SystemExit: no key, raised at .*broken_\d.py:2"),
    ],
)
def test_a_module_that_raises_shows_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    name = f"broken_{len(source) % 10}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    with pytest.raises(RewardError, match=message):
        CallableReward(f"{name}:f")


def test_scores_that_float32_does_not_hold() -> None:
    def huge(prompts: Any, responses: Any) -> list[float]:
        return [0.0, -1e300]

    with pytest.raises(NonFiniteScoreError, match=r"for response 1, 'b', that float32 .*-1e\+300"):
        CallableReward(huge).score(["p", "p"], ["a", "b"])
    with pytest.raises(RewardError, match=r"holds for response 0, 'a', got one beyond 1e308"):
        CallableReward(lambda p, r: [10**400]).score(["p"], ["a"])


def test_a_coroutine_that_was_not_awaited_is_named() -> None:
    async def slow() -> float:
        return 1.0

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for forgetful in (lambda p, r: slow(), lambda p, r: [slow() for _ in r]):
            with pytest.raises(RewardError, match=r"got a coroutine that was not awaited: write"):
                CallableReward(forgetful).score(["p", "q"], ["a", "b"])


# --- async callables ----------------------------------------------------------------------------

FAST = CallLimits(concurrency=2, timeout_s=5.0, retries=1, pause_s=0.0)


class Api:
    """A judge behind an API: it counts the calls under way, and fails as it is told to."""

    def __init__(self, failures: int = 0):
        self.failures, self.under_way, self.most, self.calls = failures, 0, 0, 0
        self.loops: set[Any] = set()

    async def __call__(self, prompt: str, completion: str, answer: str) -> float:
        self.calls += 1
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        self.loops.add(asyncio.get_running_loop())
        await asyncio.sleep(0.01)
        self.under_way -= 1
        if self.failures > 0:
            self.failures -= 1
            raise ConnectionError("try again")
        return float(len(completion) + len(answer))


def test_async_calls_are_bounded_and_in_order() -> None:
    api = Api()
    reward = CallableReward(api, FAST)
    answers = ["", "1", "22", "333", "4444"]
    replies = ["a", "bb", "ccc", "dddd", "eeeee"]
    assert reward.score(["p"] * 5, replies, {"answer": answers}).tolist() == [1, 3, 5, 7, 9]
    assert (api.most, api.calls) == (2, 5)
    one = CallableReward(api, CallLimits(concurrency=1))
    api.most = 0
    one.score(["p"] * 3, ["a"] * 3, {"answer": [""] * 3})
    assert api.most == 1 and len(api.loops) == 1


def test_async_calls_are_made_again() -> None:
    api = Api(failures=1)
    assert CallableReward(api, FAST).score(["p"], ["a"], {"answer": ["b"]}).tolist() == [2.0]
    assert api.calls == 2
    api = Api(failures=10)
    with pytest.raises(
        RewardError, match=r"got 2 times ConnectionError: try again, raised at"
    ) as e:
        CallableReward(api, FAST).score(["p"], ["a"], {"answer": ["b"]})
    assert f"{line_of(Api, 'raise ConnectionError')} in __call__" in str(e.value)
    assert api.calls == 2 and isinstance(e.value.__cause__, ConnectionError)


def test_a_call_that_hangs_is_given_up() -> None:
    cancelled: list[str] = []

    async def hangs(prompt: str, response: str) -> float:
        try:
            await asyncio.sleep(3600 if response == "b" else 0)
        except asyncio.CancelledError:
            cancelled.append(response)
            raise
        return 1.0

    limits = CallLimits(timeout_s=0.05, retries=0)
    message = r"score a response \(1: 'b'\), got no answer within 0.05 s$"
    with pytest.raises(RewardError, match=message):
        CallableReward(hangs, limits).score(["p", "p"], ["a", "b"])
    assert cancelled == ["b"]


async def all_at_once(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    await asyncio.sleep(0)
    return [float(len(c)) for c in completions]


def test_an_async_function_in_the_plural_takes_all() -> None:
    assert CallableReward(all_at_once).score(["p", "p"], ["a", "bb"]).tolist() == [1.0, 2.0]

    async def within_a_notebook() -> list[float]:
        return CallableReward(all_at_once).score(["p"], ["abc"]).tolist()

    assert asyncio.run(within_a_notebook()) == [3.0]


def test_limits_are_for_async_functions() -> None:
    with pytest.raises(RewardError, match=r"an async function for `concurrency`.*'good', which"):
        CallableReward(good, CallLimits(retries=5))
