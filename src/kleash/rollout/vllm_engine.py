"""vLLM in this process, beside the trainer on the same device.

It is started from the policy's configuration alone, with weights that mean nothing, and gets the
policy's own by `hand_over`. Its vocabulary is exactly the policy's words: rows of the head beyond
them, which have probability 0 for the trainer, are not there at all.

Left out: its prefix cache, which would answer from the keys and values of older weights, and make
the rounding of a response depend on what was written before it.
"""

import contextlib
import copy
import importlib
import os
import tempfile
import warnings
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kleash.errors import EngineError, KleashError
from kleash.models.policy import Policy
from kleash.models.probing import first_lines
from kleash.rollout.engine import NamedTensors, WritingRequest
from kleash.rollout.engine_output import EngineResponse, rollout_of
from kleash.rollout.hand_over import policy_weights, write_weights
from kleash.types import Rollout

OLDEST = (0, 32)
"""The first release of vLLM that takes weights in place in the way used here."""
LEAST_TEMPERATURE = 0.01
"""vLLM takes this for everything below, but for the greedy 0."""
_GIB = 2**30


@dataclass(frozen=True)
class VLLMSettings:
    """How much of the machine vLLM may take."""

    max_tokens: int
    """Longest prompt + response."""
    gpu_memory_utilization: float = 0.3
    """Part of a GPU's memory for weights and cache of the engine; without effect on a CPU."""
    kv_cache_gib: float | None = None
    """Memory of the key-value cache; None: what is left of the GPU's part, and 1 GiB on a CPU."""
    enforce_eager: bool = False
    """Start at once instead of compiling the model and capturing graphs of it first."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model as an engine has them."""

    words: int
    """Token ids below this stand for text."""
    rows: int
    """Of the engine's head; those beyond the words are left out of what it says."""
    stop_ids: tuple[int, ...]
    pad_id: int


class VLLMEngine:
    """See `engine.SeparateEngine`; made by `start_vllm`."""

    def __init__(self, model: Any, vocabulary: Vocabulary, *, eager: bool) -> None:
        self.loaded: int | None = None
        self._eager = eager
        self._model, self._vocabulary = model, vocabulary

    @property
    def seeded(self) -> bool:
        """Each response has a seed of its own."""
        return True

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in, by its own choice where it was left to it."""
        return self._open().llm_engine.vllm_config.model_config.dtype

    @property
    def concurrent(self) -> bool:
        """See `SeparateEngine`: it shares the trainer's process."""
        return False

    def write(self, request: WritingRequest) -> Rollout:
        """See `RolloutEngine`."""
        require_temperature(request.sampling.temperature)
        vocabulary = self._vocabulary
        # Rows of the head beyond the words have probability 0, for the trainer as here.
        short = vocabulary.words < vocabulary.rows
        allowed = {"allowed_token_ids": list(range(vocabulary.words))} if short else {}
        settings = [
            {
                **allowed,
                "temperature": request.sampling.temperature,
                "seed": seed,
                "max_tokens": request.sampling.max_new_tokens,
                "stop_token_ids": list(self._vocabulary.stop_ids),
                "ignore_eos": True,
                "logprobs": 0,
            }
            for seed in request.seeds
        ]
        prompts = request.prompts
        texts = [ids[mask].tolist() for ids, mask in zip(prompts.ids, prompts.mask, strict=True)]
        return rollout_of(
            [
                EngineResponse(
                    list(one.outputs[0].token_ids), list(one.outputs[0].logprobs.logprobs)
                )
                for one in self._generate(texts, settings)
            ],
            request,
            words=self._vocabulary.words,
            stop_ids=self._vocabulary.stop_ids,
            pad_id=self._vocabulary.pad_id,
        )

    def wait_until_back(self) -> None:
        """See `SeparateEngine`; in this process there is no other side to come back."""

    def load_weights(self, weights: NamedTensors) -> None:
        """See `SeparateEngine`."""
        with _engine_errors("take the policy's weights"), _trainers_state_kept():
            self._open().collective_rpc("reload_weights", kwargs={"weights_iterator": weights})

    def text_logprobs(self, texts: Sequence[Sequence[int]]) -> list[Float[Tensor, " token"]]:
        """See `SeparateEngine`."""
        rows = self._read(texts, 0)
        return [torch.tensor([row.logprobs[0] for row in text]).double() for text in rows]

    def next_token_logprobs(
        self, texts: Sequence[Sequence[int]], *, temperature: float = 1.0
    ) -> list[Float[Tensor, "token vocab"]]:
        """See `SeparateEngine`."""
        laws: list[Tensor] = []
        for text in self._read(texts, -1):
            law = torch.full((len(text), self._vocabulary.rows), torch.nan, dtype=torch.float64)
            for place, row in enumerate(text):
                law[place, torch.tensor(row.ids)] = torch.tensor(row.logprobs).double()
            # What it returns of a text is at temperature 1, and a constant does not matter.
            laws.append((law[:, : self._vocabulary.words] / temperature).log_softmax(-1))
        return laws

    def close(self) -> None:
        """See `RolloutEngine`."""
        model, self._model = self._model, None
        if model is not None:
            with contextlib.suppress(Exception):
                model.llm_engine.engine_core.shutdown()

    def _read(self, texts: Sequence[Sequence[int]], also: int) -> list[list[EngineResponse]]:
        """What it says of each token of texts but the first: that token, and some or all others."""
        settings = {"temperature": 1.0, "max_tokens": 1, "prompt_logprobs": also}
        found: list[list[EngineResponse]] = []
        for one in self._generate([list(text) for text in texts], [settings] * len(texts)):
            flat = one.prompt_logprobs
            spans = list(zip(flat.start_indices, flat.end_indices, strict=True))[1:]
            found.append(
                [EngineResponse(flat.token_ids[a:b], flat.logprobs[a:b]) for a, b in spans]
            )
        return found

    def _generate(self, texts: list[list[int]], settings: Sequence[dict[str, Any]]) -> Any:
        vllm: Any = importlib.import_module("vllm")
        with _engine_errors("write"), _trainers_state_kept(), _compiling(self._eager):
            return self._open().generate(
                [{"prompt_token_ids": text} for text in texts],
                [
                    vllm.SamplingParams(**one, detokenize=False, flat_logprobs=True)
                    for one in settings
                ],
                use_tqdm=False,
            )

    def _open(self) -> Any:
        if self._model is None:
            raise EngineError("expected an open engine, got one that was closed: start another")
        return self._model


def start_vllm(policy: Policy, settings: VLLMSettings) -> VLLMEngine:
    """Start vLLM for a policy, in this process; it has none of the policy's weights yet.

    Raises:
        EngineError: vLLM is not installed or too old, or cannot serve this model here.
    """
    vocabulary = Vocabulary(policy.words, policy.words, policy.stop_ids, policy.pad_id)
    dtype = str(next(policy.model.parameters()).dtype).removeprefix("torch.")
    with tempfile.TemporaryDirectory(prefix="kleash-vllm-") as folder:
        write_configuration(policy, Path(folder))
        cpu = policy.device.type == "cpu"
        model = _start(folder, settings, cpu=cpu, dtype=dtype, load_format="dummy")
    return VLLMEngine(model, vocabulary, eager=settings.enforce_eager)


def open_vllm(
    directory: str | Path, vocabulary: Vocabulary, settings: VLLMSettings, *, cpu: bool
) -> VLLMEngine:
    """Start vLLM on a model's directory as it is: its own loading, types and quantisation.

    Raises:
        EngineError: as `start_vllm`.
    """
    model = _start(str(directory), settings, cpu=cpu, dtype="auto")
    return VLLMEngine(model, vocabulary, eager=settings.enforce_eager)


def _start(path: str, settings: VLLMSettings, *, cpu: bool, **how: Any) -> Any:
    vllm = import_vllm()
    gib = 1.0 if settings.kv_cache_gib is None and cpu else settings.kv_cache_gib
    with _engine_errors("start"), _trainers_state_kept(), _compiling(settings.enforce_eager):
        return vllm.LLM(
            model=path,
            skip_tokenizer_init=True,
            max_model_len=settings.max_tokens,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            kv_cache_memory_bytes=None if gib is None else int(gib * _GIB),
            enforce_eager=settings.enforce_eager,
            **how,
            **SAMPLER,
        )


SAMPLER: dict[str, Any] = {
    "logprobs_mode": "processed_logprobs",
    "max_logprobs": -1,
    "generation_config": "vllm",
    "enable_prefix_caching": False,
    "enable_chunked_prefill": False,
    "seed": 0,
}
"""Settings that decide what is sampled and what is said of it: log-probabilities after the
temperature, as many as asked for, nothing from the model's own generation_config.json. Prompts are
read whole, for after a part of one the generator of its response is turned back, which that of a
CPU cannot be."""


def import_vllm() -> Any:
    """The library, loaded at the first use: it takes seconds, and most runs need none of it.

    Raises:
        EngineError: it is not installed, does not load, or is too old.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            vllm: Any = importlib.import_module("vllm")
        version = str(vllm.__version__)
    except ModuleNotFoundError as error:
        if error.name == "vllm":
            raise EngineError(
                "expected vLLM for rollout.engine: vllm, got none installed: pip install "
                "'kleash[vllm]' (without a GPU see docs/rollouts.md), or take rollout.engine: hf"
            ) from None
        raise _unusable(error) from error
    except Exception as error:  # Whatever keeps it from loading: a missing library, another torch.
        raise _unusable(error) from error
    require_version(version)
    return vllm


def require_version(version: str) -> None:
    """Check that a vLLM can do what is asked of it here.

    Raises:
        EngineError: it is too old.
    """
    parts = version.split(".")[:2]
    if not all(part.isdigit() for part in parts) or tuple(map(int, parts)) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise EngineError(
            f"expected vLLM {wanted} or newer, got {version}: pip install -U 'vllm>={wanted}'"
        )


def require_temperature(temperature: float) -> None:
    """Check that vLLM samples at this temperature and not at another.

    Raises:
        EngineError: it would take the least that it knows instead, without an error.
    """
    if temperature < LEAST_TEMPERATURE:
        raise EngineError(
            f"expected a temperature of at least {LEAST_TEMPERATURE} for vLLM, got {temperature:g}:"
            " it samples at no lower one; raise rollout.temperature, or take rollout.engine: hf"
        )


def write_configuration(policy: Policy, folder: Path) -> None:
    """The policy's configuration as an engine is to read it: see `hand_over.policy_weights`."""
    config = copy.deepcopy(policy.model.config)
    config.architectures = [type(policy.model).__name__]
    for part in (config, config.get_text_config()):
        part.vocab_size = policy.words
        part.tie_word_embeddings = False
    config.save_pretrained(folder)


def write_model(policy: Policy, folder: Path) -> None:
    """The policy as an engine can open it by itself: configuration, weights and tokenizer."""
    write_configuration(policy, folder)
    write_weights(policy_weights(policy), folder)
    policy.tokenizer.save_pretrained(str(folder))


def _unusable(error: Exception) -> EngineError:
    return EngineError(
        f"expected vLLM to load, got {type(error).__name__}: {first_lines(error)}; reinstall it "
        "as docs/rollouts.md says, or take rollout.engine: hf"
    )


@contextlib.contextmanager
def _engine_errors(doing: str) -> Generator[None]:
    """Whatever vLLM raises, as one sentence."""
    try:
        yield
    except KleashError:
        raise
    # The code of another project with errors of many kinds, its own and of what it calls.
    except Exception as error:
        raise EngineError(
            f"expected vLLM to {doing}, got {type(error).__name__}: {first_lines(error)}"
        ) from error


@contextlib.contextmanager
def _trainers_state_kept() -> Generator[None]:
    """vLLM seeds and draws from torch's global generators and replaces a function of torch."""
    threads, set_threads = torch.get_num_threads(), torch.set_num_threads
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own use of other libraries
        try:
            yield
        finally:
            torch.set_num_threads = set_threads
            if torch.get_num_threads() != threads:
                set_threads(threads)


def _compiling(eager: bool) -> Any:
    """Its small functions are compiled by torch at their first use, unless it is to start at once;
    a compiled one would take half a minute to save some microseconds on a CPU."""
    return torch.compiler.set_stance("force_eager") if eager else contextlib.nullcontext()
