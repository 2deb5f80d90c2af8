"""The engine that a configuration asks for, started or reached, and given the policy's weights."""

from collections.abc import Sequence

from kleash.config.rollout import RolloutConfig
from kleash.mesh import ALONE, Mesh
from kleash.models.policy import Policy
from kleash.rollout.engine import SeparateEngine
from kleash.rollout.hand_over import PROBE_TOKENS, hand_over
from kleash.rollout.prompts import Prompt
from kleash.rollout.vllm_engine import VLLMSettings, require_temperature, start_vllm
from kleash.rollout.vllm_server import connect
from kleash.training.shared_engine import SharedEngine


def open_engine(
    rollout: RolloutConfig, policy: Policy, prompts: Sequence[Prompt], *, mesh: Mesh = ALONE
) -> SeparateEngine | None:
    """What writes with weights of its own; None: the policy writes by itself.

    Of several processes the first one alone reaches it.

    Raises:
        EngineError: it cannot be started or reached, or does not fit the run.
    """
    if rollout.engine == "hf":
        return None
    require_temperature(rollout.temperature)
    longest = max(len(prompt.ids) for prompt in prompts) + rollout.max_new_tokens
    section, needed = rollout.vllm, max(longest, PROBE_TOKENS)
    engine: SeparateEngine
    if (url := section.url) is not None:

        def reach() -> SeparateEngine:
            return connect(policy, url, max_tokens=needed, timeout_s=section.timeout_s)

        reached = mesh.agree(lambda: reach() if mesh.is_first else None)
        engine = SharedEngine(reached, mesh) if reached is None or mesh.size > 1 else reached
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
        hand_over(engine, policy, mesh=mesh)
    except BaseException:
        engine.close()
        raise
    return engine
