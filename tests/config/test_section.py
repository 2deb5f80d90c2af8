"""A key that does nothing is refused, and is not written; what is written can be read back."""

from typing import Any

import pytest
import yaml
from config_trees import minimal

from kleash.config.keys import inner_sections
from kleash.config.loading import dump_config, parse_config
from kleash.config.schema import Config, RewardConfig
from kleash.config.section import Section, allows_none
from kleash.errors import ConfigError

CONFIGS: list[dict[str, Any]] = [
    {},
    {"leash": {"target_kl": 3}},
    {"leash": {"target_kl": 3, "controller": "ziegler_code"}},
    {"leash": {"schedule": [[0, 1], [5, 2]]}},
    {"leash": {"beta": 0, "placement": "measure"}},
    {"leash": {"groups": {"a": 2}}},
    {"algorithm": {"value_clip_range": None}},
    {"algorithm": {"name": "grpo"}, "rollout": {"responses_per_prompt": 2}},
    {"tripwires": {"then": "rollback"}, "logging": {"checkpoint_every": 1}},
    {"tripwires": {"undo": "memory"}},
    {"policy": {"path": "p", "lora": {"targets": ["q_proj"]}}},
    {"reference": {"path": "r", "revision": "main"}},
    {"reference": {"kind": "cached", "cache": "c"}},
    {"reward_models": {"r": {"path": "m", "template": "{prompt} {response}"}}},
    {"rollout": {"truncated": "penalise", "missing_eos_penalty": 1}},
    {"prompts": {"train": "t", "heldout": "h"}, "heldout": {"gold": {"callable": "m:f"}}},
]


@pytest.mark.parametrize("changes", CONFIGS, ids=str)
def test_what_is_written_is_in_force_and_reads_back_as_the_same(changes: dict[str, Any]) -> None:
    config = parse_config(minimal(**changes), where="here")
    text = dump_config(config)
    again = parse_config(yaml.safe_load(text), where="there")
    assert again == config
    assert dump_config(again) == text


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tripwires": {"beta_factor": 2.0}}, "`beta_factor` is for `then: rollback` alone"),
        ({"tripwires": {"undo": "memory", "undo_copy_mib": 512}}, "`undo_copy_mib` is for `undo:"),
        ({"leash": {"beta": 1, "controller": "budget"}}, "`controller` does nothing with a fixed"),
        ({"leash": {"target_kl": 1, "horizon": 10_000}}, "`horizon` is for `controller: ziegler_c"),
        ({"reference": {"revision": "x"}}, "`revision` goes with `path`"),
        ({"reference": {"cache": "x"}}, "`cache` goes with `kind: cached`"),
        ({"reward_models": {"r": {"callable": "m:f", "template": "x"}}}, "does nothing for a call"),
        ({"heldout": {"every": 0}}, "`heldout` does nothing without `prompts.heldout`"),
        (
            {"prompts": {"train": "t", "heldout": "h"}, "heldout": {"gold": {"weight": 1.0}}},
            "unknown key `heldout.gold.weight`",
        ),
    ],
)
def test_a_key_that_does_nothing_is_refused_even_at_its_default(
    changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse_config(minimal(**changes), where="here")


def every_section(section: type[Section] = Config) -> set[type[Section]]:
    found = {section}
    for field in section.model_fields.values():
        for inner in inner_sections(field):
            found |= every_section(inner)
    return found


def test_a_key_without_a_default_value_says_what_its_absence_means() -> None:
    """`None` stands only where there is no value in force, never for one decided elsewhere."""
    silent = {
        f"{section.__name__}.{name}"
        for section in every_section() | {RewardConfig}
        for name, field in section.model_fields.items()
        if field.default is None and not inner_sections(field)
        if "none:" not in (field.description or "")
    }
    assert silent == {
        # One of them must be given.
        "LeashConfig.beta",
        "LeashConfig.groups",
        "LeashConfig.schedule",
        "LeashConfig.target_kl",
        "LeashConfig.target_kl_per_token",
        "RewardConfig.callable",
        "RewardConfig.path",
        "ScorerConfig.callable",
        "ScorerConfig.path",
        # They go with another key alone.
        "PolicyConfig.adapter",
        "PromptsConfig.heldout",
        "ReferenceConfig.adapter",
        "ReferenceConfig.cache",
        "RolloutConfig.missing_eos_penalty",
        "ValueConfig.path",
        "Config.world",
    }


def test_a_default_of_none_may_be_none() -> None:
    for section in every_section() | {RewardConfig}:
        for name, field in section.model_fields.items():
            if field.default is None:
                assert allows_none(field), f"{section.__name__}.{name}"
