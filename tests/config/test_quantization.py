"""`policy.quantization`, `reference.quantization`: what `auto` stands for, what is refused."""

from typing import Any

import pytest
import yaml
from config_trees import minimal

from kleash.config.loading import dump_config, parse_config
from kleash.config.schema import Config
from kleash.errors import ConfigError

LORA: dict[str, Any] = {"path": "p", "lora": {"rank": 2}}
QLORA: dict[str, Any] = {**LORA, "quantization": "nf4"}


def read(**changes: Any) -> Config:
    return parse_config(minimal(**changes), where="here")


@pytest.mark.parametrize(
    ("changes", "kind", "quantization", "differs"),
    [
        ({}, "copy", "none", False),
        ({"policy": LORA}, "adapter_off", "none", False),
        ({"policy": QLORA}, "adapter_off", "nf4", False),
        ({"policy": QLORA, "reference": {"kind": "copy"}}, "copy", "nf4", False),
        ({"policy": QLORA, "reference": {"kind": "cpu_offload"}}, "cpu_offload", "none", True),
        ({"policy": QLORA, "reference": {"path": "r"}}, "copy", "none", False),
        ({"policy": QLORA, "reference": {"quantization": "none"}}, "copy", "none", True),
        ({"reference": {"quantization": "nf4"}}, "copy", "nf4", True),
        ({"policy": LORA, "reference": {"quantization": "nf4"}}, "copy", "nf4", True),
        ({"reference": {"quantization": "nf4", "path": "r"}}, "copy", "nf4", False),
    ],
)
def test_the_reference_is_quantised_as_the_policy_unless_it_is_said(
    changes: dict[str, Any], kind: str, quantization: str, differs: bool
) -> None:
    config = read(**changes)
    reference = config.reference
    assert (reference.kind, reference.quantization) == (kind, quantization)
    assert reference.reference_differs == differs
    again = parse_config(yaml.safe_load(dump_config(config)), where="there")
    assert again == config


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"policy": {"path": "p", "quantization": "nf4"}}, "give `policy.lora`"),
        ({"policy": {**QLORA, "adapter": "a"}}, "merge_and_unload"),
        ({"policy": {**QLORA, "quantization": "int8"}}, "policy.quantization"),
        (
            {"policy": QLORA, "reference": {"kind": "adapter_off", "quantization": "none"}},
            "or take `reference.kind: copy`",
        ),
        ({"reference": {"kind": "cpu_offload", "quantization": "nf4"}}, "take `kind: copy`"),
        ({"policy": QLORA, "distributed": {"strategy": "fsdp"}}, "`distributed.strategy: ddp`"),
        (
            {"reference": {"quantization": "nf4"}, "distributed": {"strategy": "fsdp"}},
            "`reference.quantization: nf4` keeps weights that FSDP does not divide",
        ),
        ({"policy": QLORA, "rollout": {"engine": "vllm"}}, "take `rollout.engine: hf`"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read(**changes)
