"""The preflight as a whole: its order, its report, the command, and what a run makes of it."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import fault_types
import model_variants
import planted_faults
import pytest
import tiny_models
import torch
import yaml
from rich.console import Console

from kleash.config.loading import load_config
from kleash.errors import PreflightError, PromptError
from kleash.preflight.checks import objective, reward_model
from kleash.preflight.checks.reward_model import Pair, preferences, read_pairs
from kleash.preflight.console import print_report
from kleash.preflight.findings import Finding, Report, skipped
from kleash.preflight.probe_batch import QUICK, Trial, draw
from kleash.preflight.runner import check, examine_components, require_sound, run_checks
from kleash.storage.run_directory import read_run
from kleash.training.assembly import assemble
from kleash.training.loop import train

FAIL = Finding("a.b", "fail", "2", "1", "It is [2].", "Make it 1.")
WARN = Finding("a.c", "warn", "3", "1", "It is 3.", "Make it 1.")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fault_types.material(tmp_path_factory.mktemp("world"), "llama")


@pytest.fixture
def world(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> fault_types.World:
    return fault_types.clean(material, "llama", monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def trial(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Trial:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("run")
        config = fault_types.clean(material, "llama", patch, folder).config()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return draw(config, assemble(config), QUICK)


def named(report: Report, name: str) -> Finding:
    (finding,) = [finding for finding in report.findings if finding.name == name]
    return finding


def test_a_clean_run_passes_every_check(world: fault_types.World) -> None:
    report = check(world.config())
    assert report.fails == report.warnings == ()
    rooms = {finding.name.split(".")[0] for finding in report.findings}
    subjects = (
        "logprobs sampling masks reference reward_model objective precision resources prompts "
        "learning_rate"
    )
    assert rooms == set(subjects.split())
    assert len({finding.name for finding in report.findings}) == len(report.findings)


@pytest.mark.parametrize(
    "variant",
    [
        "an adapter",
        "a chat template",
        "a budget",
        "pure bfloat16",
        "float32 weights, computed in bfloat16",
    ],
)
def test_a_clean_variant_has_no_fails(world: fault_types.World, variant: str) -> None:
    model_variants.VARIANTS[variant](world)
    report = check(world.config(), quick=True)
    assert report.fails == ()


def test_nothing_is_changed_by_looking(world: fault_types.World) -> None:
    config, components = world.components()
    before = {name: p.clone() for name, p in components.policy.model.named_parameters()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    examine_components(config, components, quick=False)
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in components.policy.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
    assert not components.optimizer.state


def test_what_assembly_refuses_is_a_finding(world: fault_types.World) -> None:
    world.set("policy.path", "/nowhere")
    (finding,) = check(world.config()).findings
    assert (finding.name, finding.verdict) == ("assembly", "fail")
    assert "expected a model at '/nowhere'" in finding.cause


def test_a_batch_that_cannot_be_drawn_is_a_finding(world: fault_types.World) -> None:
    world.set("reward_models", {"none": {"callable": "reward_functions:of_no_use"}})
    finding = named(check(world.config()), "batch")
    assert "one per response" in finding.cause


def test_a_check_that_breaks_has_found_something(trial: Trial) -> None:
    def broken(trial: Trial) -> Finding:
        raise ValueError("no such number")

    (finding,) = run_checks([broken], trial)
    assert finding.verdict == "fail"
    assert finding.name == "test_runner.broken"
    assert finding.cause == "no such number"


def test_a_finding_owes_a_cause_and_a_remedy() -> None:
    with pytest.raises(AssertionError):
        Finding("a.b", "fail", "1", "2", cause="It is 1.")
    with pytest.raises(AssertionError):
        Finding("a.b", "skipped", "1", "2")


def test_the_report_as_table_and_as_json() -> None:
    report = Report((FAIL, WARN, skipped("a.d", "Nothing to see.")), 0.5)
    console = Console(record=True, width=100)
    print_report(report, console)
    text = console.export_text()
    assert "It is [2]." in text and "Make it 1." in text and "Nothing to see." in text
    assert "3 checks in 0.5 s: 1 failed, 1 warned." in text
    plain = json.loads(json.dumps(report.as_json()))
    assert plain["verdict"] == "fail"
    assert [f["verdict"] for f in plain["findings"]] == ["fail", "warn", "skipped"]


# --- every remedy that is a setting, applied, makes its check pass -------------------------------


@pytest.mark.parametrize(
    ("changes", "check_name"),
    [
        ({"leash": {"beta": 1e4}}, "objective.strength"),
        ({"leash": {"beta": 1e-6}}, "objective.strength"),
        ({"leash": {"target_kl": 3.0, "initial_beta": 1e3}}, "objective.strength"),
        ({"leash": {"target_kl": 1e4}}, "objective.target"),
        ({"leash": {"target_kl": 0.01}}, "objective.target"),
        (
            {"leash": {"beta": 0.2, "placement": "loss_k1", "allow_biased": True}},
            "objective.gradient",
        ),
    ],
)
def test_the_setting_that_a_remedy_names_is_enough(
    trial: Trial, world: fault_types.World, changes: dict[str, dict[str, object]], check_name: str
) -> None:
    (one,) = [
        c
        for c in (objective.strength, objective.target, objective.gradient)
        if c.__name__ in check_name
    ]

    def look() -> Finding:
        config = world.config()
        placed = replace(
            trial.components.settings,
            placement=config.leash.placement,
            allow_biased=config.leash.allow_biased,
        )
        components = replace(trial.components, settings=placed)
        return one(replace(trial, config=config, components=components))

    for key, value in changes.items():
        world.set(key, value)
    bad = look()
    assert bad.verdict in ("warn", "fail")
    found = re.findall(r"(leash\.\w+): ([\w.e+-]*\w)", bad.remedy)
    assert found
    key, value = found[0]
    world.set(key, yaml.safe_load(value) if value[0].isalpha() else float(value))
    if "leave leash.allow_biased out" in bad.remedy:
        world.set("leash.allow_biased", False)
    assert look().verdict == "ok", bad.remedy


@pytest.mark.parametrize(
    ("fault", "remedy", "check_name"),
    [
        ("a wrong reference", {"reference": {}}, "logprobs.start"),
        ("a wrong reference", {"reference.reference_differs": True}, "logprobs.start"),
        ("responses cut short", {"rollout.max_new_tokens": 28}, "sampling.ending"),
        ("responses cut short", {"rollout.truncated": "score"}, "sampling.ending"),
        ("no end is ever produced", {"rollout.truncated": "score"}, "sampling.ending"),
        (
            "a template applied twice",
            {"reward_models.rm.template": "{prompt}{response}"},
            "reward_model.template",
        ),
        ("options that do nothing", {"leash.allow_biased": False}, "objective.inert"),
    ],
)
def test_the_remedy_makes_the_check_pass(
    world: fault_types.World, fault: str, remedy: dict[str, object], check_name: str
) -> None:
    (planted,) = [f for f in planted_faults.FAULTS if f.name == fault]
    planted.plant(world)
    # Some faults are planted while the components is assembled, so both readings begin there.
    assert named(examine_components(*world.components(), quick=True), check_name).verdict != "ok"
    for key, value in remedy.items():
        world.set(key, value)
    assert named(examine_components(*world.components(), quick=True), check_name).verdict == "ok"


def test_nothing_left_to_learn_from_is_found_and_tried_no_further(world: fault_types.World) -> None:
    (planted,) = [f for f in planted_faults.FAULTS if f.name == "all responses cut and dropped"]
    planted.plant(world)
    report = examine_components(*world.components(), quick=False)
    assert named(report, "sampling.ending").verdict == "fail"
    assert named(report, "resources.memory").verdict == "skipped"


@pytest.mark.skipif(
    not tiny_models.REAL.exists(), reason="needs the optional folder of real inputs"
)
@pytest.mark.parametrize("recipe", ["stories", "stories-free"])
def test_the_shipped_recipes_pass_the_quick_part(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = Path(__file__).parents[2]
    monkeypatch.chdir(checkout)
    path = checkout / "recipes" / f"{recipe}.yaml"
    report = check(load_config(path, {}, base=path), quick=True)
    assert report.fails == ()


# --- the reward on pairs --------------------------------------------------------------------------


def pairs(right: int, wrong: int) -> list[Pair]:
    one, other = "w3 w3 w4", "w5 w6 w7"
    return [Pair("w1", one, other)] * right + [Pair("w1", other, one)] * wrong


@pytest.mark.parametrize(
    ("given", "verdict", "cause"),
    [
        (pairs(20, 0), "ok", ""),
        (pairs(0, 20), "fail", "prefers what people rejected"),
        (pairs(10, 10), "warn", "than chance"),
        ([Pair("w1", "w3 w3 w3 w3", "w5")] * 20, "warn", "by length"),
        ([Pair("w1", "w4", "w5")] * 20, "fail", "the same score"),
        ([], "skipped", "--pairs"),
    ],
)
def test_preferences(trial: Trial, given: list[Pair], verdict: str, cause: str) -> None:
    liking = replace(
        trial.components.reward, rewards={"w3": (reward_of(fault_types.likes_w3), 1.0)}
    )
    found = preferences(replace(trial, components=replace(trial.components, reward=liking)), given)
    assert found.verdict == verdict, found
    assert cause in found.cause


class reward_of:  # noqa: N801  a function as a reward model
    def __init__(self, function: object) -> None:
        self.function = function

    def score(
        self, prompts: list[str], responses: list[str], columns: object = None
    ) -> torch.Tensor:
        return torch.tensor(self.function(prompts, responses))  # type: ignore[operator]


def test_pairs_are_read_and_refused(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"prompt": "p", "chosen": "c", "rejected": "r"}) + "\n\n")
    assert read_pairs(file) == [Pair("p", "c", "r")]
    file.write_text(json.dumps({"prompt": "p", "chosen": "c"}))
    with pytest.raises(PromptError, match=r"'rejected' as text on line 1 .*, got 'prompt', 'chos"):
        read_pairs(file)


def test_probes_name_the_word_that_wins(trial: Trial) -> None:
    liking = replace(
        trial.components.reward, rewards={"w3": (reward_of(fault_types.likes_w3), 1.0)}
    )
    changed = replace(trial, components=replace(trial.components, reward=liking))
    scores = liking.score(list(trial.written.prompts), trial.written.texts)
    seen = replace(changed, written=replace(trial.written, raw_scores=scores))
    assert "'w3 w3 w3 …'" in reward_model.probes(seen).cause


# --- a run ----------------------------------------------------------------------------------------


def test_a_run_keeps_the_warnings_and_is_not_changed_by_them(
    world: fault_types.World, tmp_path: Path
) -> None:
    world.tree |= {"steps": 1, "output": str(tmp_path / "with")}
    world.set("leash.allow_biased", True)
    looked = read_run(train(world.config(), preflight=require_sound))
    assert [w.split(":")[0] for w in looked.meta["warnings"]] == ["objective.inert"]
    world.tree |= {"output": str(tmp_path / "without")}
    plain = read_run(train(world.config()))
    assert plain.meta["warnings"] == []
    assert plain.metrics[1]["objective/scores"] == looked.metrics[1]["objective/scores"]


def test_a_warning_is_said_when_a_run_begins(
    world: fault_types.World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.tree |= {"steps": 1}
    world.set("leash.allow_biased", True)
    train(world.config(), preflight=require_sound)
    said = " ".join(capsys.readouterr().out.split())
    assert "warning: objective.inert: Options do nothing here: leash.allow_biased" in said
    assert "Remove leash.allow_biased" in said


def test_a_batch_that_cannot_be_made_begins_nothing_and_offers_no_way_round(
    world: fault_types.World,
) -> None:
    world.set("reward_models", {"none": {"callable": "reward_functions:of_no_use"}})
    with pytest.raises(
        PreflightError, match=r"no batch can be made: .* one per response, got \d+$"
    ):
        train(world.config(), preflight=require_sound)


def test_a_fault_begins_nothing(world: fault_types.World) -> None:
    world.set("leash.beta", 1e5)
    with pytest.raises(
        PreflightError, match=r"objective.strength: β is far too large .* Set leash"
    ):
        train(world.config(), preflight=require_sound)
    assert not Path(world.tree["output"]).exists()
    assert PreflightError.exit_code == 5


def test_the_command(world: fault_types.World) -> None:
    world.set("leash.beta", 1e5)
    file = world.folder / "bad.yaml"
    file.write_text(yaml.safe_dump(world.tree))
    command = [sys.executable, "-m", "kleash"]
    found = subprocess.run(
        [*command, "check", str(file), "--quick", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 5, found.stderr
    assert json.loads(found.stdout)["verdict"] == "fail"
    trained = subprocess.run(
        [*command, "train", str(file)], capture_output=True, text=True, check=False
    )
    assert trained.returncode == 5
    assert "objective.strength: β is far too large" in trained.stderr
    assert trained.stderr.count("\n") == 1
