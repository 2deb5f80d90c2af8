"""`kleash serve-rollouts`: vLLM as a server, started the way that a run needs it.

The policy is opened as training opens it (an adapter merged, the reference's tokens, its words
alone) and written to a folder for as long as the server runs.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from kleash.config.rollout import VLLMConfig
from kleash.config.schema import PolicyConfig, ReferenceConfig
from kleash.mesh import Mesh
from kleash.rollout.vllm_engine import import_vllm, write_model
from kleash.training.model_assembly import choose_device, load_models

_GIB = 2**30


def serve(
    policy: PolicyConfig,
    reference: ReferenceConfig,
    vllm: VLLMConfig,
    *,
    device: str,
    host: str,
    port: int,
) -> int:
    """Serve until the server is stopped.

    Args:
        policy: the section of the run.
        reference: the section of the run, which decides the vocabulary that both have.
        vllm: how much of the machine the server may take, and how it starts.
        device: where the policy is opened to be written down; the server chooses its own.
        host: address to listen on. Whoever reaches it can change the weights.
        port: port to listen on.

    Returns:
        The server's exit status.

    Raises:
        EngineError: vLLM is not installed or too old.
        ModelError: the policy cannot be used.
    """
    import_vllm()
    with tempfile.TemporaryDirectory(prefix="kleash-served-") as folder:
        opened, _, _ = load_models(policy, reference, torch.device(device), mesh=Mesh())
        write_model(opened, Path(folder))
        dtype = str(next(opened.model.parameters()).dtype).removeprefix("torch.")
        cpu = choose_device("auto").type == "cpu"
        command = server_command(
            Path(folder), vllm, name=policy.path, dtype=dtype, address=(host, port), cpu=cpu
        )
        del opened
        process = subprocess.Popen(command, env=server_environment(eager=vllm.enforce_eager))
        try:
            return process.wait()
        finally:
            process.terminate()
            process.wait()


def server_command(
    model: Path, vllm: VLLMConfig, *, name: str, dtype: str, address: tuple[str, int], cpu: bool
) -> list[str]:
    """The command line of a server that fits: log-probabilities after the temperature, all of them
    where asked for, no sampling defaults of the model's own, no cache of older weights."""
    gib = 1.0 if vllm.kv_cache_gib is None and cpu else vllm.kv_cache_gib
    host, port = address
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    flags = {
        "--model": str(model),
        "--served-model-name": name,
        "--host": host,
        "--port": str(port),
        "--dtype": dtype,
        "--logprobs-mode": "processed_logprobs",
        "--max-logprobs": "-1",
        "--generation-config": "vllm",
        "--seed": "0",
        "--gpu-memory-utilization": str(vllm.gpu_memory_utilization),
    }
    if gib is not None:
        flags["--kv-cache-memory-bytes"] = str(int(gib * _GIB))
    command += [part for pair in flags.items() for part in pair]
    command += ["--no-enable-prefix-caching", "--no-enable-chunked-prefill"]
    return command + (["--enforce-eager"] if vllm.enforce_eager else [])


def server_environment(*, eager: bool) -> dict[str, str]:
    """The environment of a server: the calls that change weights are among those for developers."""
    environment = dict(os.environ)
    # This process reads a setting of its own that a server must not inherit.
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    environment["VLLM_SERVER_DEV_MODE"] = "1"
    if eager:
        environment["TORCHDYNAMO_DISABLE"] = "1"
    return environment
