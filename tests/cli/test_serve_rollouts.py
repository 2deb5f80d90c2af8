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
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_run
import tiny_models
import torch
import yaml
from ranks import Ranks
from real_vllm import NEEDS_VLLM

from kleash.cli.serve_rollouts import server_command, server_environment
from kleash.config.rollout import VLLMConfig
from kleash.config.schema import Config
from kleash.errors import EngineLostError
from kleash.models.policy import load_policy
from kleash.rollout.engine import writing_request
from kleash.rollout.hand_over import hand_over, write_with
from kleash.rollout.prompts import Prompt, batch_prompts
from kleash.rollout.sampling import SamplingSpec
from kleash.rollout.vllm_server import connect
from kleash.storage.run_directory import read_run
from kleash.training.loop import train
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
    wanted = {"--no-enable-prefix-caching", "--no-enable-chunked-prefill", "--enforce-eager"}
    assert wanted <= set(line)
    assert server_environment(eager=True)["VLLM_SERVER_DEV_MODE"] == "1"


class Place:
    """A server of one configuration that is started, killed and started again."""

    def __init__(self, folder: Path) -> None:
        tiny_models.save_model(folder / "policy", **SIZES)
        for name in ("prompts", "heldout"):
            lines = [json.dumps({"prompt": text}) for text in small_run.two_words(range(4))]
            (folder / f"{name}.jsonl").write_text("\n".join(lines))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.folder, self.log, self.file = folder, folder / "server.log", folder / "run.yaml"
        tree = self.settings("out").model_dump(mode="json", exclude_none=True)
        self.file.write_text(yaml.safe_dump(tree))
        self._process: subprocess.Popen[bytes] | None = None

    def settings(self, name: str, **changes: Any) -> Config:
        """A run that this server writes for."""
        vllm = {"url": self.url, "enforce_eager": True, "kv_cache_gib": 0.2, "timeout_s": 15.0}
        rollout = {"engine": "vllm", "vllm": vllm, "prompts_per_step": 5}
        layer = {
            "rollout": rollout,
            "prompts": {"heldout": None},
            "algorithm": {"minibatches": 1},
            "logging": {"samples_per_step": 5},
            "steps": 5,
        }
        return small_run.settings(self.folder, self.folder / name, layer, **changes)

    def start(self) -> None:
        """Until it answers, in a process group of its own."""
        if self._process is not None:
            return
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                command(str(self.file), "--port", str(self.port)),
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        for _ in range(600):
            assert self._process.poll() is None, self.log.read_text()[-3000:]
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.3)

    def kill(self) -> None:
        """SIGKILL to the whole group."""
        if self._process is not None:
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    made = Place(tmp_path_factory.mktemp("served"))
    yield made
    made.kill()


@pytest.mark.parametrize("_", [pytest.param(None, marks=NEEDS_VLLM)])
def test_a_server_killed_in_mid_rollout_writes_it_again_when_it_is_back(
    place: Place, _: None
) -> None:
    policy = load_policy(place.folder / "policy")
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(1.2)  # other weights than the server starts with
    rows = [Prompt("", (4 + i % 15, 5), i) for i in range(64)]
    batch = batch_prompts(rows, pad_id=policy.pad_id)
    place.start()
    server = connect(policy, place.url, max_tokens=40, timeout_s=400.0)
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
    threading.Timer(1.0, place.kill).start()
    with pytest.raises(EngineLostError):
        server.write(long)
    found: list[Rollout] = []
    waiting = threading.Thread(target=lambda: found.append(write_with(server, policy, request)))
    waiting.start()
    place.kill()
    place.start()
    waiting.join()
    (again,) = found
    assert torch.equal(again.response_ids, whole.response_ids)
    assert torch.equal(again.response_mask, whole.response_mask)
    server.close()


@pytest.mark.parametrize("_", [pytest.param(None, marks=NEEDS_VLLM)])
def test_several_processes_train_with_one_server(place: Place, _: None) -> None:
    """The oracle is one process with it, and for a killed server the run that it was there for."""
    place.start()
    ranks = Ranks()
    try:
        alone = train(place.settings("alone"))
        for strategy in ("ddp", "fsdp"):
            divided = {"distributed": {"strategy": strategy}}
            many = ranks.train(place.settings(strategy, **divided))
            assert responses(many) == responses(alone)
            lines: list[dict[str, Any]] = [dict(line) for line in read_run(many).metrics]
            floor = max(line["rollout/kl_sampler_floor"] for line in lines)
            for line in lines:
                assert line["rollout/kl_sampler_per_token"] < 10 * floor < 1e-9
        broken = place.settings("broken", distributed={"strategy": "fsdp"})
        killing = threading.Thread(target=lambda: kill_after_a_step(place, place.folder / "broken"))
        killing.start()
        ended = ranks.run(broken)
        killing.join()
        assert [answer and answer["error"] for answer in ended] == ["EngineLostError"] * 2
        assert ended[0] == ended[1] and "kleash train --resume" in str(ended[0])
        place.start()
        assert responses(ranks.train(broken)) == responses(alone)
    finally:
        ranks.close()


def kill_after_a_step(place: Place, run: Path) -> None:
    file = run / "metrics.jsonl"
    while not (file.is_file() and file.read_text().count("\n")):
        time.sleep(0.01)
    place.kill()


def responses(path: Path) -> list[tuple[int, str]]:
    return sorted((sample.step, sample.response) for sample in read_run(path).samples)
