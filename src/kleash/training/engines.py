"""The engine that a configuration asks for, started or reached, and given the policy's weights."""

from collections.abc import Sequence

from kleash.config.rollout import RolloutConfig
from kleash.errors import ConfigError
from kleash.mesh import is_distributed
from kleash.models.policy import Policy
from kleash.rollout.engine import SeparateEngine
from kleash.rollout.hand_over import PROBE_TOKENS, hand_over
from kleash.rollout.prompts import Prompt
from kleash.rollout.vllm_engine import VLLMSettings, require_temperature, start_vllm
from kleash.rollout.vllm_server import connect


def open_engine(
    rollout: RolloutConfig, policy: Policy, prompts: Sequence[Prompt]
) -> SeparateEngine | None:
    """What writes with weights of its own; None: the policy writes by itself.

    Raises:
        ConfigError: there are several processes.
        EngineError: it cannot be started or reached, or does not fit the run.
    """
    if rollout.engine == "hf":
        return None
    if is_distributed():
        raise ConfigError(
            "expected rollout.engine: hf with several processes, got vllm: a server of its own "
            "(rollout.vllm.url) leaves the GPUs of one machine to one process each"
        )
    require_temperature(rollout.temperature)
    longest = max(len(prompt.ids) for prompt in prompts) + rollout.max_new_tokens
    section, needed = rollout.vllm, max(longest, PROBE_TOKENS)
    engine: SeparateEngine
    if section.url is not None:
        engine = connect(policy, section.url, max_tokens=needed, timeout_s=section.timeout_s)
    else:
        settings = VLLMSettings(
            max_tokens=needed,
            gpu_memory_utilization=section.gpu_memory_utilization,
            kv_cache_gib=section.kv_cache_gib,
            enforce_eager=section.enforce_eager,
        )
        engine = start_vllm(policy, settings)
    try:
        # What it cannot do with this model shows here, before a run directory exists.
        hand_over(engine, policy)
    except BaseException:
        engine.close()
        raise
    return engine
