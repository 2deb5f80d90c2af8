"""The audit, from top to bottom: open, write, read, account, conclude.

1. both checkpoints are opened and compared token by token        pairs
2. prompts (texts, responses) are read window by window           sources
3. a model writes, where it is to write                           writing
4. both models read every token: exact KL, both directions        records
5. each batch goes to the disk and into the running account       partfile, account
6. intervals decide when to stop and what the gate says           intervals
7. the worst responses are scored once more                    summary, details
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from kleash import __version__
from kleash.auditing.accumulator import AuditAccumulator
from kleash.auditing.confidence_intervals import ConfidenceInterval, Kind, clusters_for, decide
from kleash.auditing.generation import Written, write_responses
from kleash.auditing.inputs import Item, Source, pack, windows
from kleash.auditing.model_pair import ModelPair
from kleash.auditing.model_sources import identity_of
from kleash.auditing.notes import (
    begins_twice,
    choose_sampling,
    notes_on_left_out,
    notes_on_models,
    notes_on_parts,
    notes_on_settings,
    notes_on_source,
)
from kleash.auditing.options import AuditOptions
from kleash.auditing.padding import (
    FLOOR_RESPONSES,
    require_padding_invariance,
    require_sampler_agreement,
)
from kleash.auditing.partial_results import Key, PartFile
from kleash.auditing.result import EXIT_CODES, Audit, Gate, Part, Precision
from kleash.auditing.run_context import CheckpointInRun, checkpoint_in_run
from kleash.auditing.summary import floor_of, part_of, texts_of_ids, with_details
from kleash.auditing.token_classes import token_classes
from kleash.auditing.token_records import By, Record, score_items
from kleash.errors import RunError
from kleash.models.policy import Policy
from kleash.models.vocabulary import require_known_ids, require_shared_ending
from kleash.storage.atomic_files import replace_file

WINDOW = 512
"""Prompts or texts that are sorted by length together."""
SEQUENTIAL_WINDOW = 32
"""The same where the interval is tested after each window."""
PARTIAL_SECONDS = 60
"""How often an unfinished result is written."""


@dataclass(frozen=True)
class Progress:
    """How far an audit has come."""

    by: By
    done: int
    """Prompts or texts."""
    total: int
    headline: ConfidenceInterval
    """KL so far."""


Watch = Callable[[Progress], None]


def audit_pair(
    pair: ModelPair,
    source: Source,
    options: AuditOptions,
    watch: Watch | None = None,
) -> Audit:
    """Measure how far the policy is from the reference.

    Args:
        pair: the two models, from `comparable_pair`.
        source: prompts to answer, texts, or given responses.
        options: what to measure; `output` is a directory for the results, so that an audit that
            was stopped can be resumed, None keeps nothing on disk.
        watch: called after each batch.

    Raises:
        PromptError: if the file cannot be used, before any model runs.
        ModelError: if padding changes what a model reads, or its sampler what it writes.
        RunError: if `output` cannot be written, or holds another audit.
        NonFiniteError: if a model gives NaN.
    """
    run = _Run(pair, source, options, watch or (lambda _: None))
    if options.output is not None:
        begin = PartFile.resume if options.resume else PartFile.create
        run.part_file = begin(options.output, run.header())
    try:
        for by in run.writers():
            run.read(by)
    except KeyboardInterrupt:
        run.write_partial()
        raise
    return run.conclude()


class _Run:
    """An audit under way."""

    def __init__(
        self, pair: ModelPair, source: Source, options: AuditOptions, watch: Watch
    ) -> None:
        self.pair = pair
        self.part_file: PartFile | None = None
        self._watch = watch
        self._identities = identity_of(pair.policy), identity_of(pair.reference)
        sampling = choose_sampling(self._identities, options, source.kind)
        self.options, self._sampling_notes = sampling.options, sampling.notes
        self._spec = sampling.spec
        self.source = replace(
            source, max_new_tokens=sampling.room, chat_template=sampling.options.chat_template
        )
        self._classes = token_classes(pair.policy.tokenizer, pair.policy.words)
        self._accounts: list[AuditAccumulator] = []
        for by, model in self._who_writes():
            if pair.vocabulary is not None and by in ("policy", "reference"):
                require_shared_ending(model.tokenizer, model.stop_ids, pair.vocabulary, model.path)
        # Also the check of the whole file, before any model runs.
        self._total = self._doubled = 0
        for item in self._items():
            self._total += 1
            self._doubled += begins_twice(item, pair.policy.tokenizer)
        self._written = time.monotonic()

    def header(self) -> dict[str, Any]:
        """All that the scored responses depend on; another threshold may be tried on them."""
        policy, reference = self._identities
        settings = self._settings()
        del settings["fail_above"], settings["keep"]
        return {
            "audit": "kleash.responses/1",
            "version": __version__,
            "policy": asdict(policy),
            "reference": asdict(reference),
            **settings,
        }

    def writers(self) -> list[By]:
        """Whose responses are read, in order."""
        return [by for by, _ in self._who_writes()]

    def _who_writes(self) -> list[tuple[By, Policy]]:
        match self.source.kind:
            case "prompts":
                both: list[tuple[By, Policy]]
                both = [("policy", self.pair.policy), ("reference", self.pair.reference)]
                return both if self.options.both else both[:1]
            case "texts":
                return [("text", self.pair.policy)]
            case "responses":
                return [("given", self.pair.policy)]

    def read(self, by: By) -> None:
        """Go through the source once, until its end or until the interval is narrow enough."""
        account = AuditAccumulator(
            by, self._classes, keep=self.options.keep, seed=self.options.seed
        )
        self._accounts.append(account)
        sequential = self.options.precision is not None
        size = SEQUENTIAL_WINDOW if sequential else WINDOW
        done = number = 0
        for window_number, window in enumerate(windows(self._ordered(), size)):
            if window_number == 0 and len(self._accounts) == 1:
                for model in (self.pair.policy, self.pair.reference):
                    require_padding_invariance(window, model, budget=self.options.batch_tokens)
            for batch_number, batch in enumerate(self._batches(window, by)):
                key = (by, window_number, batch_number)
                records = self._records(key, batch, number)
                number += len(records)
                done += len(batch)
                account.add(records)
                glimpse = account.glimpse(account.headline, self.options.per, kind=self._kind)
                self._watch(Progress(by, done, self._total, glimpse))
            account.close_window()
            self._write_now_and_then()
            # Only between windows: within one, batches come longest first.
            if sequential and self._narrow(account):
                break

    def conclude(self) -> Audit:
        """The finished audit."""
        parts = [
            with_details(part, account, self.pair, temperature=self._spec.temperature)
            for part, account in zip(self._parts(), self._accounts, strict=True)
        ]
        return self._audit(parts, complete=True)

    def write_partial(self) -> None:
        """Write what is known so far, as an audit that is not complete."""
        for account in self._accounts:
            account.close_window()
        output = self.options.output
        if output is None or not self._accounts or not self._accounts[0].moments.clusters:
            return
        self._accounts = [account for account in self._accounts if account.moments.clusters]
        found = self._audit(self._parts(), complete=False)
        replace_file(output / "audit.json", found.to_json() + "\n")

    def _write_now_and_then(self) -> None:
        if time.monotonic() - self._written > PARTIAL_SECONDS:
            self.write_partial()
            self._written = time.monotonic()

    def _items(self) -> Iterator[Item]:
        tokenizer, words = self.pair.policy.tokenizer, self.pair.policy.words
        for item in self.source.items(tokenizer, self.pair.context):
            where = f"row {item.cluster + 1} of {str(self.source.path)!r}"
            require_known_ids((*item.prompt_ids, *item.response_ids), words, tokenizer, where)
            yield item

    def _ordered(self) -> Iterator[Item]:
        """In the file's order; at random where the first ones must stand for all."""
        if self.options.precision is None:
            return self._items()
        clusters: dict[int, list[Item]] = {}
        for item in self._items():
            clusters.setdefault(item.cluster, []).append(item)
        order = list(clusters)
        random.Random(self.options.seed).shuffle(order)
        return (item for cluster in order for item in clusters[cluster])

    def _batches(self, window: Sequence[Item], by: By) -> list[list[Item]]:
        each = self.options.responses_per_prompt if by in ("policy", "reference") else 1

        def width(item: Item) -> int:
            written = len(item.response_ids) or self._spec.max_new_tokens
            return each * (len(item.prompt_ids) + written)

        return pack(window, width, self.options.batch_tokens)

    def _records(self, key: Key, batch: Sequence[Item], first_number: int) -> list[Record]:
        saved = None if self.part_file is None else self.part_file.take(key)
        if saved is not None:
            return saved
        by, window, number = key
        written: list[Written] = []
        writer = self.pair.policy if by == "policy" else self.pair.reference
        if by in ("policy", "reference"):
            written = write_responses(
                writer,
                batch,
                responses_per_prompt=self.options.responses_per_prompt,
                spec=self._spec,
                seed=f"{self.options.seed}/{by}/{window}/{number}",
            )
        records = score_items(
            [one.item for one in written] or batch,
            self.pair,
            first_number=first_number,
            temperature=self._spec.temperature,
            budget=self.options.batch_tokens,
            agreement=by in ("text", "given"),
        )
        if written:
            require_sampler_agreement(written, records, writer, forward=by == "policy")
        if self.part_file is not None:
            self.part_file.append(key, records)
        return records

    @property
    def _kind(self) -> Kind:
        return "fixed" if self.options.precision is None else "anytime"

    def _headline(self, account: AuditAccumulator) -> ConfidenceInterval:
        return account.mean(account.headline, self.options.per, kind=self._kind)

    def _narrow(self, account: AuditAccumulator) -> bool:
        half = self._headline(account).half_width
        # Before some thirty prompts the spread of prompts is hardly known.
        enough = account.moments.clusters >= SEQUENTIAL_WINDOW
        return enough and half is not None and half <= (self.options.precision or 0.0)

    def _parts(self) -> list[Part]:
        return [
            part_of(
                account,
                kind=self._kind,
                floor=floor_of(account, self.pair, budget=self.options.batch_tokens),
            )
            for account in self._accounts
        ]

    def _audit(self, parts: list[Part], *, complete: bool) -> Audit:
        headline = self._headline(self._accounts[0])
        policy, reference = self._identities
        standing, unread = self._standing()
        return Audit(
            policy=policy,
            reference=reference,
            settings=self._settings(),
            parts=parts,
            complete=complete,
            notes=list(dict.fromkeys([*self._notes(parts), *unread])),
            precision=self._precision(headline),
            gate=self._gate(headline),
            token_texts=texts_of_ids(parts, self.pair.policy.tokenizer),
            standing=standing,
        )

    def _precision(self, headline: ConfidenceInterval) -> Precision | None:
        asked, half = self.options.precision, headline.half_width
        if asked is None:
            return None
        return Precision(
            asked=asked,
            per=self.options.per,
            reached=half is not None and half <= asked,
            half_width=half,
            prompts_needed=clusters_for(asked, headline),
        )

    def _gate(self, headline: ConfidenceInterval) -> Gate | None:
        threshold = self.options.fail_above
        if threshold is None:
            return None
        decision = decide(headline, threshold)
        return Gate(threshold, self.options.per, decision, EXIT_CODES[decision])

    def _notes(self, parts: Sequence[Part]) -> list[str]:
        drawn = self._accounts[0].drawn(FLOOR_RESPONSES)
        return [
            *notes_on_source(self.source, self._doubled, self._total, self.pair.policy.tokenizer),
            *self._sampling_notes,
            *notes_on_models(self.pair, self._identities),
            *notes_on_left_out(self.pair, drawn, temperature=self._spec.temperature),
            *notes_on_parts(parts),
            *(notes_on_settings(self.pair, len(parts)) if self.source.kind == "prompts" else ()),
        ]

    def _standing(self) -> tuple[CheckpointInRun | None, list[str]]:
        """Where the policy stands in its run; a sentence where its run cannot be read."""
        if self.source.kind != "prompts":
            return None, []
        try:
            return checkpoint_in_run(*self._identities, temperature=self._spec.temperature), []
        except RunError as error:
            return None, [f"The run of this checkpoint could not be read: {error}."]

    def _settings(self) -> dict[str, Any]:
        source = self.source
        return {
            "source": source.kind,
            "file": source.path.name,
            "file_sha256": source.sha256(),
            "count": self._total,
            **self.options.as_settings(),
        }
