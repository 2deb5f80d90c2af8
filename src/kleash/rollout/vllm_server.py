"""vLLM as a server of its own, through its OpenAI-compatible endpoint.

`kleash serve-rollouts` starts one that fits. One request for each response, because a request has
one seed; prompts are token ids. Weights go through a folder that both sides see, so trainer and
server share a machine or a file system. A server can be restarted or used by another run at any
time, so it answers a few fixed texts before and after every rollout, and must say the same.

Left out: transfers from GPU to GPU, which need one program on both sides.
"""

import http.client
import json
import math
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from kleash.errors import EngineError, EngineLostError
from kleash.models.policy import Policy
from kleash.models.probing import probe_texts
from kleash.rollout.engine import NamedTensors, WritingRequest
from kleash.rollout.engine_output import EngineResponse, rollout_of
from kleash.rollout.hand_over import write_weights
from kleash.rollout.vllm_engine import require_temperature, require_version
from kleash.types import Rollout

_AT_ONCE = 256
"""Requests under way at once; the server arranges them in batches."""
_PAUSE = 0.5
"""Seconds between two attempts to reach a server that is being restarted."""
_SAME = 1e-6
"""Answers of the same weights to the same texts are equal but for the batch they were in."""
_NEUTRAL = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""Said in every request, for the server's own defaults come from a file of the model."""
_FITS = "start the server with: kleash serve-rollouts CONFIG"


@dataclass(frozen=True)
class _Law:
    """The vocabulary as the server sees it."""

    words: int
    stop_ids: tuple[int, ...]
    pad_id: int


class VLLMServer:
    """See `engine.SeparateEngine`; made by `connect`."""

    def __init__(self, url: str, policy: Policy, *, timeout_s: float) -> None:
        self.loaded: int | None = None
        self._url, self._timeout = url.rstrip("/"), timeout_s
        self._law = _Law(policy.words, policy.stop_ids, policy.pad_id)
        self._folder = tempfile.TemporaryDirectory(prefix="kleash-weights-")
        self._name = ""

    @property
    def seeded(self) -> bool:
        """Each response has a seed of its own."""
        return True

    @property
    def concurrent(self) -> bool:
        """It is a process of its own."""
        return True

    def require_fit(self, *, max_tokens: int) -> None:
        """Check version, length, vocabulary and sampler of what is served.

        Raises:
            EngineError: naming what does not fit.
        """
        try:
            version = str(self._answer("/version")["version"])
            served = self._answer("/v1/models")["data"][0]
            self._name, length = str(served["id"]), int(served["max_model_len"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise self._nonsense("", error) from error
        require_version(version)
        if length < max_tokens:
            raise EngineError(
                f"expected the server at {self._url} to read {max_tokens} tokens, got "
                f"max_model_len {length}: {_FITS}"
            )
        text = [0, 1 % self._law.words]
        law = self._completion({"prompt": text, "max_tokens": 1, "prompt_logprobs": -1})
        logprobs = _by_token(law["prompt_logprobs"][1])
        if len(logprobs) != self._law.words:
            raise EngineError(
                f"expected the server at {self._url} to serve a model of the policy's "
                f"{self._law.words} words, got {self._name!r} with {len(logprobs)}: {_FITS}"
            )
        self._require_processed(text[0], logprobs)

    def _require_processed(self, token: int, logprobs: Mapping[int, float]) -> None:
        """What it says of a word it drew at a temperature is the law of that temperature."""
        mass = math.log(sum(math.exp(logprob / 2) for logprob in logprobs.values()))
        drawn = self._written({"prompt": [token], "max_tokens": 1, "temperature": 2.0, "seed": 0})
        expected = logprobs[drawn.ids[0]] / 2 - mass
        if abs(drawn.logprobs[0] - expected) > 1e-3 * max(1.0, abs(expected)):
            raise EngineError(
                f"expected the server at {self._url} to give log-probabilities after the "
                f"temperature, {expected:.6g} for a word drawn at 2, got {drawn.logprobs[0]:.6g}: "
                f"it was not started with --logprobs-mode processed_logprobs; {_FITS}"
            )

    def write(self, request: WritingRequest) -> Rollout:
        """See `RolloutEngine`.

        Raises:
            EngineLostError: the connection broke; nothing of the rollout is kept.
        """
        prompts, sampling = request.prompts, request.sampling
        require_temperature(sampling.temperature)
        before = self._fixed_answers()
        asked = [
            {
                "prompt": ids[mask].tolist(),
                "seed": seed,
                "temperature": sampling.temperature,
                "max_tokens": sampling.max_new_tokens,
                "stop_token_ids": list(self._law.stop_ids),
            }
            for ids, mask, seed in zip(prompts.ids, prompts.mask, request.seeds, strict=True)
        ]
        with ThreadPoolExecutor(min(_AT_ONCE, len(asked))) as pool:
            written = list(pool.map(self._written, asked))
        if not torch.allclose(before, self._fixed_answers(), rtol=_SAME, atol=_SAME):
            self.loaded = None
            raise EngineLostError(
                f"expected the server at {self._url} to keep its weights while it writes, got "
                "others after the rollout than before: it was restarted, or another run uses it; "
                "nothing of the rollout is used"
            )
        return rollout_of(
            written,
            request,
            words=self._law.words,
            stop_ids=self._law.stop_ids,
            pad_id=self._law.pad_id,
        )

    def load_weights(self, weights: NamedTensors) -> None:
        """See `SeparateEngine`."""
        folder = Path(self._folder.name)
        write_weights(weights, folder)
        kwargs = {"weights_path": str(folder)}
        self._answer("/collective_rpc", {"method": "reload_weights", "kwargs": kwargs})
        # Keys and values of older weights, where it was started with a cache of them.
        self._answer("/reset_prefix_cache", {})

    def text_logprobs(self, texts: Sequence[Sequence[int]]) -> list[Float[Tensor, " token"]]:
        """See `SeparateEngine`."""
        found: list[Tensor] = []
        for text in texts:
            rows = self._read(text, 0)
            said = [row[token] for row, token in zip(rows, text[1:], strict=True)]
            found.append(torch.tensor(said, dtype=torch.float64))
        return found

    def next_token_logprobs(
        self, texts: Sequence[Sequence[int]], *, temperature: float = 1.0
    ) -> list[Float[Tensor, "token vocab"]]:
        """See `SeparateEngine`."""
        laws: list[Tensor] = []
        for text in texts:
            rows = [[row[word] for word in range(self._law.words)] for row in self._read(text, -1)]
            law = torch.tensor(rows, dtype=torch.float64)
            laws.append((law / temperature).log_softmax(-1))
        return laws

    def wait_until_back(self) -> None:
        """Wait for a server that is being restarted, up to the time an answer may take.

        Raises:
            EngineError: it did not come back.
        """
        until = monotonic() + self._timeout
        while True:
            try:
                self._answer("/health")
                return
            except EngineLostError:
                if monotonic() > until:
                    raise
                sleep(_PAUSE)

    def close(self) -> None:
        """See `RolloutEngine`; the server itself goes on."""
        self._folder.cleanup()

    def _fixed_answers(self) -> Tensor:
        return torch.stack(self.text_logprobs(probe_texts(self._law.words).tolist()))

    def _read(self, text: Sequence[int], also: int) -> list[dict[int, float]]:
        """log-probabilities at each token but the first: of that token, and of some or all."""
        asked = {"prompt": list(text), "max_tokens": 1, "prompt_logprobs": also}
        return [_by_token(row) for row in self._completion(asked)["prompt_logprobs"][1:]]

    def _written(self, asked: Mapping[str, Any]) -> EngineResponse:
        choice = self._completion({**asked, "logprobs": 0})
        return EngineResponse(choice["token_ids"], choice["logprobs"]["token_logprobs"])

    def _completion(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        always = {"model": self._name, "ignore_eos": True, "return_token_ids": True, **_NEUTRAL}
        try:
            return self._answer("/v1/completions", {**always, **asked})["choices"][0]
        except (KeyError, IndexError, TypeError) as error:
            raise self._nonsense("/v1/completions", error) from error

    def _answer(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """What the server answers to a GET, or with a body to a POST.

        Raises:
            EngineLostError: it cannot be reached, or the connection broke.
            EngineError: it is too slow, refuses, or answers with something else.
        """
        data = None if body is None else json.dumps(body).encode()
        header = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._url + path, data=data, headers=header)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                text = cast(bytes, answer.read())
            return json.loads(text) if text else {}
        except urllib.error.HTTPError as error:
            with error:
                said = " ".join(error.read(400).decode("utf-8", "replace").split())
            raise EngineError(
                f"expected an answer of the server at {self._url}{path}, got status {error.code}: "
                f"{said}; {_FITS}"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(error, TimeoutError) or isinstance(reason, TimeoutError):
                raise EngineError(
                    f"expected an answer of the server at {self._url}{path} within "
                    f"{self._timeout:g} s, got none: raise rollout.vllm.timeout_s, or look at "
                    "what else the server does"
                ) from error
            raise EngineLostError(
                f"expected a server at {self._url}, got {type(reason).__name__} ({reason}): "
                f"{_FITS}, then resume the run"
            ) from error
        except ValueError as error:
            raise self._nonsense(path, error) from error

    def _nonsense(self, path: str, error: Exception) -> EngineError:
        return EngineError(
            f"expected the server at {self._url}{path} to answer as vLLM does, got something else "
            f"({type(error).__name__}: {error}): check rollout.vllm.url, and {_FITS}"
        )


def connect(policy: Policy, url: str, *, max_tokens: int, timeout_s: float) -> VLLMServer:
    """Reach a running server, and check that it fits the policy.

    Args:
        policy: whose responses it will write; its weights are not handed over yet.
        url: such as http://127.0.0.1:8000.
        max_tokens: longest prompt + response.
        timeout_s: how long one answer may take.

    Raises:
        EngineError: there is none, or it serves another model, version or sampler.
    """
    server = VLLMServer(url, policy, timeout_s=timeout_s)
    try:
        server.require_fit(max_tokens=max_tokens)
    except BaseException:
        server.close()
        raise
    return server


def _by_token(row: Mapping[str, Mapping[str, float]]) -> dict[int, float]:
    return {int(token): float(said["logprob"]) for token, said in row.items()}
