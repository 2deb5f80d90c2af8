"""Sentences that a reader of an audit's numbers must know."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from kleash.auditing.inputs import Item, Source
from kleash.auditing.model_pair import ModelPair, same_weights
from kleash.auditing.options import (
    MAX_NEW_TOKENS,
    TEMPERATURE,
    AuditOptions,
    SourceKind,
    with_sampling,
)
from kleash.auditing.result import Part
from kleash.auditing.run_context import RunSampling, sampling_of_run
from kleash.auditing.token_records import Record
from kleash.auditing.worst_responses import left_out_mass
from kleash.errors import RunError, UsageError
from kleash.models.policy import Identity
from kleash.rollout.sampling import SamplingSpec, overridden_settings


@dataclass(frozen=True)
class AuditSampling:
    """How an audit samples, and what is to be said of it."""

    options: AuditOptions
    """With the sampling settings in force."""
    spec: SamplingSpec
    room: int
    """Tokens to leave for a response in the context."""
    notes: list[str]


def choose_sampling(
    identities: tuple[Identity, Identity], options: AuditOptions, kind: SourceKind
) -> AuditSampling:
    """Settings that were given, else those of the checkpoint's run, else the general defaults.

    Args:
        identities: policy and reference; the policy's run comes first.
        options: what was asked for.
        kind: responses are sampled for prompts alone, and only they follow the run.

    Raises:
        ConfigError: a setting cannot be.
        UsageError: a chat template is named, and there are no messages to write with it.
    """
    if options.chat_template is not None and kind == "texts":
        raise UsageError(
            f"expected prompts or responses for the chat template {options.chat_template!r}, got "
            "texts, which are read as they are: leave chat_template out"
        )
    runs: list[RunSampling] = []
    notes: list[str] = []
    for identity in identities if kind == "prompts" else ():
        try:
            found = sampling_of_run(identity)
        except RunError as error:
            notes.append(f"The run of this checkpoint could not be read: {error}.")
            continue
        if found is not None and found not in runs:
            runs.append(found)
    first = runs[0] if runs else RunSampling("", None, None)
    chosen = with_sampling(
        options,
        temperature=TEMPERATURE if first.temperature is None else first.temperature,
        max_new_tokens=MAX_NEW_TOKENS if first.max_new_tokens is None else first.max_new_tokens,
        chat_template=first.chat_template,
    )
    assert chosen.temperature is not None and chosen.max_new_tokens is not None
    spec = SamplingSpec(max_new_tokens=chosen.max_new_tokens, temperature=chosen.temperature)
    for run in runs:
        notes += _differences(run, chosen)
    return AuditSampling(chosen, spec, spec.max_new_tokens if kind == "prompts" else 0, notes)


def begins_twice(item: Item, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text begins with two BOS: its own and the tokenizer's."""
    begin = tokenizer.bos_token_id
    ids = (*item.prompt_ids[:2], *item.response_ids[:1])[:2]
    return begin is not None and begin != tokenizer.eos_token_id and ids == (begin, begin)


def notes_on_source(
    source: Source, doubled: int, total: int, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """What the texts are, and what is wrong with them."""
    notes: list[str] = []
    if source.kind == "responses":
        notes.append(
            "The responses were given. Their mean KL is the policy's own only if the policy wrote "
            "them, at this temperature and without cutting its distribution."
        )
    if source.kind == "texts":
        notes.append(
            "The texts were given: each KL compares next-token distributions along them, not along "
            "what either model would write."
        )
        if source.path.suffix == ".txt":
            notes.append(
                "The file is one document cut into stretches. Neighbours resemble each other, so "
                "the intervals are somewhat too narrow; separate texts in JSON lines fix that."
            )
    if doubled:
        notes.append(
            f"{doubled:,} of {total:,} {source.kind} begin with a doubled BOS: the text has "
            f"{tokenizer.bos_token!r} and the tokenizer adds another. Remove it from the file."
        )
    return notes


def notes_on_models(pair: ModelPair, identities: tuple[Identity, Identity]) -> list[str]:
    """What the two models have in common."""
    notes = [] if pair.vocabulary is None else list(pair.vocabulary.roles)
    if same_weights(*identities):
        notes.append("Both checkpoints hold the same weights.")
    return notes


def notes_on_left_out(pair: ModelPair, drawn: Sequence[Record], *, temperature: float) -> list[str]:
    """Which tokens only one model has, and how likely it holds them."""
    shared = pair.vocabulary
    if shared is None:
        return []
    notes: list[str] = []
    sides = (pair.policy, shared.policy_only), (pair.reference, shared.reference_only)
    for (model, tokens), rows in zip(sides, shared.rows, strict=True):
        if not tokens:
            continue
        mass = left_out_mass(drawn, model, shared=shared.words, rows=rows, temperature=temperature)
        names = ", ".join(map(repr, tokens[:3])) + (" …" if len(tokens) > 3 else "")
        notes.append(
            f"{len(tokens)} of the tokens of {model.path!r} ({names}) are not the other model's: "
            f"both distributions are those over the {shared.words:,} shared tokens. It gives "
            f"the others {mass:.2g} of its probability."
        )
    return notes


def notes_on_parts(parts: Sequence[Part]) -> list[str]:
    """Where an interval or a mean promises too much."""
    notes: list[str] = []
    for part in parts:
        if part.tail.heavy:
            notes.append(
                f"Heavy tail ({part.by}): a few responses carry the mean, so the intervals promise "
                "more than they hold. Read the worst responses, and sample more."
            )
        if part.verdict == "not resolvable":
            notes.append(
                f"Not resolvable ({part.by}): the KL is below 3 times what rounding alone makes. "
                "Compare in float64, or say that no difference was found."
            )
    return notes


def notes_on_settings(pair: ModelPair, writers: int) -> list[str]:
    """Sampling settings of the models' own files that do not apply here."""
    notes: list[str] = []
    for model in (pair.policy, pair.reference)[:writers]:
        ignored = overridden_settings(model)
        if ignored:
            names = ", ".join(f"{name} = {value}" for name, value in ignored.items())
            notes.append(f"Sampling settings of {model.path!r} were ignored: {names}.")
    return notes


def _differences(run: RunSampling, options: AuditOptions) -> list[str]:
    pairs = (
        ("max_new_tokens", run.max_new_tokens, options.max_new_tokens),
        ("temperature", run.temperature, options.temperature),
    )
    found = [
        f"{name} = {here:g} here and {there:g} in the run"
        for name, there, here in pairs
        if there is not None and there != here
    ]
    if run.chat_template != options.chat_template:
        here, there = (name or "the default" for name in (options.chat_template, run.chat_template))
        found.append(f"chat_template = {here} here and {there} in the run")
    if not found:
        return []
    return [
        f"Sampled otherwise than the run {run.run!r} of this checkpoint: {', '.join(found)}. "
        "Its KL per response is not the run's."
    ]
