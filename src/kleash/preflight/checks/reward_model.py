"""Checks `reward_model.*`: does the reward model read what it was taught to read?

A classifier is compared with itself on one text at a time, without padding, from its own hidden
states. Any reward, callables too, is probed with replies that no good judge prefers.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kleash.errors import PromptError
from kleash.models.chat_templates import content_text
from kleash.models.judge_loading import saved_head
from kleash.models.reward_model import ClassifierReward, Content, text_of
from kleash.preflight.findings import Check, Finding, some
from kleash.preflight.probe_batch import Trial
from kleash.rollout.prompts import columns_of_row, file_rows, prompt_content

_SAME_SCORE = 1e-3
"""Relative to 1 + |score|; a judge in half precision rounds more and is given 0.05."""
_TEXTS = 12


@dataclass(frozen=True)
class Pair:
    """Two replies to one prompt, of which people preferred the first."""

    prompt: Content
    chosen: str
    rejected: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    """What else the row holds, for a reward that reads it."""


def head(trial: Trial) -> Finding:
    """One output, with the weights of the checkpoint."""
    check = Check("reward_model.head", "one output, its weights those of the checkpoint")
    for key, judge in classifiers(trial):
        labels = judge.model.config.num_labels
        if labels != 1:
            return check.fail(
                f"{key}: {labels} outputs",
                f"The reward model {key!r} has {labels} outputs; only the first would be read.",
                "Train or export it with num_labels = 1.",
            )
        layer = score_layer(judge)
        saved = None if layer is None else _saved_like(judge, layer)
        if layer is not None and saved is not None and not torch.equal(saved, layer.weight.cpu()):
            return check.fail(
                f"{key}: head differs from {judge.path}",
                f"The head of the reward model {key!r} is not that of its checkpoint: it was "
                "freshly initialised, or lost while loading.",
                "Load it with kleash.models.reward_model.ClassifierReward from what was saved by "
                "AutoModelForSequenceClassification.",
            )
    return _done(trial, check, "heads as saved")


def alone(trial: Trial) -> Finding:
    """A text's score does not depend on what is scored beside it."""
    check = Check("reward_model.alone", "each score is that of the text scored alone")
    rows = _sample(trial)
    prompts, responses, columns = _texts(trial, rows)
    worst, where = 0.0, ""
    for key, (judge, _) in trial.components.reward.rewards.items():
        together = judge.score(prompts, responses, columns)
        for i, row in enumerate(rows):
            gap = _relative(judge.score(*_texts(trial, [row]))[0], together[i])
            if gap > worst:
                worst, where = gap, key
    measured = f"{worst:.2g} apart at the worst of {len(responses)} texts"
    if worst <= _limit(trial):
        return check.ok(measured)
    judge = dict(classifiers(trial)).get(where)
    return check.fail(
        measured,
        f"The score of {where!r} depends on the batch: "
        + ("it compares responses with each other." if judge is None else "padding is read."),
        f"Let the function of reward_models.{where}.callable score each response by itself."
        if judge is None
        else f"Set pad_token_id: {judge.tokenizer.pad_token_id} in {judge.path}/config.json.",
    )


def last_token(trial: Trial) -> Finding:
    """The score is read at the last real token of the text."""
    check = Check("reward_model.last_token", "the score is that of the last token of the text")
    rows = _sample(trial)
    rows = [*rows, rows[0]]
    prompts, responses, columns = _texts(trial, rows)
    worst, where = 0.0, ""
    for key, judge in classifiers(trial):
        layer = score_layer(judge)
        if layer is None:
            continue
        # A judge that takes a word for padding looks past it at the end of a text.
        pad = judge.model.config.pad_token_id
        word = "" if pad is None else judge.tokenizer.decode([pad], skip_special_tokens=True)
        longer = [*responses[:-1], f"{responses[0]} {word}".rstrip()]
        scores = judge.score(prompts, longer, columns)
        for i, (prompt, response) in enumerate(zip(prompts, longer, strict=True)):
            row = {name: values[i] for name, values in columns.items()}
            ids = judge.encode(prompt, response, row=row)
            gap = _relative(_score_at_end(judge, layer, ids), scores[i])
            if gap > worst:
                worst, where = gap, key
    measured = f"{worst:.2g} apart at the worst of {len(responses)} texts"
    if worst <= _limit(trial):
        return _done(trial, check, measured)
    judge = dict(classifiers(trial))[where]
    pad, own = judge.model.config.pad_token_id, judge.tokenizer.pad_token_id
    other = " to a token that no text contains" if own in (None, pad) else f": {own}"
    return check.fail(
        f"{measured}; pad_token_id = {pad}",
        f"The score of {where!r} is read at another token than the last: its pad_token_id = {pad} "
        "is a word of the text, or padding was counted as text.",
        f"In {judge.path}/config.json, set pad_token_id{other}.",
    )


def bos(trial: Trial) -> Finding:
    """At most one beginning-of-sequence token."""
    check = Check("reward_model.bos", "one beginning-of-sequence token at most")
    prompts, responses, columns = _texts(trial, _sample(trial)[:1])
    row = {name: values[0] for name, values in columns.items()}
    for key, judge in classifiers(trial):
        begin = cast(int | None, judge.tokenizer.bos_token_id)
        if begin is None or begin == judge.tokenizer.eos_token_id:
            continue
        ids = judge.encode(prompts[0], responses[0], row=row)
        leading = next((i for i, token in enumerate(ids) if token != begin), len(ids))
        if leading > 1 or begin in ids[leading:]:
            return check.fail(
                f"{key}: {ids.count(begin)} of {judge.tokenizer.bos_token!r}",
                f"The reward model {key!r} reads a doubled BOS: its template or the prompts write "
                f"{judge.tokenizer.bos_token!r} and its tokenizer adds another.",
                f"Remove {judge.tokenizer.bos_token!r} from reward_models.{key}.template and from "
                "the prompts.",
            )
    return _done(trial, check, "none doubled")


def template(trial: Trial) -> Finding:
    """Prompt and response are read once each: a longer one lengthens the text by as much."""
    check = Check("reward_model.template", "the text holds prompt and response once each")
    rows = _sample(trial)
    prompts, responses, columns = _texts(trial, rows)
    shortest = min(range(len(rows)), key=lambda i: len(text_of(prompts[i])))
    prompt, response = prompts[shortest], responses[0]
    row = {name: values[shortest] for name, values in columns.items()}
    for key, judge in classifiers(trial):
        plain = len(judge.encode(prompt, response, row=row))
        for what in ("prompt", "response"):
            more = _bare_words(judge, what, prompt, response)
            if not more:
                continue
            longer = _lengthened(prompt, more) if what == "prompt" else prompt
            text = f"{response} {more}" if what == "response" else response
            added = len(judge.encode(longer, text, row=row)) - plain
            times = round(added / len(_ids(judge, more)))
            if times != 1:
                return check.fail(
                    f"{key}: the {what} {times} times",
                    f"The template of the reward model {key!r} is applied twice, or writes the "
                    f"{what} {times} times."
                    if times
                    else f"The reward model {key!r} does not read the {what}.",
                    f"Write {{prompt}}{{response}} once each in reward_models.{key}.template, and "
                    "give prompts without a template of their own.",
                )
    return _done(trial, check, "once each")


def dropped_tokens(trial: Trial) -> Finding:
    """What the reward reads has every token that was written but the end and padding."""
    check = Check("reward_model.dropped_tokens", "only the end and padding are dropped from texts")
    policy, rollout = trial.components.policy, trial.rollout
    special = {int(number) for number in policy.tokenizer.all_special_ids}
    seen = special - {*policy.stop_ids, policy.pad_id}
    lost: Counter[str] = Counter()
    for row, text in enumerate(trial.written.texts):
        ids = cast(list[int], rollout.response_ids[row][rollout.response_mask[row]].tolist())
        for number in seen & set(ids):
            name = str(policy.tokenizer.convert_ids_to_tokens(number))
            lost[name] += max(0, ids.count(number) - text.count(name))
    if not lost.total():
        return check.ok(f"{len(trial.written.texts)} responses")
    names = [f"{name!r} ({times} times)" for name, times in lost.most_common() if times]
    return check.warn(
        f"{lost.total()} tokens dropped",
        f"The reward does not see special tokens that the policy writes: {some(names)}.",
        "Read them in a callable's column completions_with_special_tokens, or decode responses "
        "with kleash.rollout.sampling.response_texts, which keeps them.",
    )


def probes(trial: Trial) -> Finding:
    """Replies that no good judge prefers: do they win?"""
    check = Check("reward_model.probes", "no empty or repeated reply beats the policy's own")
    written = trial.written
    own = written.raw_scores.double().cpu()
    first = {text_of(prompt): row for row, prompt in reversed(list(enumerate(written.prompts)))}
    rows = sorted(first.values())[:8]
    asked, _, columns = _texts(trial, rows)
    prompts = [text_of(prompt) for prompt in asked]
    bar = float(own.quantile(0.99))
    winners: list[str] = []
    for label, replies in _probe_replies(trial, prompts):
        scores = trial.components.reward.score(asked, replies, columns | _tokens(trial, replies))
        mean = float(scores.double().mean())
        if mean > bar + 1e-6 * (1 + abs(bar)):
            winners.append(f"{label} ({mean:.3g})")
    measured = f"99 % of the policy's replies score at most {bar:.3g}"
    if not winners:
        return check.ok(f"{measured}; no probe does better")
    return check.warn(
        measured,
        f"The reward prefers replies that no one wants: {some(winners)}; a policy off the leash "
        "will find them.",
        "Train the reward against such replies, add a reward_models entry that punishes them, or "
        "keep leash.target_kl small.",
    )


def preferences(trial: Trial, pairs: Sequence[Pair]) -> Finding:
    """Accuracy, spread and taste for length on pairs that people judged."""
    check = Check("reward_model.preferences", "accuracy above chance; scores not led by length")
    if not pairs:
        return check.skip("No preference pairs were given (--pairs FILE).")
    prompts = [pair.prompt for pair in pairs]
    names = dict.fromkeys(name for pair in pairs for name in pair.columns)
    further = {name: [pair.columns.get(name) for pair in pairs] for name in names}

    def scored(replies: list[str]) -> Float[Tensor, " pair"]:
        columns = further | _tokens(trial, replies)
        return trial.components.reward.score(prompts, replies, columns).double()

    chosen = scored([pair.chosen for pair in pairs])
    rejected = scored([pair.rejected for pair in pairs])
    right = float(((chosen > rejected).double() + 0.5 * (chosen == rejected)).mean())
    lengths = [len(t.split()) for p in pairs for t in (p.chosen, p.rejected)]
    scores = torch.stack([chosen, rejected], dim=1).flatten()
    lead = _correlation(torch.tensor(lengths).double(), scores)
    spread = float(scores.std())
    measured = f"{right:.0%} of {len(pairs)} right, spread {spread:.3g}, length {lead:+.2f}"
    error = 0.5 / len(pairs) ** 0.5
    if right < 0.5 - 2 * error or spread == 0:
        return check.fail(
            measured,
            "The reward prefers what people rejected: its sign, its template or its pairs are the "
            "wrong way round."
            if spread
            else "The reward gives every reply the same score.",
            "Check reward_models weights and template, and the file's `chosen` and `rejected`.",
        )
    if right < 0.5 + error or abs(lead) > 0.8:
        return check.warn(
            measured,
            "The reward hardly knows better than chance."
            if right < 0.5 + error
            else "The reward goes by length: the policy will write ever longer (or shorter).",
            "Train the reward on more, or length-balanced, pairs.",
        )
    return check.ok(measured)


def read_pairs(path: Path) -> list[Pair]:
    """Pairs of a file of rows with `prompt` (or `messages`), `chosen` and `rejected`.

    Raises:
        PromptError: the file or a row cannot be read; the row is named.
    """
    if not path.is_file():
        raise PromptError(
            f"expected preference pairs at {str(path)!r}, got no file: check the path"
        )
    pairs: list[Pair] = []
    for where, row in file_rows(path):
        replies = [row.get(name) for name in ("chosen", "rejected")]
        if not all(isinstance(reply, str) for reply in replies):
            raise PromptError(
                f"expected 'chosen' and 'rejected' as text on {where}, got "
                f"{', '.join(repr(name) for name in row) or 'no key'}"
            )
        chosen, rejected = cast(list[str], replies)
        columns = columns_of_row(row, where)
        further = {k: v for k, v in columns.items() if k not in ("chosen", "rejected")}
        pairs.append(Pair(prompt_content(row, where), chosen, rejected, further))
    return pairs


def classifiers(trial: Trial) -> Iterator[tuple[str, ClassifierReward]]:
    """The rewards that are sequence classifiers, by name."""
    for key, (judge, _) in trial.components.reward.rewards.items():
        if isinstance(judge, ClassifierReward):
            yield key, judge


def score_layer(judge: ClassifierReward) -> nn.Linear | None:
    """The linear layer on the last state; None for an architecture with another kind of head."""
    layer = getattr(judge.model, "score", None)
    return layer if isinstance(layer, nn.Linear) else None


def _saved_like(judge: ClassifierReward, layer: nn.Linear) -> Tensor | None:
    """The head as its checkpoint has it; None where there is no local file with it."""
    saved = saved_head(Path(judge.path), judge.adapter).get("score.weight")
    return None if saved is None else saved.to(layer.weight.dtype)


@torch.no_grad()
def _score_at_end(
    judge: ClassifierReward, layer: nn.Linear, ids: Sequence[int]
) -> Float[Tensor, ""]:
    text = torch.tensor([list(ids)], device=judge.model.device)
    states = judge.model.base_model(input_ids=text)[0]
    return layer(states[0, -1]).float().cpu()[0]


def _probe_replies(trial: Trial, prompts: list[str]) -> list[tuple[str, list[str]]]:
    """Empty, flattering, echoing, and the favourite word of the best replies over and over."""
    scores = trial.written.raw_scores
    best = scores.argsort(descending=True)[: max(1, len(scores) // 8)].tolist()
    texts = trial.written.texts
    everywhere = Counter(word for text in texts for word in text.split())
    at_best = Counter(word for row in best for word in texts[row].split())
    often = [word for word, count in at_best.items() if count > 1]
    lift = {word: at_best[word] / (1 + everywhere[word]) for word in often}
    lifted = sorted(often, key=lift.__getitem__, reverse=True)[:2]
    words = dict.fromkeys([word for word, _ in at_best.most_common(2)] + lifted)
    return [
        ("an empty reply", [""] * len(prompts)),
        ("'thanks thanks thanks …'", [" ".join(["thanks"] * 12)] * len(prompts)),
        ("the prompt repeated", prompts),
        *((f"'{w} {w} {w} …'", [" ".join([w] * 12)] * len(prompts)) for w in words),
    ]


def _sample(trial: Trial) -> list[int]:
    """Numbers of responses of different lengths, so that a batch of them is padded."""
    responses = trial.written.texts
    order = sorted(range(len(responses)), key=lambda row: len(responses[row]))
    return order[:: max(1, len(order) // _TEXTS)][:_TEXTS]


def _texts(
    trial: Trial, rows: Sequence[int]
) -> tuple[list[Content], list[str], dict[str, list[Any]]]:
    """Prompts, responses and columns of some rows of the batch."""
    written = trial.written
    columns = {name: [values[row] for row in rows] for name, values in written.columns.items()}
    return [written.prompts[r] for r in rows], [written.texts[r] for r in rows], columns


def _tokens(trial: Trial, replies: Sequence[str]) -> dict[str, list[Any]]:
    """The columns that a reply has as the policy writes it, for replies that it did not write."""
    tokenizer = trial.components.policy.tokenizer
    ids = [tokenizer(reply, add_special_tokens=False)["input_ids"] for reply in replies]
    return {"completion_ids": ids, "completions_with_special_tokens": list(replies)}


def _done(trial: Trial, check: Check, measured: str) -> Finding:
    if not any(True for _ in classifiers(trial)):
        return check.skip("No reward is a classifier.")
    return check.ok(measured)


def _limit(trial: Trial) -> float:
    halves = [
        judge.model.dtype not in (torch.float32, torch.float64) for _, judge in classifiers(trial)
    ]
    return 0.05 if any(halves) else _SAME_SCORE


def _bare_words(judge: ClassifierReward, what: str, prompt: Content, response: str) -> str:
    """Some words to lengthen a text by; its own, for a tokenizer that knows few."""
    text = text_of(prompt) if what == "prompt" else response
    words = " ".join(text.split()[:4]) or "and so on"
    return words if len(_ids(judge, words)) > 0 else ""


def _ids(judge: ClassifierReward, text: str) -> list[int]:
    return cast(list[int], judge.tokenizer(text, add_special_tokens=False)["input_ids"])


def _lengthened(prompt: Content, more: str) -> Content:
    if isinstance(prompt, str):
        return f"{prompt} {more}"
    return [*prompt[:-1], {**prompt[-1], "content": f"{content_text(prompt[-1])} {more}"}]


def _relative(one: Float[Tensor, ""], other: Float[Tensor, ""]) -> float:
    return float((one - other).abs()) / (1 + abs(float(other)))


def _correlation(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> float:
    both = torch.stack([x, y])
    if bool((both.std(dim=1) == 0).any()):
        return 0.0
    return float(torch.corrcoef(both)[0, 1])
