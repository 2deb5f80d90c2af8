"""Build the embedded world: a supervised policy, a reward model, prompts, in one directory.

    1. the desk's replies, good and bad                                     language
    2. a small transformer learns to reply like the desk                    learning.supervise
    3. it writes two replies to each of many questions                      sampling
    4. raters choose between them                                           preferences
    5. a reward model, started from its weights, learns the choices alone   learning.learn_choices

Held-out questions take part in none of this. Everything follows from the seed; the directory is
written under a temporary name and renamed when complete, so that it is whole or absent.
"""

import hashlib
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

from kleash.config.loading import dump_config, parse_config
from kleash.config.schema import Config
from kleash.errors import RunError
from kleash.models.loading import quiet
from kleash.models.policy import Policy, load_policy
from kleash.playground import gold, preferences
from kleash.playground.language import (
    MAX_WORDS,
    Question,
    build_tokenizer,
    split_questions,
    topic_named,
    write_reply,
)
from kleash.playground.learning import (
    Schooling,
    Shape,
    learn_choices,
    reward_scores,
    standardise,
    supervise,
)
from kleash.playground.preferences import Preference
from kleash.playground.sampling import write_replies

Say = Callable[[str], None]
"""Where progress goes: one short sentence at the start of each phase."""

_SOURCES = (
    "build.py",
    "gold.py",
    "language.py",
    "learning.py",
    "preferences.py",
    "sampling.py",
    "../rollout/sampling.py",
)
_STANDARD_REPLIES = 1024
"""Replies on which the reward model's scores are standardised."""


@dataclass(frozen=True)
class WorldSettings:
    """Sizes and learning rates of a world; the defaults are the demo's."""

    held_out: int = 128
    """Questions held out, a multiple of the number of topics."""
    shape: Shape = field(default_factory=Shape)
    examples: int = 19_200
    """Replies of the desk to learn from."""
    supervised: Schooling = field(default_factory=lambda: Schooling(batch=64, lr=2e-3))
    pairs: int = 4_000
    """Pairs of replies shown to the raters."""
    reward: Schooling = field(default_factory=lambda: Schooling(batch=32, lr=1e-3, epochs=3))
    """`batch` counts pairs."""
    centring: float = 0.01
    """Weight of (score chosen + score rejected)², which keeps scores around zero."""
    checked_pairs: int = 512
    """Pairs on held-out questions, to measure the reward model's accuracy."""


def cache_root() -> Path:
    """Where worlds are kept: $KLEASH_CACHE, else $XDG_CACHE_HOME/kleash, else ~/.cache/kleash."""
    if chosen := os.environ.get("KLEASH_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kleash"


def world_directory(seed: int, settings: WorldSettings | None = None) -> Path:
    """The cache directory of a world: its name tells seed, settings and the code that builds it."""
    return cache_root() / f"world-{seed}-{_recipe(settings or WorldSettings())[:12]}"


def with_world(config: Config, world: Path | None = None) -> Config:
    """Put the directory of the embedded world where the configuration says `{world}`.

    Args:
        config: unchanged if it names no world.
        world: the directory; built, or found in the cache, by the seed `world` unless given.
    """
    if world is None and config.world is None:
        return config
    folder = build_world(config.world or 0) if world is None else world
    text = dump_config(config).replace("{world}", str(folder))
    return parse_config(yaml.safe_load(text), where="the embedded world's configuration")


def build_world(
    seed: int,
    directory: Path | None = None,
    *,
    settings: WorldSettings | None = None,
    say: Say = lambda _: None,
) -> Path:
    """Build a world unless it is there already.

    Args:
        seed: decides everything random.
        directory: where the world goes; None: its place in the cache.
        settings: sizes and learning rates; None: the demo's.
        say: called at the start of each phase with what is being done.

    Returns:
        The directory: `policy/`, `reward_model/`, `prompts.jsonl`, `heldout.jsonl`, `world.json`.

    Raises:
        RunError: if the directory holds something else, another world, or cannot be written.
    """
    settings = settings or WorldSettings()
    target = directory or world_directory(seed, settings)
    if _is_world(target, seed, settings):
        return target
    partial: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        _build_into(partial, seed, settings, say)
        # Another process may have been faster; then the two worlds are the same.
        if not _is_world(target, seed, settings):
            partial.replace(target)
    except RunError:
        raise
    except OSError as error:
        raise RunError(
            f"expected to write the embedded world to {str(target)!r}, got {error}: "
            "free the disk, or set KLEASH_CACHE to another directory"
        ) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def _recipe(settings: WorldSettings) -> str:
    """Fingerprint of all that decides a world beside its seed."""
    digest = hashlib.sha256(json.dumps(asdict(settings)).encode())
    for name in _SOURCES:
        digest.update((Path(__file__).parent / name).read_bytes())
    digest.update(f"torch {torch.__version__} transformers {transformers.__version__}".encode())
    return digest.hexdigest()


def _is_world(target: Path, seed: int, settings: WorldSettings) -> bool:
    """True if the target is this very world, False if nothing is there.

    Raises:
        RunError: if something else is there.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    try:
        found = json.loads((target / "world.json").read_text(encoding="utf-8"))
        got = f"world {found['seed']} of recipe {found['recipe'][:12]}"
        same = found["seed"] == seed and found["recipe"] == _recipe(settings)
    except (OSError, ValueError, KeyError, TypeError):
        same, got = False, "other files"
    if not same:
        raise RunError(
            f"expected an empty directory or world {seed} of recipe {_recipe(settings)[:12]} in "
            f"{str(target)!r}, got {got}: choose another directory"
        )
    return True


def _build_into(target: Path, seed: int, settings: WorldSettings, say: Say) -> None:
    """Build every file of a world in an existing empty directory."""
    seconds: dict[str, float] = {}
    tokenizer = build_tokenizer()
    kept, held = split_questions(settings.held_out, seed=seed)

    say("supervising a small transformer on the desk's replies")
    with _timed(seconds, "supervise"):
        examples = _desk_replies(kept, settings.examples, seed)
        model = supervise(examples, tokenizer, settings.shape, settings.supervised, seed=seed)
        _save(target / "policy", model, tokenizer)

    say("having raters compare its replies")
    with _timed(seconds, "compare"):
        policy = load_policy(target / "policy")
        pairs = compare(policy, kept, settings.pairs, seed=f"train {seed}")
        checks = compare(policy, held, settings.checked_pairs, seed=f"check {seed}")

    say("training the reward model on their choices")
    with _timed(seconds, "reward_model"):
        reward_model = learn_choices(
            model,
            tokenizer,
            pairs,
            settings.shape,
            settings.reward,
            centring=settings.centring,
            seed=seed,
        )
        # Half the replies of a pair are the better ones: together they are ordinary replies.
        some = pairs[: _STANDARD_REPLIES // 2]
        prompts = [pair.prompt for pair in some] * 2
        replies = [pair.chosen for pair in some] + [pair.rejected for pair in some]
        mean, sd = standardise(reward_model, tokenizer, prompts, replies)
        _save(target / "reward_model", reward_model, tokenizer)

    _write_questions(target / "prompts.jsonl", kept)
    _write_questions(target / "heldout.jsonl", held)
    record: dict[str, Any] = {
        "seed": seed,
        "recipe": _recipe(settings),
        "settings": asdict(settings),
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tokenizer),
        "prompts": len(kept),
        "held_out": len(held),
        "pairs": len(pairs),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "reward_model": {"mean": mean, "sd_before": sd}
        | _accuracies(reward_model, tokenizer, checks),
        "sha256": _hashes(target),
    }
    (target / "world.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def compare(
    policy: Policy, questions: Sequence[Question], pairs: int, *, seed: str
) -> list[Preference]:
    """Have the policy reply twice to each of `pairs` questions, and the raters choose.

    Returns:
        The preferences; pairs of equal replies are left out.
    """
    rng = random.Random(f"compare {seed}")
    prompts = [rng.choice(questions).text for _ in range(pairs)]
    replies, _ = write_replies(
        policy, prompts * 2, seed=rng.randrange(2**32), max_new_tokens=MAX_WORDS
    )
    return preferences.label(prompts, replies[:pairs], replies[pairs:], seed=rng.randrange(2**32))


def _desk_replies(questions: Sequence[Question], count: int, seed: int) -> list[tuple[str, str]]:
    """Questions, each with a reply of the desk."""
    rng = random.Random(f"desk {seed}")
    asked = [rng.choice(questions) for _ in range(count)]
    return [(q.text, write_reply(topic_named(q.topic), rng)) for q in asked]


def _accuracies(
    model: LlamaForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Sequence[Preference],
) -> dict[str, float]:
    """How often the reward model agrees with raters and with gold, and raters with themselves.

    Pairs of equal gold score say nothing about agreement with gold and are left out there.
    """
    prompts = [pair.prompt for pair in pairs]
    chosen, rejected = [p.chosen for p in pairs], [p.rejected for p in pairs]
    good = reward_scores(model, tokenizer, prompts, chosen)
    bad = reward_scores(model, tokenizer, prompts, rejected)
    truths = zip(gold.score(prompts, chosen), gold.score(prompts, rejected), strict=True)
    feelings = zip(
        preferences.utilities(prompts, chosen),
        preferences.utilities(prompts, rejected),
        strict=True,
    )
    with_raters = [g > b for g, b in zip(good, bad, strict=True)]
    with_gold = [
        right == (true > false)
        for right, (true, false) in zip(with_raters, truths, strict=True)
        if true != false
    ]
    certainty = [preferences.preference_probability(a, b) for a, b in feelings]
    return {
        "accuracy_raters": _mean(with_raters),
        "accuracy_gold": _mean(with_gold),
        "accuracy_best_possible": _mean([max(p, 1 - p) for p in certainty]),
    }


def _mean(values: Sequence[float] | Sequence[bool]) -> float:
    return sum(values) / len(values)


def _save(path: Path, model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    with quiet():
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)


def _write_questions(path: Path, questions: Sequence[Question]) -> None:
    lines = [json.dumps({"prompt": q.text, "group": q.topic}) + "\n" for q in questions]
    path.write_text("".join(lines), encoding="utf-8")


def _hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of the files that decide what the world is."""
    names = (
        "policy/model.safetensors",
        "reward_model/model.safetensors",
        "prompts.jsonl",
        "heldout.jsonl",
    )
    return {n: hashlib.sha256((directory / n).read_bytes()).hexdigest() for n in names}


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Generator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started
