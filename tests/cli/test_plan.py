"""`kleash plan` on tiny models: it draws, says what it knows, keeps what it drew, and refuses."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from rich.console import Console

from kleash.cli.plan import (
    PlanRequest,
    plan,
    plan_request,
    plan_sentences,
    print_plan,
    replan,
    starting_point,
    write_plan,
)
from kleash.config.loading import parse_config
from kleash.config.schema import Config
from kleash.errors import ModelError, RewardError, UsageError
from kleash.kl.planning.frontier import PlanRow
from kleash.storage.plan_file import Frontier, make_frontier, read_frontier, write_frontier


def prefer_even(prompts: list[str], responses: list[str]) -> list[float]:
    """Words with an even last letter: nearly normal, so that a plan of a few samples knows."""
    return [float(sum(word[-1] in "02468" for word in r.split())) for r in responses]


def by_prompt(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(prompt)) for prompt in prompts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    tiny_models.save_model(folder / "policy")
    tiny_models.save_model(folder / "other", seed=1)
    lines = [json.dumps({"prompt": f"w{i} w{i + 1} w1" if i % 2 else f"w{i}"}) for i in range(6)]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return folder


def settings(folder: Path, **changes: Any) -> Config:
    tree: dict[str, Any] = {
        "policy": {"path": str(folder / "policy")},
        "reward_models": {"w3": {"callable": f"{__name__}:prefer_even"}},
        "prompts": {"train": str(folder / "prompts.jsonl")},
        "rollout": {"prompts_per_step": 8, "max_new_tokens": 6},
        "leash": {"target_kl": 0.3},
        "plan": {"prompts": 4, "responses": 128},
        "output": str(folder / "never"),
    }
    return parse_config({**tree, **changes}, where="the test")


@pytest.fixture(scope="module")
def planned(folder: Path) -> Frontier:
    config = settings(folder)
    return plan(config, PlanRequest(budgets=[0.1, 50.0], target_kl=config.leash.target_kl))


def test_a_plan_draws_and_answers(folder: Path, planned: Frontier) -> None:
    assert planned.scores.shape == (4, 128) and len(set(planned.prompts)) == 4
    assert len(planned.rows) == 12 and len(planned.budgets) == 3
    assert [row.known for row in planned.budgets] == [True, False, True]
    assert planned.about["reward_models"]["w3"]["callable"] == f"{__name__}:prefer_even"
    assert len(planned.about["reference"]["sha256"]) == 64
    assert not (folder / "never").exists()


def test_the_same_seed_draws_the_same_plan(folder: Path, planned: Frontier) -> None:
    again = plan(settings(folder), PlanRequest())
    assert torch.equal(again.scores, planned.scores)


def test_a_plan_samples_the_reference_not_the_policy(folder: Path, planned: Frontier) -> None:
    differs = {"path": str(folder / "policy"), "reference_differs": True}
    config = settings(folder, policy={"path": str(folder / "other")}, reference=differs)
    assert torch.equal(plan(config, PlanRequest()).scores, planned.scores)


def test_a_target_per_token_is_planned_in_nats_per_response(
    folder: Path, planned: Frontier
) -> None:
    config = settings(folder, leash={"target_kl_per_token": 0.06})
    asked = plan_request(config.leash)
    made = plan(config, asked)
    length = made.about["response_length"]
    assert 1 < length <= 6
    (row,) = made.budgets
    assert isinstance(row, PlanRow) and row.kl.value == pytest.approx(0.06 * length)
    _, said, start = plan_sentences(made, asked)
    assert said == (
        f"leash.target_kl_per_token 0.06 is {0.06 * length:.4g} nats per response, of "
        f"{length:.1f} tokens as the reference writes them"
    )
    assert re.fullmatch(
        rf"β starts at \d\.\d+: the plan's for {0.06 * length:.4g} nats per response", start
    )


def test_each_group_is_planned_from_its_own_prompts(folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"w{i} w{i + 1}", "group": "odd" if i % 2 else "even"} for i in range(10)]
    rows.append({"prompt": "w1"})
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    leash = {"groups": {"odd": 0.1, "even": 0.3}, "target_kl": 0.2}
    config = settings(folder, prompts={"train": str(file)}, leash=leash)
    asked = plan_request(config.leash)
    made = plan(config, asked)
    assert len(made.prompts) == 4 + 4 + 1 and list(made.groups) == ["odd", "even"]
    for name, target in (("odd", 0.1), ("even", 0.3)):
        group = made.groups[name]
        assert all(rows[number].get("group") == name for number in group.prompts)
        alone = make_frontier(
            group.scores, prompts=group.prompts, about={}, budgets=[target]
        ).budgets
        assert group.budgets == alone
    console = Console(file=io.StringIO(), width=80)
    print_plan(made, plan_sentences(made, asked), console=console)
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert max(map(len, text.splitlines())) <= 80
    assert "the plan's for leash.groups.even 0.3" in " ".join(text.split())
    assert "for leash.target_kl 0.2 nothing is planned: the group has a single prompt" in (
        " ".join(text.split())
    )
    page = write_plan(tmp_path / "plan", made, plan_sentences(made, asked), title="groups")
    again = replan(page.with_name("plan.json"), PlanRequest(betas=[1.0]))
    assert again.groups["odd"].budgets == made.groups["odd"].budgets
    assert plan_sentences(again, PlanRequest()) == plan_sentences(made, asked)


def test_normalised_scores_are_planned_in_their_units(folder: Path, planned: Frontier) -> None:
    config = settings(folder, score_normalisation="initial")
    scores = plan(config, PlanRequest()).scores
    raw = planned.scores.flatten()
    torch.testing.assert_close(scores.flatten(), (raw - raw.mean()) / raw.std(), atol=1e-5, rtol=0)


def test_everything_is_said_on_a_narrow_screen(planned: Frontier) -> None:
    question = PlanRequest(target_kl=0.3)
    console = Console(file=io.StringIO(), width=80)
    print_plan(planned, plan_sentences(planned, question), console=console)
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert max(map(len, text.splitlines())) <= 80
    assert "E*[score]" in text and "…" not in text
    assert "not known, KL 50" in text
    start = starting_point(planned, question)
    assert start is not None
    assert f"β starts at {start.beta:.4g}: the plan's for leash.target_kl 0.3" in text


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        (torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), "carried on from the"),
        (
            torch.tensor([[0.0, 1.0, 3.0], [2.0, 4.0, 9.0]]),
            "from the spread of the reference's scores",
        ),
    ],
)
def test_a_start_that_is_not_the_plans_is_said_to_be_none(scores: torch.Tensor, words: str) -> None:
    made = make_frontier(scores, prompts=list(range(len(scores))), about={}, budgets=[9.0])
    sentence = plan_sentences(made, PlanRequest(target_kl=9.0))[1]
    assert sentence.startswith("β starts at ") and words in sentence and "because" in sentence


def test_without_a_target_there_is_no_start(planned: Frontier) -> None:
    assert starting_point(planned, PlanRequest()) is None
    assert len(plan_sentences(planned, PlanRequest())) == 1


def test_a_plan_is_written_and_asked_again(planned: Frontier, tmp_path: Path) -> None:
    page = write_plan(tmp_path / "a" / "b", planned, ["a <b> sentence"], title="<script>")
    text = page.read_text()
    assert "a &lt;b&gt; sentence" in text and "<script" not in text
    assert "the optimum ± s.e." in text and "not known" in text
    again = replan(page.with_name("plan.json"), PlanRequest(betas=[2.0, 1.0], budgets=[0.1]))
    assert [row.beta.value for row in again.rows] == [2.0, 1.0]
    assert again.budgets == planned.budgets[:1]
    assert read_frontier(page.with_name("plan.json")).about == planned.about


def test_a_page_of_a_plan_without_a_row_has_no_chart(tmp_path: Path) -> None:
    flat = make_frontier(torch.ones(3, 4), prompts=[0, 1, 2], about={}, budgets=[1.0])
    page = write_plan(tmp_path, flat, [], title="flat").read_text()
    assert "<svg" not in page and "do not vary" in page


@pytest.mark.parametrize("question", [PlanRequest(betas=[-1.0]), PlanRequest(budgets=[0.0])])
def test_a_question_that_cannot_be_asked(planned: Frontier, tmp_path: Path, question: Any) -> None:
    write_frontier(tmp_path / "plan.json", planned)
    with pytest.raises(UsageError, match="must be positive"):
        replan(tmp_path / "plan.json", question)


def test_what_cannot_be_planned_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="expected a model at"):
        plan(settings(folder, policy={"path": "/nowhere"}), PlanRequest())
    flat = {"reward_models": {"prompt": {"callable": f"{__name__}:by_prompt"}}}
    made = plan(settings(folder, **flat), PlanRequest(target_kl=1.0))
    assert made.rows == []
    with pytest.raises(RewardError, match="vary within a prompt"):
        plan_sentences(made, PlanRequest(target_kl=1.0))


def test_a_starting_point_is_that_of_a_run(planned: Frontier) -> None:
    start = starting_point(planned, PlanRequest(target_kl=0.3))
    row = planned.budgets[2]
    assert start is not None and start.source == "plan"
    assert replace(start, beta=0.0).reason == ""
    assert start.beta == pytest.approx(row.beta.value)  # pyright: ignore[reportAttributeAccessIssue]
