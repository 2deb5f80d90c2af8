"""`rollout.correction` and its clip: defaults, what goes together, and what reaches the update."""

from typing import Any

import pytest
import yaml
from config_trees import minimal

from kleash.algorithms.dispatch import Settings
from kleash.config.loading import dump_config, parse_config
from kleash.config.schema import Config
from kleash.errors import ConfigError
from kleash.training import assembly


def read(**rollout: Any) -> Config:
    return parse_config(minimal(rollout=rollout), where="here")


def settings_of(config: Config) -> Settings:
    return assembly.settings_of(config.algorithm, config.leash, config.rollout)


def test_nothing_is_corrected_unless_asked_for() -> None:
    config = read()
    assert config.rollout.correction == "none"
    assert "correction_clip" not in dump_config(config)
    settings = settings_of(config)
    assert (settings.correction, settings.correction_clip) == ("none", None)


@pytest.mark.parametrize("correction", ["token_truncated", "sequence_truncated", "masked"])
@pytest.mark.parametrize("clip", [None, 3.5])
def test_the_correction_reaches_the_update(correction: str, clip: float | None) -> None:
    given = {} if clip is None else {"correction_clip": clip}
    config = read(correction=correction, **given)
    settings = settings_of(config)
    assert (settings.correction, settings.correction_clip) == (correction, clip or 2.0)
    assert f"correction_clip: {clip or 2.0}" in dump_config(config)


def test_no_clip_is_written_none() -> None:
    config = read(correction="sequence_truncated", correction_clip="none")
    assert settings_of(config).correction_clip is None
    again = parse_config(yaml.safe_load(dump_config(config)), where="again")
    assert again.rollout.correction_clip is None


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"correction_clip": 3.0}, "`correction_clip` does nothing with `correction: none`"),
        ({"correction": "masked", "correction_clip": "none"}, "needs one, got None"),
        ({"correction": "masked", "correction_clip": 1.0}, "above 1 and finite, got 1.0"),
        ({"correction": "token_truncated", "correction_clip": float("inf")}, "got inf"),
        ({"correction": "token"}, "correction"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read(**given)
