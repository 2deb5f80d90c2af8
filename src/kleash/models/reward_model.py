"""Reward models: text in, score out.

A reward model never sees the policy's token ids. It gets the prompt and the response as text and
reads them in its own way: a classifier with its own tokenizer and template, or any Python function.
Whatever it does wrong stops the run with the response's name: a wrong score is learnt at once.
"""

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kleash.errors import NonFiniteScoreError, RewardError
from kleash.models.loading import Attention, Dtype, load_classifier, load_tokenizer

Content = str | Sequence[Mapping[str, str]]
"""A prompt as its author wrote it: text, or messages of `role` and `content`."""

PLAIN_TEMPLATE = "{prompt}{response}"


@runtime_checkable
class RewardModel(Protocol):
    """Anything that scores responses."""

    def score(
        self, prompts: Sequence[Content], responses: Sequence[str]
    ) -> Float[Tensor, " batch"]:
        """Score of each response, higher is better; every one finite.

        Raises:
            RewardError: naming the response that could not be scored.
        """
        ...


class ClassifierReward:
    """A sequence classifier of one output, with its own tokenizer and template.

    Text prompts go through the template; conversations go through the classifier's own chat
    template, with the response as the assistant's answer.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        template: str = PLAIN_TEMPLATE,
        dtype: Dtype = "float32",
        device: str = "cpu",
        attention: Attention = "auto",
        batch_size: int = 32,
        revision: str | None = None,
    ):
        """Open a reward model.

        Args:
            path: a Hugging Face directory or hub name.
            template: how a text is put together; `{prompt}` and `{response}` are replaced.
            dtype: of the parameters.
            device: a torch device.
            attention: implementation of attention; "auto" leaves the choice to the library.
            batch_size: texts read at once; changes memory, not scores.
            revision: of a hub name.

        Raises:
            ModelError: if it cannot be loaded, its head was not trained, or it has several outputs.
            RewardError: if the template lacks the response.
        """
        if "{response}" not in template:
            raise RewardError(
                f"expected a template with {{response}}, got {template!r}: for example "
                f"{PLAIN_TEMPLATE!r}"
            )
        model = load_classifier(
            path, dtype=dtype, device=device, attention=attention, revision=revision
        )
        self._model = model.requires_grad_(False)
        self._tokenizer = load_tokenizer(path, revision=revision)
        self._path, self._template, self._batch_size = str(path), template, batch_size

    @property
    def model(self) -> PreTrainedModel:
        """The classifier."""
        return self._model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The classifier's own tokenizer."""
        return self._tokenizer

    @property
    def path(self) -> str:
        """Where it was loaded from."""
        return self._path

    def score(
        self, prompts: Sequence[Content], responses: Sequence[str]
    ) -> Float[Tensor, " batch"]:
        """See `RewardModel`; each score is that of the text read alone."""
        rows = [
            self.encode(*pair, i) for i, pair in enumerate(zip(prompts, responses, strict=True))
        ]
        # Without a padding id of its own the classifier cannot tell where a padded text ends.
        size = 1 if self._model.config.pad_token_id is None else self._batch_size
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        scores = torch.zeros(len(rows))
        for start in range(0, len(rows), size):
            some = order[start : start + size]
            scores[some] = self._read([rows[i] for i in some])
        _require_finite(scores.tolist(), f"the reward model {self._path!r}", responses)
        return scores

    @torch.no_grad()
    def _read(self, rows: Sequence[list[int]]) -> Float[Tensor, " batch"]:
        """Scores of token sequences, padded on the right."""
        width = max(len(ids) for ids in rows)
        pad = self._model.config.pad_token_id or 0
        ids = torch.tensor([r + [pad] * (width - len(r)) for r in rows])
        mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
        device = self._model.device
        logits = self._model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        return logits[:, 0].float().cpu()

    def encode(self, prompt: Content, response: str, index: int = 0) -> list[int]:
        """Token ids of prompt and response as this model was taught to read them.

        Raises:
            RewardError: it has no chat template for a conversation, or the text does not fit.
        """
        tokenizer = self._tokenizer
        if isinstance(prompt, str):
            # Two steps, so that braces in a prompt are text and not a field.
            head, _, tail = self._template.partition("{response}")
            text = head.replace("{prompt}", prompt) + response + tail.replace("{prompt}", prompt)
            ids = cast(list[int], tokenizer(text)["input_ids"])
        elif tokenizer.chat_template is None:
            raise RewardError(
                f"expected a reward model with a chat template for conversations, got "
                f"{self._path!r} without: write the prompts as text, or take another model"
            )
        else:
            turns = [*(dict(m) for m in prompt), {"role": "assistant", "content": response}]
            text = cast(str, tokenizer.apply_chat_template(turns, tokenize=False))
            ids = cast(list[int], tokenizer(text, add_special_tokens=False)["input_ids"])
        # A template that writes BOS itself, and a tokenizer that adds one, would make two.
        while len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
            ids = ids[1:]
        limit = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if not ids or (isinstance(limit, int) and len(ids) > limit):
            raise RewardError(
                f"expected texts of 1 to {limit} tokens for the reward model {self._path!r}, got "
                f"{len(ids)} for response {index}, {_excerpt(response)}: shorten prompt or response"
            )
        return ids


class CallableReward:
    """Any Python function of two lists, prompts and responses, that returns a list of numbers."""

    def __init__(self, name: str):
        """Find a function.

        Args:
            name: "module:function"; the current directory is searched too. Or "file.py:function".

        Raises:
            RewardError: if there is no such function.
        """
        self._name = name
        self._function = _find(name)

    def score(
        self, prompts: Sequence[Content], responses: Sequence[str]
    ) -> Float[Tensor, " batch"]:
        """See `RewardModel`; conversations reach the function as `role: content` lines."""
        who = f"the reward function {self._name!r}"
        try:
            returned = self._function([text_of(p) for p in prompts], list(responses))
        except Exception as error:
            raise RewardError(
                f"expected {who} to score {len(responses)} responses (0: "
                f"{_excerpt(responses[0] if responses else '')}), got "
                f"{type(error).__name__}: {error}"
            ) from error
        scores = _numbers(returned, who, responses)
        _require_finite(scores, who, responses)
        return torch.tensor(scores)


@dataclass(frozen=True)
class WeightedScores:
    """A sum of rewards, and each of them, for the log."""

    total: Float[Tensor, " batch"]
    parts: dict[str, Float[Tensor, " batch"]]
    """Score of each reward model, before its weight."""


@dataclass(frozen=True)
class WeightedSum:
    """Several reward models, by name, each with its weight: total = Σ weight · score."""

    rewards: Mapping[str, tuple[RewardModel, float]]

    def __post_init__(self) -> None:
        """Refuse an empty sum and weights that are no numbers.

        Raises:
            RewardError: saying which.
        """
        if not self.rewards:
            raise RewardError(
                "expected at least one reward model, got none: name one to learn from"
            )
        for name, (_, weight) in self.rewards.items():
            if not math.isfinite(weight):
                raise RewardError(f"expected a finite weight for reward {name!r}, got {weight}")

    def score(
        self, prompts: Sequence[Content], responses: Sequence[str]
    ) -> Float[Tensor, " batch"]:
        """See `RewardModel`; the total alone."""
        return self.score_each(prompts, responses).total

    def score_each(self, prompts: Sequence[Content], responses: Sequence[str]) -> WeightedScores:
        """Score with every reward model.

        Raises:
            RewardError: from the reward model that failed.
        """
        parts = {n: model.score(prompts, responses) for n, (model, _) in self.rewards.items()}
        total = torch.zeros(len(responses))
        for name, (_, weight) in self.rewards.items():
            total = total + weight * parts[name]
        return WeightedScores(total=total, parts=parts)


def text_of(prompt: Content) -> str:
    """A prompt as plain text; a conversation becomes one `role: content` line per message.

    Example:
        >>> text_of([{"role": "user", "content": "Hello"}])
        'user: Hello'
    """
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _find(name: str) -> Callable[[list[str], list[str]], object]:
    module_name, _, function_name = name.rpartition(":")
    if not module_name or not function_name:
        raise RewardError(f"expected a reward function as 'module:function', got {name!r}")
    here = str(Path.cwd())
    # The console script's own directory is searched by default, not the user's.
    if here not in sys.path:
        sys.path.append(here)
    try:
        is_file = module_name.endswith(".py")
        module = _load(Path(module_name)) if is_file else importlib.import_module(module_name)
    except Exception as error:  # Importing runs the user's code: anything can come.
        raise RewardError(
            f"expected a module {module_name!r} for the reward function {name!r}, got "
            f"{type(error).__name__}: {error}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise RewardError(
            f"expected a function {function_name!r} in {module_name!r}, got "
            f"{'none' if function is None else type(function).__name__}: check the name"
        )
    return cast(Callable[[list[str], list[str]], object], function)


def _load(file: Path) -> ModuleType:
    """A module by its file, loaded once; it imports its neighbours as a script would."""
    name = str(file.resolve())
    if name in sys.modules:
        return sys.modules[name]
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise ImportError(f"no Python file at {file}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _numbers(returned: object, who: str, responses: Sequence[str]) -> list[float]:
    """What a function returned, as one float per response."""
    values: list[Any]
    if isinstance(returned, list | tuple):
        values = list(cast(Sequence[Any], returned))
    elif hasattr(returned, "tolist"):
        listed = cast(Any, returned).tolist()
        values = cast(list[Any], listed) if isinstance(listed, list) else [listed]
    else:
        raise RewardError(
            f"expected {who} to return a list of numbers, got {type(returned).__name__}"
        )
    if len(values) != len(responses):
        raise RewardError(
            f"expected {who} to return {len(responses)} scores, one per response, got {len(values)}"
        )
    numbers: list[float] = []
    for index, value in enumerate(values):
        try:
            numbers.append(float(value))
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"expected {who} to return a number for response {index}, "
                f"{_excerpt(responses[index])}, got {value!r}"
            ) from error
    return numbers


def _require_finite(scores: Sequence[float], who: str, responses: Sequence[str]) -> None:
    for index, value in enumerate(scores):
        if not math.isfinite(value):
            raise NonFiniteScoreError(
                f"expected a finite score from {who} for {{place}}, "
                f"{_excerpt(responses[index])}, got {value}",
                response=index,
            )


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
