"""`kleash serve-rollouts`: refusals, flags, and on the real engine a server that is killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_run
import tiny_models
import torch
import yaml
from real_vllm import NEEDS_VLLM

from kleash.cli.serve_rollouts import server_command, server_environment
from kleash.config.rollout import VLLMConfig
from kleash.errors import EngineLostError
from kleash.models.policy import load_policy
from kleash.rollout.engine import writing_request
from kleash.rollout.hand_over import hand_over, write_with
from kleash.rollout.prompts import Prompt, batch_prompts
from kleash.rollout.sampling import SamplingSpec
from kleash.rollout.vllm_server import connect
from kleash.types import Rollout

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "kleash", "serve-rollouts", *arguments]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "needs the CONFIG of the run whose policy it serves"),
        (("run.yaml", "--port", "70000"), "expected a port from 1 to 65535, got 70000"),
    ],
)
def test_bad_usage_is_one_sentence(arguments: tuple[str, ...], message: str) -> None:
    ended = subprocess.run(command(*arguments), capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert message in ended.stderr and ended.stderr.count("\n") == 1


def test_the_servers_flags_leave_the_law_to_the_request() -> None:
    line = server_command(
        Path("folder"),
        VLLMConfig(url="http://x", kv_cache_gib=0.5, enforce_eager=True),
        name="policy",
        dtype="float32",
        address=("127.0.0.1", 8123),
        cpu=True,
    )
    given = dict(zip(line, [*line[1:], ""], strict=True))
    assert given["--logprobs-mode"] == "processed_logprobs"
    assert given["--generation-config"] == "vllm"
    assert given["--kv-cache-memory-bytes"] == str(2**29)
    assert (given["--host"], given["--port"]) == ("127.0.0.1", "8123")
    assert {"--no-enable-prefix-caching", "--enforce-eager"} <= set(line)
    assert server_environment(eager=True)["VLLM_SERVER_DEV_MODE"] == "1"


@contextmanager
def served(config: Path, port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server that answers, in a process group of its own."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command(str(config), "--port", str(port)),
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()[-3000:]
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.3)
        yield process
    finally:
        with_group(process, signal.SIGKILL)
        process.wait()


def with_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    if process.poll() is None:
        os.killpg(process.pid, number)


@pytest.mark.parametrize("_", [pytest.param(None, marks=NEEDS_VLLM)])
def test_a_server_killed_in_mid_rollout_writes_it_again_when_it_is_back(
    tmp_path: Path, _: None
) -> None:
    tiny_models.save_model(tmp_path / "policy", **SIZES)
    for name in ("prompts", "heldout"):
        lines = [json.dumps({"prompt": text}) for text in small_run.two_words(range(4))]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    url = f"http://127.0.0.1:{port}"
    vllm = {"url": url, "enforce_eager": True, "kv_cache_gib": 0.2}
    tree = small_run.settings(
        tmp_path, tmp_path / "out", {"rollout": {"engine": "vllm", "vllm": vllm}}
    ).model_dump(mode="json", exclude_none=True)
    file, log = tmp_path / "run.yaml", tmp_path / "server.log"
    file.write_text(yaml.safe_dump(tree))
    policy = load_policy(tmp_path / "policy")
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(1.2)  # other weights than the server starts with
    rows = [Prompt("", (4 + i % 15, 5), i) for i in range(64)]
    batch = batch_prompts(rows, pad_id=policy.pad_id)
    with served(file, port, log) as first:
        server = connect(policy, url, max_tokens=40, timeout_s=400.0)
        request = writing_request(server, batch, SamplingSpec(30), microbatch=64)
        hand_over(server, policy)
        whole = server.write(request)
        law = server.next_token_logprobs([[4, 5, 6]])[0]
        with torch.no_grad():
            logits = policy.model(input_ids=torch.tensor([[4, 5, 6]])).logits[0, :-1]
        expected = logits[:, : policy.words].double().log_softmax(-1)
        torch.testing.assert_close(law, expected, atol=1e-4, rtol=0)
        many = batch_prompts(rows * 30, pad_id=policy.pad_id)
        long = replace(writing_request(server, many, SamplingSpec(30), microbatch=64))
        threading.Timer(1.0, with_group, (first, signal.SIGKILL)).start()
        with pytest.raises(EngineLostError):
            server.write(long)
    found: list[Rollout] = []
    waiting = threading.Thread(target=lambda: found.append(write_with(server, policy, request)))
    waiting.start()
    with served(file, port, log):
        waiting.join()
    (again,) = found
    assert torch.equal(again.response_ids, whole.response_ids)
    assert torch.equal(again.response_mask, whole.response_mask)
    server.close()
