"""The audit, from top to bottom: open, write, read, account, conclude.

1. both checkpoints are opened and compared token by token        pairs
2. prompts (texts, responses) are read window by window           sources
3. a model writes, where it is to write                           writing
4. both models read every token: exact KL, both directions        records
5. each batch goes to the disk and into the running account       partfile, account
6. intervals decide when to stop and what the gate says           intervals
7. the worst responses are looked at once more                    summary, details
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kleash import __version__
from kleash.auditing.accumulator import AuditAccumulator
from kleash.auditing.confidence_intervals import ConfidenceInterval, Kind, clusters_for, decide
from kleash.auditing.generation import write_responses
from kleash.auditing.inputs import Item, Source, pack, windows
from kleash.auditing.model_pair import ModelPair, same_weights
from kleash.auditing.partial_results import Key, PartFile
from kleash.auditing.result import EXIT_CODES, Audit, Gate, Part, Per, Precision
from kleash.auditing.run_context import Standing, standing_of
from kleash.auditing.summary import floor_of, part_of, texts_of_ids, with_details
from kleash.auditing.token_classes import token_classes
from kleash.auditing.token_records import By, Record, score_items
from kleash.errors import ConfigError, RunError
from kleash.models.policy import Identity, Policy
from kleash.rollout.sampling import SamplingSpec, overridden_settings
from kleash.storage.atomic_files import replace_file

WINDOW = 512
"""Prompts or texts that are sorted by length together."""
SEQUENTIAL_WINDOW = 32
"""The same where the interval is looked at after each window."""
PARTIAL_SECONDS = 60
"""How often an unfinished result is written."""


@dataclass(frozen=True)
class Settings:
    """What an audit measures and how it samples."""

    both: bool = False
    """Let the reference write as well."""
    temperature: float = 1.0
    max_new_tokens: int = 64
    responses_per_prompt: int = 1
    seed: int = 0
    batch_tokens: int = 8192
    precision: float | None = None
    """Stop when the headline's interval reaches no further than this to either side."""
    fail_above: float | None = None
    per: Per = "token"
    """What `precision` and `fail_above` are per."""
    keep: int = 40
    """Responses and tokens of each kind to look at closely."""

    def __post_init__(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            ConfigError: naming the setting.
        """
        SamplingSpec(max_new_tokens=self.max_new_tokens, temperature=self.temperature)
        for name, least in (("responses_per_prompt", 1), ("batch_tokens", 1), ("keep", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"expected {name} of at least {least}, got {getattr(self, name)}")
        if self.precision is not None and not 0 < self.precision < float("inf"):
            raise ConfigError(f"expected a precision above 0, got {self.precision}")
        if self.fail_above is not None and not 0 <= self.fail_above < float("inf"):
            raise ConfigError(f"expected fail_above of at least 0, got {self.fail_above}")


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
    settings: Settings,
    *,
    into: Path | None = None,
    resume: bool = False,
    watch: Watch | None = None,
) -> Audit:
    """Measure how far the policy is from the reference.

    Args:
        pair: the two models.
        source: prompts to answer, texts, or given responses.
        settings: what to measure.
        into: a directory for the results, so that an audit that was stopped can be resumed;
            None keeps nothing on disk.
        resume: go on with what `into` holds.
        watch: called after each batch.

    Raises:
        PromptError: if the file cannot be used, before any model runs.
        RunError: if `into` cannot be written, or holds another audit.
        NonFiniteError: if a model gives NaN.
    """
    run = _Run(pair, source, settings, into, watch or (lambda _: None))
    header = run.header()
    if into is not None:
        run.part_file = (PartFile.resume if resume else PartFile.create)(into, header)
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
        self, pair: ModelPair, source: Source, settings: Settings, into: Path | None, watch: Watch
    ) -> None:
        self.pair, self.source, self.settings, self.into = pair, source, settings, into
        self.part_file: PartFile | None = None
        self._watch = watch
        self._classes = token_classes(pair.policy.tokenizer, pair.policy.words)
        self._accounts: list[AuditAccumulator] = []
        self._identities = pair.policy.identity(), pair.reference.identity()
        # Also the check of the whole file, before any model runs.
        self._total = sum(1 for _ in self._items())
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
        """Who is read, in order."""
        match self.source.kind:
            case "prompts":
                return ["policy", "reference"] if self.settings.both else ["policy"]
            case "texts":
                return ["text"]
            case "responses":
                return ["given"]

    def read(self, by: By) -> None:
        """Go through the source once, until its end or until the interval is narrow enough."""
        account = AuditAccumulator(
            by, self._classes, keep=self.settings.keep, seed=self.settings.seed
        )
        self._accounts.append(account)
        sequential = self.settings.precision is not None
        size = SEQUENTIAL_WINDOW if sequential else WINDOW
        done = number = 0
        for window_number, window in enumerate(windows(self._ordered(), size)):
            for batch_number, batch in enumerate(self._batches(window, by)):
                key = (by, window_number, batch_number)
                records = self._records(key, batch, number)
                number += len(records)
                done += len(batch)
                account.add(records)
                glimpse = account.glimpse(account.headline, self.settings.per, kind=self._kind)
                self._watch(Progress(by, done, self._total, glimpse))
            account.close_window()
            self._write_now_and_then()
            # Only between windows: within one, batches come longest first.
            if sequential and self._narrow(account):
                break

    def conclude(self) -> Audit:
        """The finished audit."""
        parts = [
            with_details(part, account, self.pair, temperature=self.settings.temperature)
            for part, account in zip(self._parts(), self._accounts, strict=True)
        ]
        return self._audit(parts, complete=True)

    def write_partial(self) -> None:
        """Write what is known so far, as an audit that is not complete."""
        for account in self._accounts:
            account.close_window()
        if self.into is None or not self._accounts or not self._accounts[0].moments.clusters:
            return
        self._accounts = [account for account in self._accounts if account.moments.clusters]
        found = self._audit(self._parts(), complete=False)
        replace_file(self.into / "audit.json", found.to_json() + "\n")

    def _write_now_and_then(self) -> None:
        if time.monotonic() - self._written > PARTIAL_SECONDS:
            self.write_partial()
            self._written = time.monotonic()

    def _items(self) -> Iterator[Item]:
        return self.source.items(self.pair.policy.tokenizer, self.pair.context)

    def _ordered(self) -> Iterator[Item]:
        """In the file's order; at random where the first ones must stand for all."""
        if self.settings.precision is None:
            return self._items()
        clusters: dict[int, list[Item]] = {}
        for item in self._items():
            clusters.setdefault(item.cluster, []).append(item)
        order = list(clusters)
        random.Random(self.settings.seed).shuffle(order)
        return (item for cluster in order for item in clusters[cluster])

    def _batches(self, window: Sequence[Item], by: By) -> list[list[Item]]:
        each = self.settings.responses_per_prompt if by in ("policy", "reference") else 1

        def width(item: Item) -> int:
            written = len(item.response_ids) or self.settings.max_new_tokens
            return each * (len(item.prompt_ids) + written)

        return pack(window, width, self.settings.batch_tokens)

    def _records(self, key: Key, batch: Sequence[Item], first_number: int) -> list[Record]:
        saved = None if self.part_file is None else self.part_file.take(key)
        if saved is not None:
            return saved
        settings, (by, window, number) = self.settings, key
        written: Sequence[Item] = batch
        if by in ("policy", "reference"):
            written = write_responses(
                self.pair.policy if by == "policy" else self.pair.reference,
                batch,
                responses_per_prompt=settings.responses_per_prompt,
                spec=SamplingSpec(settings.max_new_tokens, settings.temperature),
                seed=f"{settings.seed}/{by}/{window}/{number}",
            )
        records = score_items(
            written,
            self.pair,
            first_number=first_number,
            temperature=settings.temperature,
            budget=settings.batch_tokens,
            agreement=by in ("text", "given"),
            device=self.pair.policy.device,
        )
        if self.part_file is not None:
            self.part_file.append(key, records)
        return records

    @property
    def _kind(self) -> Kind:
        return "fixed" if self.settings.precision is None else "anytime"

    def _headline(self, account: AuditAccumulator) -> ConfidenceInterval:
        return account.mean(account.headline, self.settings.per, kind=self._kind)

    def _narrow(self, account: AuditAccumulator) -> bool:
        half = self._headline(account).half_width
        # Before some thirty prompts the spread of prompts is hardly known.
        enough = account.moments.clusters >= SEQUENTIAL_WINDOW
        return enough and half is not None and half <= (self.settings.precision or 0.0)

    def _parts(self) -> list[Part]:
        return [
            part_of(account, kind=self._kind, floor=floor_of(account, self.pair))
            for account in self._accounts
        ]

    def _audit(self, parts: list[Part], *, complete: bool) -> Audit:
        settings, headline = self.settings, self._headline(self._accounts[0])
        precision = gate = None
        if settings.precision is not None:
            half = headline.half_width
            precision = Precision(
                asked=settings.precision,
                per=settings.per,
                reached=half is not None and half <= settings.precision,
                half_width=half,
                prompts_needed=clusters_for(settings.precision, headline),
            )
        if settings.fail_above is not None:
            decision = decide(headline, settings.fail_above)
            code = EXIT_CODES[decision]
            gate = Gate(settings.fail_above, settings.per, decision, code)
        policy, reference = self._identities
        notes = _notes(self.pair, self.source, parts, (policy, reference))
        standing, unread = self._standing()
        return Audit(
            policy=policy,
            reference=reference,
            settings=self._settings(),
            parts=parts,
            complete=complete,
            notes=[*notes, *unread],
            precision=precision,
            gate=gate,
            token_texts=texts_of_ids(parts, self.pair.policy.tokenizer),
            standing=standing,
        )

    def _standing(self) -> tuple[Standing | None, list[str]]:
        """Where the policy stands in its run; a sentence where its run cannot be read."""
        if self.source.kind != "prompts":
            return None, []
        try:
            return standing_of(*self._identities, temperature=self.settings.temperature), []
        except RunError as error:
            return None, [f"The run of this checkpoint could not be read: {error}."]

    def _settings(self) -> dict[str, Any]:
        source = self.source
        return {
            "source": source.kind,
            "file": source.path.name,
            "file_sha256": source.sha256(),
            "count": self._total,
            **asdict(self.settings),
        }


def _notes(
    pair: ModelPair, source: Source, parts: Sequence[Part], identities: tuple[Identity, Identity]
) -> list[str]:
    """What a reader of the numbers must know."""
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
    if same_weights(*identities):
        notes.append("Both checkpoints hold the same weights.")
    for part in parts:
        if part.tail.heavy:
            notes.append(
                f"Heavy tail ({part.by}): a few responses carry the mean, so the intervals promise "
                "more than they hold. Look at the worst responses, and sample more."
            )
        if part.verdict == "not resolvable":
            notes.append(
                f"Not resolvable ({part.by}): the KL is below 3 times what rounding alone makes. "
                "Compare in float64, or say that no difference was found."
            )
    models: tuple[Policy, ...] = (pair.policy, pair.reference)[: len(parts)]
    if source.kind == "prompts":
        for model in models:
            put_aside = overridden_settings(model)
            if put_aside:
                names = ", ".join(f"{name} = {value}" for name, value in put_aside.items())
                notes.append(f"Sampling settings of {model.path!r} were put aside: {names}.")
    return notes
