"""What the KL settings of other frameworks amount to: read from their files, running nothing.

Three frameworks, each with its own names for the same four questions: which estimator, where it
is charged, in which unit it is controlled, and what of it survives a restart. What is said here
is what their code of summer 2026 does (TRL 2026-07, verl and OpenRLHF 2026-08); defaults are
those of that code. Left out: every setting that does not concern the KL to the reference.
"""

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from kleash.errors import ConfigError, UsageError
from kleash.kl.placements import Placement, PlacementGradient, gradient_of
from kleash.preflight.findings import Finding, Report

Framework = Literal["trl", "verl", "openrlhf"]
Settings = Mapping[str, Any]
_ARGUMENTS = (".sh", ".txt", ".args")


@dataclass(frozen=True)
class Penalty:
    """One KL penalty of a foreign run, in our words."""

    estimator: str
    place: Literal["reward", "loss"]
    coefficient: float
    gradient: PlacementGradient
    reduction: str
    clamp: str
    """What is clamped; empty: nothing."""
    setting: str
    """The settings that asked for it."""


@dataclass(frozen=True)
class Control:
    """How the coefficient moves, if it does."""

    sentence: str
    resume: str
    adaptive: bool


def read_framework(framework: Framework, arguments: Sequence[str]) -> Report:
    """Say what a framework's own KL settings amount to.

    Args:
        framework: whose settings they are.
        arguments: a YAML or JSON file, or a file of arguments (.sh, .txt), and further arguments:
            `--key value`, `--key=value` or `key=value`; later ones win.

    Raises:
        ConfigError: a file cannot be read, or a setting has a value that framework refuses.
        UsageError: nothing was given.
    """
    began = time.perf_counter()
    settings = read_settings(arguments)
    match framework:
        case "trl":
            penalties, control, notes = _trl(settings)
        case "verl":
            penalties, control, notes = _verl(settings)
        case "openrlhf":
            penalties, control, notes = _openrlhf(settings)
    findings = [
        _objective(framework, penalties),
        *(_gradient(framework, penalty) for penalty in penalties),
        *([_twice(framework, penalties)] if len(penalties) > 1 else []),
        *(_clamped(framework, penalty) for penalty in penalties if penalty.clamp),
        *([_control(framework, control)] if penalties else []),
        *notes,
    ]
    return Report(tuple(findings), time.perf_counter() - began)


def read_settings(arguments: Sequence[str]) -> dict[str, Any]:
    """Dotted key → value from files and arguments, the later winning.

    Example:
        >>> read_settings(["algorithm.kl_ctrl.kl_coef=0.01", "--init-kl-coef", "0.1"])
        {'algorithm.kl_ctrl.kl_coef': 0.01, 'init_kl_coef': 0.1}
    """
    if not arguments:
        raise UsageError("expected a configuration file of that framework, or its arguments")
    found: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            if not equals:
                flag = not rest or rest[0].startswith("--")
                value = "true" if flag else rest.pop(0)
            found[key.replace("-", "_")] = _plain(value)
        elif Path(word).suffix in (".yaml", ".yml", ".json", *_ARGUMENTS):
            found |= _file(Path(word))
        elif "=" in word:
            key, _, value = word.partition("=")
            found[key.lstrip("+")] = _plain(value)
        else:
            found.setdefault("command", word)
    return found


def _trl(settings: Settings) -> tuple[list[Penalty], Control, list[Finding]]:
    keys = settings.keys()
    command = str(settings.get("command", ""))
    constant = Control("constant: TRL removed its controllers in December 2024", "", False)
    if command == "ppo" or keys & {"kl_coef", "kl_estimator"}:
        beta = _number(settings, "kl_coef", 0.05)
        estimator = _choice(settings, "kl_estimator", "k1", ("k1", "k3"))
        placement: Placement = "reward_k1" if estimator == "k1" else "reward_k3"
        return _one(estimator, "reward", beta, placement, "per token", "", "kl_coef"), constant, []
    if command == "rloo" or keys & {"rloo_k"}:
        beta = _number(settings, "beta", 0.05)
        return (
            _one("k1", "reward", beta, "reward_k1", "sum over the response", "", "beta"),
            (constant),
            [],
        )
    beta = _number(settings, "beta", 0.0)
    corrected = _true(settings, "use_bias_correction_kl", False)
    penalties = _one(
        "ρ·k3" if corrected else "k3",
        "loss",
        beta,
        "loss_k3_weighted" if corrected else "loss_k3",
        f"per token, normalised as loss_type ({settings.get('loss_type', 'its default')})",
        "",
        "beta",
    )
    notes: list[Finding] = []
    if "use_bias_correction_kl" not in keys and penalties:
        notes.append(
            _note(
                "trl.default",
                "use_bias_correction_kl is not set",
                "Its default was False in July 2026 and became True later: the gradient depends on "
                "the installed version.",
                "Set use_bias_correction_kl explicitly.",
            )
        )
    if _true(settings, "sync_ref_model", False):
        notes.append(
            _note(
                "trl.reference",
                "sync_ref_model: true",
                "The reference moves towards the policy and is not in the checkpoint: a restart "
                "anchors the leash anew, and the distance to the first model is no longer known.",
                "Leave sync_ref_model off, or keep the first model and measure against it.",
            )
        )
    return penalties, constant, notes


_VERL_ESTIMATORS = {
    "kl": "k1",
    "k1": "k1",
    "abs": "|k1|",
    "mse": "k2",
    "k2": "k2",
    "low_var_kl": "k3",
    "k3": "k3",
}
_DEAD: dict[str, str] = {
    "loss": "beyond, the gradient is 0 on exactly the most drifted tokens",
    "reward": "beyond, more drift costs no more, on exactly the most drifted tokens",
}


def _verl(settings: Settings) -> tuple[list[Penalty], Control, list[Finding]]:
    penalties: list[Penalty] = []
    if _true(settings, "algorithm.use_kl_in_reward", False):
        name = str(settings.get("algorithm.kl_penalty", "kl"))
        estimator = _verl_estimator(name)
        gradient = _in_reward(estimator)
        beta = _number(settings, "algorithm.kl_ctrl.kl_coef", 0.001)
        clamp = _verl_clamp(estimator, "reward")
        asked = f"algorithm.kl_penalty={name}"
        penalties.append(Penalty(estimator, "reward", beta, gradient, "per token", clamp, asked))
    if _true(settings, "actor_rollout_ref.actor.use_kl_loss", False):
        name = str(settings.get("actor_rollout_ref.actor.kl_loss_type", "low_var_kl"))
        estimator, straight = _verl_estimator(name.removesuffix("+")), name.endswith("+")
        gradient = (
            PlacementGradient(
                "token-local", "the value is replaced by k2's gradient (straight through)"
            )
            if straight
            else _in_loss(estimator)
        )
        beta = _number(settings, "actor_rollout_ref.actor.kl_loss_coef", 0.001)
        clamp = "" if straight else _verl_clamp(estimator, "loss")
        unit = str(settings.get("actor_rollout_ref.actor.loss_agg_mode", "token-mean"))
        asked = f"actor_rollout_ref.actor.kl_loss_type={name}"
        penalties.append(Penalty(estimator, "loss", beta, gradient, unit, clamp, asked))
    return penalties, _verl_control(settings), _verl_notes(settings)


def _verl_clamp(estimator: str, place: str) -> str:
    if estimator != "k3":
        return ""
    limits = "the log-ratio to ±20 and k3 to ±10"
    return f"{limits}; {_DEAD[place]}, and the KL reported is too small"


def _verl_control(settings: Settings) -> Control:
    if settings.get("algorithm.kl_ctrl.type", "fixed") != "adaptive":
        return Control("constant", "", False)
    target = _number(settings, "algorithm.kl_ctrl.target_kl", 0.1)
    return Control(
        f"Ziegler's, towards {target:g} nats per token (the mean over tokens of whatever "
        "kl_penalty is, clamps included): not nats per response, so longer responses may drift "
        "farther",
        "The controller's coefficient is not in the checkpoint: a restart begins again at kl_coef.",
        True,
    )


def _verl_notes(settings: Settings) -> list[Finding]:
    adaptive = settings.get("algorithm.kl_ctrl.type") == "adaptive"
    if adaptive and not _true(settings, "algorithm.use_kl_in_reward", False):
        return [
            _note(
                "verl.inert",
                "kl_ctrl.type=adaptive without use_kl_in_reward",
                "The controller moves the coefficient of the reward's penalty, which is off; the "
                "one of the loss stays constant.",
                "Set algorithm.use_kl_in_reward=True, or leave algorithm.kl_ctrl out.",
            )
        ]
    return []


def _openrlhf(settings: Settings) -> tuple[list[Penalty], Control, list[Finding]]:
    def first(new: str, old: str, default: Any) -> Any:
        return settings.get(new, settings.get(old, default))

    beta = float(first("algo.kl.init_coef", "init_kl_coef", 0.01))
    estimator = str(first("algo.kl.estimator", "kl_estimator", "k1"))
    if estimator not in ("k1", "k2", "k3"):
        raise ConfigError(f"expected kl_estimator k1, k2 or k3, got {estimator!r}")
    in_loss = bool(first("algo.kl.use_loss", "use_kl_loss", False))
    penalties: list[Penalty] = []
    if beta > 0:
        gradient = _in_loss(estimator) if in_loss else _in_reward(estimator)
        place: Literal["reward", "loss"] = "loss" if in_loss else "reward"
        limit = " (a log-ratio of 4.47)" if estimator == "k2" else ""
        clamp = f"{estimator} to ±10{limit}; {_DEAD[place]}, and the KL reported is too small"
        asked = f"kl_estimator={estimator}{', use_loss' if in_loss else ''}"
        penalties.append(Penalty(estimator, place, beta, gradient, "per token", clamp, asked))
    target = first("algo.kl.target", "kl_target", None)
    control = Control("constant", "", False)
    if target is not None:
        control = Control(
            f"Ziegler's, towards {float(target):g} nats per token (a mean over tokens, clamped): "
            "not nats per response; OpenRLHF's own source calls it incompatible with this trainer",
            "The controller's coefficient is not in the checkpoint: a restart begins again at "
            "init_coef.",
            True,
        )
    return penalties, control, []


def _objective(framework: Framework, penalties: list[Penalty]) -> Finding:
    if not penalties:
        return Finding(
            f"{framework}.objective",
            "ok",
            "maximise E[score]; no KL to the reference is charged, and none is measured",
            "what you meant to optimise",
        )
    reward = [f" − {p.coefficient:g}·Σ {p.estimator}" for p in penalties if p.place == "reward"]
    losses = [p for p in penalties if p.place == "loss"]
    loss = [f" minus {p.coefficient:g}·{p.estimator} in the loss" for p in losses]
    units = "; ".join(f"{p.place}: {p.reduction}" for p in penalties)
    return Finding(
        f"{framework}.objective",
        "ok",
        f"maximise E[score{''.join(reward)}]{','.join(loss)} ({units})",
        "what you meant to optimise",
    )


def _gradient(framework: Framework, penalty: Penalty) -> Finding:
    name, expected = f"{framework}.gradient", "the gradient of the KL of whole responses"
    kind, why = penalty.gradient.kind, penalty.gradient.why
    measured = f"{penalty.estimator} in the {penalty.place}: {kind}"
    if penalty.gradient.sound:
        return Finding(name, "ok", f"{measured} ({why})", expected)
    remedies = {
        "trl": "Use RLOO or PPO with k1 in the reward; in GRPO at least use_bias_correction_kl.",
        "verl": "Set algorithm.use_kl_in_reward=True with algorithm.kl_penalty=kl, and "
        "use_kl_loss=False; in the loss at least kl_loss_type=k2 (or low_var_kl+).",
        "openrlhf": "Leave use_loss out and set the estimator to k1; in the loss at least k2.",
    }
    return Finding(
        name,
        "fail" if kind == "zero" else "warn",
        measured,
        expected,
        f"{penalty.setting}: a {kind} gradient: {why}.",
        remedies[framework],
    )


def _twice(framework: Framework, penalties: list[Penalty]) -> Finding:
    asked = " and ".join(penalty.setting for penalty in penalties)
    return Finding(
        f"{framework}.twice",
        "fail",
        asked,
        "one penalty",
        "The KL is charged twice, in the reward and in the loss, with two coefficients.",
        "Keep the one in the reward: set actor_rollout_ref.actor.use_kl_loss=False.",
    )


def _clamped(framework: Framework, penalty: Penalty) -> Finding:
    return Finding(
        f"{framework}.clamp",
        "warn",
        f"{penalty.estimator} in the {penalty.place}",
        "no clamp",
        f"Clamped: {penalty.clamp}.",
        "Nothing switches it off; watch the largest log-ratio beside the KL, and stop before it "
        "gets there.",
    )


def _control(framework: Framework, control: Control) -> Finding:
    name, expected = f"{framework}.control", "a target in nats per response, kept over a restart"
    if not control.adaptive:
        return Finding(name, "ok", f"coefficient {control.sentence}: nothing to lose", expected)
    return Finding(
        name,
        "warn",
        f"adaptive: {control.sentence}",
        expected,
        control.resume,
        "Write the coefficient down at every checkpoint and start the next run with it.",
    )


def _note(name: str, measured: str, cause: str, remedy: str) -> Finding:
    return Finding(name, "warn", measured, "–", cause, remedy)


def _one(
    estimator: str,
    place: Literal["reward", "loss"],
    beta: float,
    placement: Placement,
    reduction: str,
    clamp: str,
    key: str,
) -> list[Penalty]:
    if beta == 0:
        return []
    asked = f"{key}={beta:g} ({estimator} in the {place})"
    return [Penalty(estimator, place, beta, gradient_of(placement), reduction, clamp, asked)]


def _in_reward(estimator: str) -> PlacementGradient:
    if estimator == "|k1|":
        return PlacementGradient(
            "biased", "|k1| in the reward also charges tokens that came nearer"
        )
    placements: dict[str, Placement] = {"k1": "reward_k1", "k2": "reward_k2", "k3": "reward_k3"}
    return gradient_of(placements[estimator])


def _in_loss(estimator: str) -> PlacementGradient:
    if estimator == "|k1|":
        return PlacementGradient(
            "biased", "differentiating |k1| follows the sign of the drift alone"
        )
    placements: dict[str, Placement] = {"k1": "loss_k1", "k2": "loss_k2", "k3": "loss_k3"}
    return gradient_of(placements[estimator])


def _verl_estimator(name: str) -> str:
    if name == "full":
        raise ConfigError(
            "expected a kl_penalty that verl computes, got 'full': it is documented and raises "
            "NotImplementedError; take kl, k2 or low_var_kl"
        )
    if name not in _VERL_ESTIMATORS:
        raise ConfigError(
            f"expected one of verl's estimators ({', '.join(_VERL_ESTIMATORS)}), got {name!r}"
        )
    return _VERL_ESTIMATORS[name]


def _file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix in _ARGUMENTS:
            return read_settings(shlex.split(text.replace("\\\n", " "), comments=True) or ["true"])
        tree = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = str(error).replace("\n", " ")
        raise ConfigError(f"expected a file of settings at {path}, got: {reason}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"expected keys and values in {path}, got {type(tree).__name__}")
    return _flat(cast("dict[str, Any]", tree))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= _flat(cast("dict[str, Any]", value), f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = _plain(value) if isinstance(value, str) else value
    return found


def _plain(text: str) -> Any:
    """A value as YAML reads it, with 1e-3 as the number that people mean."""
    try:
        return (
            float(text)
            if "e" in text.lower() and text[:1] in "0123456789.-"
            else (yaml.safe_load(text))
        )
    except (ValueError, yaml.YAMLError):
        return text


def _number(settings: Settings, key: str, default: float) -> float:
    value = settings.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"expected a number for {key}, got {value!r}")
    return float(value)


def _true(settings: Settings, key: str, default: bool) -> bool:
    value = settings.get(key, default)
    if not isinstance(value, bool):
        raise ConfigError(f"expected true or false for {key}, got {value!r}")
    return value


def _choice(settings: Settings, key: str, default: str, allowed: tuple[str, ...]) -> str:
    value = str(settings.get(key, default))
    if value not in allowed:
        raise ConfigError(f"expected {key} to be one of {', '.join(allowed)}, got {value!r}")
    return value
