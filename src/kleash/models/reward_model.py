"""Reward models: text in, score out.

A reward model gets the prompt and the response as text, and the further columns of the prompts,
and reads them in its own way: a classifier with its own tokenizer and template (here), or any
Python callable (`callable_reward`). Whatever it does wrong stops the run and names the response: a
wrong score is learnt at once.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kleash.errors import NonFiniteScoreError, RewardError
from kleash.models.chat_templates import (
    checked_arguments,
    checked_tools,
    content_text,
    render_chat,
    with_answer,
)
from kleash.models.judge_loading import load_judge, most_tokens, padding_changes
from kleash.models.loading import Attention, Dtype
from kleash.models.probing import own_code

Content = str | Sequence[Mapping[str, Any]]
"""A prompt as its author wrote it: text, or messages of `role`, `content` and what they carry."""

Columns = Mapping[str, Sequence[Any]]
"""What else is known of each response, by name: the prompts' further columns, and its tokens."""

NO_COLUMNS: Columns = MappingProxyType({})
PLAIN_TEMPLATE = "{prompt}{response}"
_LARGEST = torch.finfo(torch.float32).max


@runtime_checkable
class RewardModel(Protocol):
    """Anything that scores responses."""

    def score(
        self,
        prompts: Sequence[Content],
        responses: Sequence[str],
        columns: Columns = NO_COLUMNS,
    ) -> Float[Tensor, " batch"]:
        """Score of each response, higher is better; every one finite.

        Args:
            prompts: one for each response.
            responses: as text, without the tokens that end or pad them.
            columns: further values, one for each response.

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
        adapter: str | Path | None = None,
        chat_template: str | None = None,
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
            adapter: directory of a LoRA adapter, head included, that was trained on `path`.
            chat_template: name of one of its tokenizer's chat templates; None: the default.

        Raises:
            ModelError: if it cannot be loaded, its head was not trained, or it has several outputs.
            RewardError: if the template lacks the response.
        """
        if "{response}" not in template:
            raise RewardError(
                f"expected a template with {{response}}, got {template!r}: for example "
                f"{PLAIN_TEMPLATE!r}"
            )
        self._model, self._tokenizer = load_judge(
            path,
            adapter=adapter,
            dtype=dtype,
            device=device,
            attention=attention,
            revision=revision,
        )
        self._path, self._template, self._batch_size = str(path), template, batch_size
        self._adapter = None if adapter is None else str(adapter)
        self._chat_template = chat_template
        self._limit = most_tokens(self._model)
        with own_code(self._model, path):
            self._unpadded = padding_changes(self._model, self._limit)

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

    @property
    def adapter(self) -> str | None:
        """Directory of the adapter that was merged into it."""
        return self._adapter

    def score(
        self,
        prompts: Sequence[Content],
        responses: Sequence[str],
        columns: Columns = NO_COLUMNS,
    ) -> Float[Tensor, " batch"]:
        """See `RewardModel`; each score is that of the text read alone.

        The columns `tools` and `chat_template_kwargs` go to the chat template of a conversation.
        """
        rows = [
            self.encode(*pair, i, {name: values[i] for name, values in columns.items()})
            for i, pair in enumerate(zip(prompts, responses, strict=True))
        ]
        scores = torch.zeros(len(rows))
        for some in self._batches([len(row) for row in rows]):
            scores[some] = self._read([rows[i] for i in some])
        require_finite(scores.tolist(), f"the reward model {self._path!r}", responses)
        return scores

    def _batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Numbers of texts that are read together, shortest first."""
        # Without a padding id of its own the classifier cannot find where a padded text ends.
        size = 1 if self._model.config.pad_token_id is None else self._batch_size
        batches: list[list[int]] = []
        for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
            last = batches[-1] if batches else []
            fits = 0 < len(last) < size
            if fits and not (self._unpadded and lengths[last[0]] != lengths[i]):
                last.append(i)
            else:
                batches.append([i])
        return batches

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

    def encode(
        self,
        prompt: Content,
        response: str,
        index: int = 0,
        row: Mapping[str, Any] = MappingProxyType({}),
    ) -> list[int]:
        """Token ids of prompt and response as this model was taught to read them.

        Args:
            prompt: text or messages.
            response: as text.
            index: its number, for the error.
            row: its columns; `tools` and `chat_template_kwargs` are read.

        Raises:
            RewardError: its chat template cannot take a conversation, or the text does not fit.
        """
        tokenizer = self._tokenizer
        if isinstance(prompt, str):
            # Two steps, so that braces in a prompt are text and not a field.
            head, _, tail = self._template.partition("{response}")
            text = head.replace("{prompt}", prompt) + response + tail.replace("{prompt}", prompt)
            ids = cast(list[int], tokenizer(text)["input_ids"])
        else:
            text = self._conversation(prompt, response, index, row)
            ids = cast(list[int], tokenizer(text, add_special_tokens=False)["input_ids"])
        # A template that writes BOS itself, and a tokenizer that adds one, would make two.
        while len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
            ids = ids[1:]
        if not ids or (self._limit is not None and len(ids) > self._limit):
            sizes = "1 token or more" if self._limit is None else f"1 to {self._limit} tokens"
            raise RewardError(
                f"expected texts of {sizes} for the reward model {self._path!r}, got {len(ids)} "
                f"for response {index}, {excerpt(response)}: shorten prompt or response"
            )
        return ids

    def _conversation(
        self,
        prompt: Sequence[Mapping[str, Any]],
        response: str,
        index: int,
        row: Mapping[str, Any],
    ) -> str:
        place = f"of response {index} for the reward model {self._path!r}"
        try:
            given = row.get("chat_template_kwargs")
            arguments = {} if given is None else checked_arguments(given, place)
            # What asks for an answer, or for its continuation, has been answered here.
            asking = ("add_generation_prompt", "continue_final_message")
            continued = bool(arguments.get("continue_final_message"))
            return render_chat(
                self._tokenizer,
                with_answer(prompt, response, continued=continued),
                place=place,
                tools=checked_tools(row.get("tools"), place),
                arguments={name: v for name, v in arguments.items() if name not in asking},
                template=self._chat_template,
            )
        except ValueError as error:
            raise RewardError(str(error)) from error


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
        self,
        prompts: Sequence[Content],
        responses: Sequence[str],
        columns: Columns = NO_COLUMNS,
    ) -> Float[Tensor, " batch"]:
        """See `RewardModel`; the total alone."""
        return self.score_each(prompts, responses, columns).total

    def score_each(
        self,
        prompts: Sequence[Content],
        responses: Sequence[str],
        columns: Columns = NO_COLUMNS,
    ) -> WeightedScores:
        """Score with every reward model.

        Raises:
            RewardError: from the reward model that failed.
            NonFiniteScoreError: float32 does not hold a weighted sum.
        """
        parts = {
            name: model.score(prompts, responses, columns)
            for name, (model, _) in self.rewards.items()
        }
        total = torch.zeros(len(responses))
        for name, (_, weight) in self.rewards.items():
            total = total + weight * parts[name]
            require_finite(total.tolist(), f"the sum of rewards up to {name!r}", responses)
        return WeightedScores(total=total, parts=parts)


@dataclass(frozen=True)
class NoReward:
    """Where nothing is judged, as in distillation: every score is 0."""

    rewards: Mapping[str, tuple[RewardModel, float]] = field(default_factory=dict)
    """Empty."""

    def score(
        self,
        prompts: Sequence[Content],
        responses: Sequence[str],
        columns: Columns = NO_COLUMNS,
    ) -> Float[Tensor, " batch"]:
        """See `RewardModel`."""
        return self.score_each(prompts, responses, columns).total

    def score_each(
        self,
        prompts: Sequence[Content],
        responses: Sequence[str],
        columns: Columns = NO_COLUMNS,
    ) -> WeightedScores:
        """See `WeightedSum`."""
        return WeightedScores(total=torch.zeros(len(responses)), parts={})


def text_of(prompt: Content) -> str:
    """A prompt as plain text; a conversation becomes one `role: content` line per message.

    Calls of tools follow the content as JSON.

    Example:
        >>> text_of([{"role": "user", "content": "Hello"}])
        'user: Hello'
    """
    if isinstance(prompt, str):
        return prompt
    return "\n".join(_message_line(message) for message in prompt)


def _message_line(message: Mapping[str, Any]) -> str:
    calls = message.get("tool_calls")
    said = [content_text(message)] if message.get("content") or not calls else []
    written = [json.dumps(calls, ensure_ascii=False, default=str)] if calls else []
    return f"{message['role']}: {' '.join([*said, *written])}"


def require_finite(scores: Sequence[float], who: str, responses: Sequence[str]) -> None:
    """Check that float32 holds every score.

    Raises:
        NonFiniteScoreError: naming the first response whose score is NaN, infinite or too large.
    """
    for index, value in enumerate(scores):
        if not math.isfinite(value):
            raise NonFiniteScoreError(
                f"expected a finite score from {who} for {{place}}, "
                f"{excerpt(responses[index])}, got {value}",
                response=index,
            )
        if abs(value) > _LARGEST:
            raise NonFiniteScoreError(
                f"expected a score from {who} for {{place}}, {excerpt(responses[index])}, that "
                f"float32 holds (up to {_LARGEST:.2g}), got {value:.6g}: scale it down",
                response=index,
            )


def excerpt(text: str) -> str:
    """The beginning of a text, as Python would write it."""
    return repr(text if len(text) <= 60 else text[:57] + "...")
