"""A model as vLLM computes it, in the form that an audit reads: `vllm:DIR` in place of `DIR`.

vLLM says the log-probability of every word at every place of a text. Those stand here as hidden
states, in reverse order, with a head that puts them back: the softmax of log-probabilities is
their distribution.

    z = J · (J · log π),    J_ij = 1 where i + j = V − 1,    softmax(z / T) ∝ π^(1/T)

So everything that an audit does with a model it does with this one, and every KL is exact: that of
the kernels, types and quantisation that serve. Responses are written by vLLM's own sampler.

J is a window that slides over one line of 2V − 1 numbers, so it takes no memory; the product with
it costs V² operations a token. Left out: more log-probabilities at once than main memory holds,
which bounds the length of a text (`_ENTRIES`).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from kleash.errors import ModelError
from kleash.models.fingerprint import weights_sha256
from kleash.models.loading import (
    ending_ids,
    load_config,
    load_tokenizer,
    number_of_words,
    require_special_tokens,
)
from kleash.models.policy import Identity, Policy
from kleash.models.probing import first_lines
from kleash.rollout.engine import writing_request
from kleash.rollout.prompts import PromptBatch
from kleash.rollout.sampling import SamplingSpec
from kleash.rollout.vllm_engine import VLLMEngine, VLLMSettings, Vocabulary, open_vllm
from kleash.types import Rollout

PREFIX = "vllm:"
_LONGEST = 4096
"""Tokens that the engine keeps room for, where the model can read more."""
_ENTRIES = 2**27
"""Tokens × words of the longest text; vLLM gives them as Python's numbers, some 70 bytes each."""
_AT_ONCE = 2**23
"""Tokens × words of the texts that are read together, where there are several."""
_SPARE = 2
"""Tokens behind a text: one so that the law after its last is said, one that must be written."""


class ServedArchitecture(PretrainedConfig):
    """What is asked of a model's configuration: nothing that would transform its logits."""

    model_type = "served"


class ServedModel(PreTrainedModel):
    """See the top of this file."""

    config_class = ServedArchitecture
    base_model_prefix = "trunk"

    def __init__(
        self, architecture: ServedArchitecture, engine: VLLMEngine, identity: Identity, words: int
    ) -> None:
        super().__init__(architecture)
        self.engine = engine
        self.identity = identity
        self.trunk = _Trunk(engine, words)
        self.lm_head = Reversal(words)

    def get_output_embeddings(self) -> nn.Module:
        """What puts the words in their order again."""
        return self.lm_head

    def forward(self, input_ids: Int[Tensor, "batch token"], **given: Any) -> Any:
        """Not needed: an audit reads hidden states and the head."""
        raise NotImplementedError("a served model is read through its trunk")

    def write(self, prompts: PromptBatch, spec: SamplingSpec) -> Rollout:
        """Responses by vLLM's own sampler; their seeds come from torch's global generator."""
        return self.engine.write(
            writing_request(self.engine, prompts, spec, microbatch=len(prompts.ids))
        )


class Reversal(nn.Module):
    """A head whose matrix reverses a vector: J of the top of this file.

    Example:
        >>> Reversal(3).weight
        tensor([[0., 0., 1.],
                [0., 1., 0.],
                [1., 0., 0.]])
    """

    def __init__(self, words: int) -> None:
        super().__init__()
        self.line = nn.Parameter(torch.zeros(2 * words - 1), requires_grad=False)
        self.line[words - 1] = 1.0

    @property
    def weight(self) -> Float[Tensor, "words words"]:
        """[i, j]: the number i + j of the line; a view."""
        words = (len(self.line) + 1) // 2
        return self.line.detach().as_strided((words, words), (1, 1))


class _Trunk(nn.Module):
    """Texts in, log-probabilities of all words out, row by row without its padding."""

    def __init__(self, engine: VLLMEngine, words: int) -> None:
        super().__init__()
        self._engine, self._words = engine, words
        self.place = nn.Parameter(torch.zeros(()), requires_grad=False)
        """Where the states go."""

    def forward(
        self,
        input_ids: Int[Tensor, "batch token"],
        attention_mask: Int[Tensor, "batch token"] | None = None,
        use_cache: bool = False,
    ) -> tuple[Float[Tensor, "batch token words"]]:
        """[batch, token, word] log π after each token, the last word first; 0 without a token."""
        del use_cache
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        real = mask.bool()
        texts = [row[kept].tolist() for row, kept in zip(input_ids, real, strict=True)]
        states = torch.zeros(*input_ids.shape, self._words, device=self.place.device)
        for rows in self._together(texts):
            laws = self._engine.next_token_logprobs([[*texts[row], 0] for row in rows])
            for row, law in zip(rows, laws, strict=True):
                states[row, real[row]] = law.flip(-1).to(states)
        return (states,)

    def _together(self, texts: list[list[int]]) -> Iterator[list[int]]:
        """Rows that are read at once, a single one however long it is."""
        rows, held = list[int](), 0
        for row, text in enumerate(texts):
            entries = len(text) * self._words
            if rows and held + entries > _AT_ONCE:
                yield rows
                rows, held = [], 0
            rows.append(row)
            held += entries
        yield rows


def open_served(path: str, *, device: str) -> Policy:
    """Start vLLM on a directory, with types and quantisation as it serves it by default.

    Args:
        path: the directory, with `PREFIX` before it.
        device: where the reference is; on a GPU vLLM takes its own part of it.

    Raises:
        ModelError: the tokenizer or configuration cannot be used.
        EngineError: vLLM is not installed, or cannot serve it.
    """
    directory = path.removeprefix(PREFIX)
    config, tokenizer = load_config(directory), load_tokenizer(directory)
    require_special_tokens(tokenizer, directory)
    text = config.get_text_config()
    rows = int(text.vocab_size)
    words = number_of_words(tokenizer, rows, directory)
    readable = getattr(text, "max_position_embeddings", None) or _LONGEST
    longest = min(readable, _LONGEST, _ENTRIES // rows)
    ends = _generation_config(directory)
    stops = ending_ids(ends, tokenizer, owner=str(directory))
    engine = open_vllm(
        directory,
        Vocabulary(words, rows, stops, pad_id=0),
        VLLMSettings(max_tokens=longest, enforce_eager=True),
        cpu=device == "cpu",
    )
    try:
        identity = Identity(
            path=directory,
            how="as vLLM computes it",
            dtype=str(engine.dtype).removeprefix("torch."),
            sha256=weights_sha256(_stored(directory)),
        )
        # What a served model cannot do shows at its first text.
        engine.next_token_logprobs([[0, 0]])
    except BaseException:
        engine.close()
        raise
    served = ServedArchitecture()
    served.max_position_embeddings = longest - _SPARE
    model = ServedModel(served, engine, identity, words).eval()
    cast(Any, model).to(device)
    model.generation_config = ends
    model.requires_grad_(False)
    return Policy(model, tokenizer, path, words, stops)


def _generation_config(directory: str) -> GenerationConfig:
    """What a model's own file says, if it has one."""
    if (Path(directory) / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(directory)
    return GenerationConfig()


def _stored(directory: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a directory's files, one at a time.

    Raises:
        ModelError: there are none, or they cannot be read.
    """
    files = sorted(Path(directory).glob("*.safetensors"))
    if not files:
        raise ModelError(f"expected weights as safetensors in {directory!r}, got none")
    try:
        for file in files:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    yield name, opened.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"expected weights that can be read in {directory!r}, got: {first_lines(error)}"
        ) from error
