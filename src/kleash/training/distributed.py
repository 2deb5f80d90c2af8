"""The three heavy jobs of a step, done by this process alone or shared out among several.

    generate   each process writes some rows, with the random numbers that are theirs
    score      each reads some rows with policy, reference and critic
    backward   each adds the gradients of some rows; the leader has the sum

A job begins with the leader's weights, and its outcome is that of one process, but for the rounding
of matrix products over fewer rows. An error in one process is the leader's to raise; the others
never see more of a run than the rows they were given.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
import yaml
from jaxtyping import Float
from torch import Tensor

from kleash.algorithms.common import select
from kleash.config.loading import dump_config, parse_config
from kleash.config.schema import Config
from kleash.errors import (
    ConfigError,
    ModelError,
    NonFiniteError,
    RefusedError,
    RunError,
    ScoringError,
)
from kleash.rollout import scoring_pass
from kleash.rollout.prompts import PromptBatch
from kleash.rollout.sampling import Piece, join_pieces, random_numbers, require_room, write_piece
from kleash.rollout.scoring_pass import TokenScorer
from kleash.scoring import float64_check, token_scores
from kleash.training import backward as local
from kleash.training.backward import Passed
from kleash.training.components import Components, assemble, learning
from kleash.training.process_group import Message, WorkerGroup, is_distributed, join
from kleash.types import Experience, Rollout, ScoredRollout

_READ = ("rollout_logprobs", "ref_logprobs", "kl", "entropy", "values", "final_values")
T = TypeVar("T")

_REFUSALS: dict[str, type[RefusedError]] = {
    "NonFiniteError": NonFiniteError,
    "ScoringError": ScoringError,
}


@contextmanager
def leading(config: Config) -> Generator[WorkerGroup | None]:
    """The other processes, if a launcher started several; they end with what happens inside.

    Raises:
        ConfigError: they cannot be reached, or the run has something that cannot be shared out.
    """
    if not is_distributed():
        yield None
        return
    workers = join()
    try:
        _require_shareable(config)
        yield workers
    finally:
        workers.send(Message("end"))
        workers.leave()


def _require_shareable(config: Config) -> None:
    found = {
        "reference.kind: cached": config.reference.kind == "cached",
        "leash.reanchor_every": config.leash.reanchor_every is not None,
        "logging.trackers": bool(config.logging.trackers),
    }
    for key in (key for key, there in found.items() if there):
        raise ConfigError(f"`{key}` does not go with several processes: leave it out, or run one")


def assemble_everywhere(workers: WorkerGroup, config: Config) -> Components:
    """Have everyone load the models; they must be the same.

    Raises:
        KleashError: somebody cannot.
        ModelError: somebody's models are others.
    """
    workers.send(Message("assemble", {"config": dump_config(config)}))
    components, messages = _together(workers, lambda: replace(assemble(config), workers=workers))
    own = components.reference.identity().sha256
    for rank, message in enumerate(messages, start=1):
        if message.facts["sha256"] != own:
            raise ModelError(
                f"expected the same reference in every process, got {own[:12]}… in process 0 and "
                f"{message.facts['sha256'][:12]}… in process {rank}: give all of them one directory"
            )
    return components


def serve_requests() -> None:
    """What every process but the leader does, until the leader ends it."""
    workers, components = join(), None
    while (message := workers.receive()).name != "end":
        try:
            if message.name == "assemble":
                tree = yaml.safe_load(message.facts["config"])
                components = replace(
                    assemble(parse_config(tree, where="the leader")), workers=workers
                )
                answer = Message("done", {"sha256": components.reference.identity().sha256})
            else:
                assert components is not None
                workers.spread(learning(components))
                answer = _JOBS[message.name](components, workers, message)
        except RefusedError as error:
            where = {"response": error.response, "token": error.token}
            answer = Message(type(error).__name__, {"message": error.args[0], **where})
        except Exception as error:
            answer = Message("failed", {"message": f"{type(error).__name__}: {error}"})
        workers.answer(answer)
        if components is not None and message.name == "backward":
            workers.add_gradients(learning(components))
    workers.leave()


def generate(components: Components, prompts: PromptBatch, *, microbatch: int) -> Rollout:
    """`rollout.generate`, shared out.

    Raises:
        PromptError, NonFiniteError: as it does.
    """
    workers = components.workers
    if workers is None:
        return scoring_pass.generate(
            components.policy, prompts, components.sampling, microbatch=microbatch
        )
    require_room(components.policy, prompts, components.sampling)
    pieces: list[Piece] = []
    for first in range(0, len(prompts.ids), microbatch):
        ids, mask = (
            prompts.ids[first : first + microbatch],
            prompts.mask[first : first + microbatch],
        )
        pieces += _write_together(components, workers, ids, mask, first=first)
    return join_pieces(components.policy, prompts, pieces)


def _write_together(
    components: Components, workers: WorkerGroup, ids: Tensor, mask: Tensor, *, first: int
) -> list[Piece]:
    """Every process takes a run of rows; random numbers end where those of one process would."""
    device = components.policy.device
    workers.send(
        Message("generate", tensors={"ids": ids, "mask": mask, "random": _random_state(device)})
    )
    workers.spread(learning(components))
    shares = _runs(len(ids), workers.size)

    def own() -> Piece:
        return write_piece(components.policy, ids, mask, components.sampling, rows=shares[0])

    piece, messages = _together(
        workers, own, rows=[list(range(first + s.start, first + s.stop)) for s in shares]
    )
    pieces = [piece]
    for message in messages:
        if message.tensors:
            got = {name: x.to(device) for name, x in message.tensors.items()}
            pieces.append(Piece(got["ids"], got["logprobs"], message.facts["draws"]))
    for _ in range(max(p.draws for p in pieces) - piece.draws):
        random_numbers(len(ids), device)
    return pieces


def _generate(components: Components, workers: WorkerGroup, message: Message) -> Message:
    device = components.policy.device
    ids, mask = (message.tensors[name].to(device) for name in ("ids", "mask"))
    share = _runs(len(ids), workers.size)[workers.rank]
    if share.start == share.stop:
        return Message("done")
    _set_random_state(device, message.tensors["random"])
    piece = write_piece(components.policy, ids, mask, components.sampling, rows=share)
    return Message("done", {"draws": piece.draws}, {"ids": piece.ids, "logprobs": piece.logprobs})


def score(
    components: Components,
    written: Rollout,
    scores: Float[Tensor, " batch"],
    *,
    microbatch: int,
    critic: bool = True,
    spot_check: bool = False,
) -> ScoredRollout:
    """`rollout.score` by the components's models, shared out.

    Args:
        components: its policy, reference and, unless left out, critic.
        written: what is read.
        scores: of the reward models, passed through.
        microbatch: responses read at once.
        critic: whether the critic reads it too.
        spot_check: compare a few numbers with an obvious implementation in float64.

    Raises:
        NonFiniteError, ScoringError: as it does.
    """
    workers = components.workers
    if workers is None:
        return _score(components, written, scores, microbatch, critic, spot_check, keep=critic)
    facts = {"microbatch": microbatch, "critic": critic, "spot_check": spot_check}
    workers.send(Message("score", facts, _flat(written)))
    workers.spread(learning(components))
    shares = _strides(written, workers.size)

    def own() -> ScoredRollout:
        part = select(written, shares[0])
        return _score(
            components, part, scores[shares[0]], microbatch, critic, spot_check, keep=False
        )

    mine, messages = _together(workers, own, rows=[share.tolist() for share in shares])
    parts = [{name: x for name, x in _flat(mine).items() if name in _READ}]
    parts += [dict(message.tensors) for message in messages]
    whole = {
        name: _in_place(first, [part[name] for part in parts if part], shares, written)
        for name, first in parts[0].items()
    }
    return ScoredRollout(rollout=written, scores=scores, **whole)


def _score_job(components: Components, workers: WorkerGroup, message: Message) -> Message:
    written = _rollout_of(_on(message.tensors, components))
    share = _strides(written, workers.size)[workers.rank]
    if not len(share):
        return Message("done")
    facts = message.facts
    read = _score(
        components,
        select(written, share),
        torch.zeros(len(share), device=share.device),
        facts["microbatch"],
        facts["critic"],
        facts["spot_check"],
        keep=False,
    )
    return Message("done", tensors={n: x for n, x in _flat(read).items() if n in _READ})


def _score(
    components: Components,
    written: Rollout,
    scores: Tensor,
    microbatch: int,
    critic: bool,
    spot_check: bool,
    *,
    keep: bool,
) -> ScoredRollout:
    scorer: TokenScorer = float64_check.token_scores if spot_check else token_scores
    return scoring_pass.score(
        written,
        policy=components.policy,
        reference=components.reference,
        scores=scores,
        value=components.value if critic else None,
        temperature=components.sampling.temperature,
        microbatch=microbatch,
        keep_ref_hidden=keep and local.needs_exact_kl(components),
        scorer=scorer,
    )


def backward(components: Components, minibatch: Experience, *, microbatch: int) -> Passed:
    """`passes.backward` of a whole minibatch, shared out; the gradients are the leader's.

    Raises:
        RefusedError: as it does.
    """
    workers, tokens = components.workers, int(minibatch.mask.sum())
    if workers is None:
        return local.backward(components, minibatch, tokens=tokens, microbatch=microbatch)
    facts = {"microbatch": microbatch, "tokens": tokens}
    workers.send(Message("backward", facts, _flat(minibatch)))
    workers.spread(learning(components))
    shares = _strides(minibatch.scored.rollout, workers.size)

    def own() -> Passed:
        part = select(minibatch, shares[0])
        return local.backward(components, part, tokens=tokens, microbatch=microbatch)

    try:
        mine, messages = _together(workers, own, rows=[share.tolist() for share in shares])
    finally:
        workers.add_gradients(learning(components))
    weights = torch.zeros_like(minibatch.mask, dtype=torch.float64)
    weights[shares[0]] = mine.weights
    metrics, error = list(mine.metrics), mine.ratio_error
    for share, message in zip(shares[1:], messages, strict=True):
        if message.tensors:
            weights[share] = message.tensors["weights"].to(weights.device)
            metrics += message.facts["metrics"]
            error = max(error, message.facts["ratio_error"])
    return Passed(metrics, error, weights)


def _backward(components: Components, workers: WorkerGroup, message: Message) -> Message:
    components.optimizer.zero_grad(set_to_none=True)
    minibatch = _experience_of(_on(message.tensors, components))
    share = _strides(minibatch.scored.rollout, workers.size)[workers.rank]
    if not len(share):
        return Message("done")
    passed = local.backward(
        components,
        select(minibatch, share),
        tokens=message.facts["tokens"],
        microbatch=message.facts["microbatch"],
    )
    facts = {"metrics": passed.metrics, "ratio_error": passed.ratio_error}
    return Message("done", facts, {"weights": passed.weights})


_JOBS: Mapping[str, Callable[[Components, WorkerGroup, Message], Message]] = {
    "generate": _generate,
    "score": _score_job,
    "backward": _backward,
}


def _together(
    workers: WorkerGroup, own: Callable[[], T], *, rows: list[list[int]] | None = None
) -> tuple[T, list[Message]]:
    """The leader's own share, and the answers of the others; whoever failed, all are heard first.

    Args:
        workers: everyone.
        own: what the leader does.
        rows: which responses of the batch each process has, for the errors that name one.
    """
    failure: Exception | None = None
    mine: T | None = None
    try:
        mine = own()
    except Exception as error:
        failure = error
        if isinstance(error, RefusedError) and rows is not None:
            error.among(rows[0])
    messages = workers.answers()
    if failure is not None:
        raise failure
    for rank, message in enumerate(messages, start=1):
        if message.name in _REFUSALS:
            place = {key: message.facts[key] for key in ("response", "token")}
            refused = _REFUSALS[message.name](message.facts["message"], **place)
            if rows is not None:
                refused.among(rows[rank])
            raise refused
        if message.name != "done":
            raise RunError(f"process {rank} of {workers.size} failed: {message.facts['message']}")
    assert mine is not None
    return mine, messages


def _runs(count: int, size: int) -> list[slice]:
    """Neighbouring rows for each process, as even as can be; the leader has one at least."""
    ends = [-(-count * (rank + 1) // size) for rank in range(size)]
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _strides(written: Rollout, size: int) -> list[Tensor]:
    """Rows for each process, every one long and short responses alike."""
    length = written.prompt_mask.sum(dim=1) + written.response_mask.sum(dim=1)
    order = length.argsort(descending=True, stable=True)
    return [order[rank::size] for rank in range(size)]


def _in_place(like: Tensor, parts: list[Tensor], shares: list[Tensor], written: Rollout) -> Tensor:
    """The numbers of all processes in the order of the batch."""
    whole = like.new_zeros(len(written.response_ids), *like.shape[1:])
    for share, part in zip(shares, parts, strict=False):
        whole[share] = part.to(whole.device)
    return whole


def _flat(data: Any, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a dataclass and of those it holds, by dotted names."""
    found: dict[str, Tensor] = {}
    for field in fields(data):
        value = getattr(data, field.name)
        if isinstance(value, Tensor):
            found[prefix + field.name] = value
        elif is_dataclass(value):
            found |= _flat(value, f"{prefix}{field.name}.")
    return found


def _rollout_of(tensors: Mapping[str, Tensor], prefix: str = "") -> Rollout:
    return Rollout(**{f.name: tensors.get(prefix + f.name) for f in fields(Rollout)})  # pyright: ignore[reportArgumentType]


def _experience_of(tensors: Mapping[str, Tensor]) -> Experience:
    scored: dict[str, Any] = {
        f.name: tensors.get(f"scored.{f.name}") for f in fields(ScoredRollout)
    }
    scored["rollout"] = _rollout_of(tensors, "scored.rollout.")
    own: dict[str, Any] = {f.name: tensors.get(f.name) for f in fields(Experience)}
    own["scored"] = ScoredRollout(**scored)
    return Experience(**own)


def _on(tensors: Mapping[str, Tensor], components: Components) -> dict[str, Tensor]:
    return {name: tensor.to(components.policy.device) for name, tensor in tensors.items()}


def _random_state(device: torch.device) -> Tensor:
    return torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state, device)
