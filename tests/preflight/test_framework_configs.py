"""Other frameworks' KL settings in our words: each fact once, and what cannot be read."""

import json
from pathlib import Path

import pytest
import yaml

from kleash.errors import ConfigError, UsageError
from kleash.preflight.findings import Finding
from kleash.preflight.framework_configs import Framework, read_framework, read_settings


def findings(framework: Framework, *arguments: str) -> dict[str, Finding]:
    report = read_framework(framework, arguments)
    return {finding.name.partition(".")[2]: finding for finding in report.findings}


@pytest.mark.parametrize(
    ("framework", "arguments", "verdict", "measured"),
    [
        ("trl", ["grpo", "--beta", "0.04"], "warn", "k3 in the loss: biased"),
        (
            "trl",
            ["--beta=0.04", "--use_bias_correction_kl=true"],
            "warn",
            "ρ·k3 in the loss: token-local",
        ),
        ("trl", ["rloo", "--beta", "0.05"], "ok", "k1 in the reward: exact"),
        ("trl", ["ppo", "--kl_coef", "0.05"], "ok", "k1 in the reward: exact"),
        ("trl", ["--kl-estimator", "k3"], "warn", "k3 in the reward: biased"),
        ("verl", ["algorithm.use_kl_in_reward=True"], "ok", "k1 in the reward: exact"),
        (
            "verl",
            ["algorithm.use_kl_in_reward=True", "algorithm.kl_penalty=abs"],
            "warn",
            "|k1| in the reward: biased",
        ),
        (
            "verl",
            ["actor_rollout_ref.actor.use_kl_loss=True"],
            "warn",
            "k3 in the loss: biased",
        ),
        (
            "verl",
            [
                "actor_rollout_ref.actor.use_kl_loss=True",
                "actor_rollout_ref.actor.kl_loss_type=low_var_kl+",
            ],
            "warn",
            "k3 in the loss: token-local",
        ),
        (
            "verl",
            [
                "actor_rollout_ref.actor.use_kl_loss=True",
                "actor_rollout_ref.actor.kl_loss_type=kl",
            ],
            "fail",
            "k1 in the loss: zero",
        ),
        ("openrlhf", ["--algo.kl.init_coef", "0.01"], "ok", "k1 in the reward: exact"),
        (
            "openrlhf",
            ["--init_kl_coef", "1e-3", "--use_kl_loss", "--kl_estimator", "k2"],
            "warn",
            "k2 in the loss: token-local",
        ),
        ("openrlhf", ["--algo.kl.use_loss"], "fail", "k1 in the loss: zero"),
    ],
)
def test_the_gradient(
    framework: Framework, arguments: list[str], verdict: str, measured: str
) -> None:
    found = findings(framework, *arguments)["gradient"]
    assert found.verdict == verdict
    assert found.measured.startswith(measured)


def test_no_penalty_is_said_plainly() -> None:
    for framework, arguments in (
        ("trl", ["grpo"]),
        ("verl", ["trainer.nnodes=1"]),
        ("openrlhf", ["--init_kl_coef", "0"]),
    ):
        found = findings(framework, *arguments)
        assert set(found) == {"objective"}
        assert "no KL to the reference is charged" in found["objective"].measured


def test_verl_charged_twice() -> None:
    found = findings(
        "verl", "algorithm.use_kl_in_reward=True", "actor_rollout_ref.actor.use_kl_loss=True"
    )
    assert found["twice"].verdict == "fail"
    assert "0.001·Σ k1" in found["objective"].measured
    assert "0.001·k3 in the loss" in found["objective"].measured


def test_what_is_clamped_and_what_is_lost() -> None:
    adaptive = ["algorithm.use_kl_in_reward=True", "algorithm.kl_ctrl.type=adaptive"]
    found = findings("verl", *adaptive, "algorithm.kl_penalty=low_var_kl")
    assert "±10" in found["clamp"].cause
    assert "per token" in found["control"].measured
    assert "not in the checkpoint" in found["control"].cause
    assert "clamp" not in findings("verl", *adaptive)
    found = findings("openrlhf", "--algo.kl.target", "6", "--algo.kl.estimator", "k2")
    assert "4.47" in found["clamp"].cause
    assert "incompatible" in found["control"].measured
    assert "nothing to lose" in findings("trl", "rloo")["control"].measured


def test_settings_that_do_nothing_or_depend_on_the_version() -> None:
    assert "is off" in findings("verl", "algorithm.kl_ctrl.type=adaptive")["inert"].cause
    found = findings("trl", "--beta", "0.1", "--sync_ref_model", "true")
    assert "installed version" in found["default"].cause
    assert "anchors the leash anew" in found["reference"].cause


def test_files_of_each_kind(tmp_path: Path) -> None:
    tree = {"algorithm": {"use_kl_in_reward": True, "kl_ctrl": {"kl_coef": "1e-2"}}}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "a.json").write_text(json.dumps(tree))
    (tmp_path / "a.sh").write_text(
        "# a run\npython -m verl.trainer.main_ppo \\\n  algorithm.use_kl_in_reward=True \\\n"
        "  algorithm.kl_ctrl.kl_coef=1e-2\n"
    )
    for name in ("a.yaml", "a.json", "a.sh"):
        found = findings("verl", str(tmp_path / name))
        assert "0.01·Σ k1" in found["objective"].measured, name
    overridden = findings("verl", str(tmp_path / "a.yaml"), "algorithm.kl_ctrl.kl_coef=0.5")
    assert "0.5·Σ k1" in overridden["objective"].measured


@pytest.mark.parametrize(
    ("framework", "arguments", "sentence"),
    [
        ("verl", ["nowhere.yaml"], "expected a file of settings at nowhere.yaml"),
        ("verl", ["algorithm.use_kl_in_reward=maybe"], "expected true or false"),
        (
            "verl",
            ["algorithm.use_kl_in_reward=True", "algorithm.kl_penalty=full"],
            "raises NotImplementedError",
        ),
        (
            "verl",
            ["algorithm.use_kl_in_reward=True", "algorithm.kl_penalty=k9"],
            "one of verl's estimators",
        ),
        ("trl", ["--beta", "much"], "expected a number for beta, got 'much'"),
        ("trl", ["--kl_estimator", "k2"], "one of k1, k3, got 'k2'"),
        ("openrlhf", ["--kl_estimator", "k9"], "k1, k2 or k3, got 'k9'"),
    ],
)
def test_what_cannot_be_read(framework: Framework, arguments: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        read_framework(framework, arguments)


def test_a_file_must_hold_keys(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="expected keys and values"):
        read_settings([str(tmp_path / "list.yaml")])
    with pytest.raises(UsageError, match="expected a configuration file"):
        read_settings([])
