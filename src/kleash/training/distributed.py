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
from kleash.training.components import Crew, assemble, learning
from kleash.training.process_group import Letter, Team, join, several
from kleash.types import Experience, Rollout, ScoredRollout

_READ = ("rollout_logprobs", "ref_logprobs", "kl", "entropy", "values", "final_values")
T = TypeVar("T")

_REFUSALS: dict[str, type[RefusedError]] = {
    "NonFiniteError": NonFiniteError,
    "ScoringError": ScoringError,
}


@contextmanager
def leading(config: Config) -> Generator[Team | None]:
    """The other processes, if a launcher started several; they end with what happens inside.

    Raises:
        ConfigError: they cannot be reached, or the run has something that cannot be shared out.
    """
    if not several():
        yield None
        return
    team = join()
    try:
        _require_shareable(config)
        yield team
    finally:
        team.send(Letter("end"))
        team.leave()


def _require_shareable(config: Config) -> None:
    found = {
        "reference.kind: cached": config.reference.kind == "cached",
        "leash.reanchor_every": config.leash.reanchor_every is not None,
        "logging.trackers": bool(config.logging.trackers),
    }
    for key in (key for key, there in found.items() if there):
        raise ConfigError(f"`{key}` does not go with several processes: leave it out, or run one")


def muster(team: Team, config: Config) -> Crew:
    """Have everyone load the models; they must be the same.

    Raises:
        KleashError: somebody cannot.
        ModelError: somebody's models are others.
    """
    team.send(Letter("assemble", {"config": dump_config(config)}))
    crew, letters = _together(team, lambda: replace(assemble(config), team=team))
    own = crew.reference.identity().sha256
    for rank, letter in enumerate(letters, start=1):
        if letter.facts["sha256"] != own:
            raise ModelError(
                f"expected the same reference in every process, got {own[:12]}… in process 0 and "
                f"{letter.facts['sha256'][:12]}… in process {rank}: give all of them one directory"
            )
    return crew


def lend_a_hand() -> None:
    """What every process but the leader does, until the leader ends it."""
    team, crew = join(), None
    while (letter := team.receive()).name != "end":
        try:
            if letter.name == "assemble":
                tree = yaml.safe_load(letter.facts["config"])
                crew = replace(assemble(parse_config(tree, where="the leader")), team=team)
                answer = Letter("done", {"sha256": crew.reference.identity().sha256})
            else:
                assert crew is not None
                team.spread(learning(crew))
                answer = _JOBS[letter.name](crew, team, letter)
        except RefusedError as error:
            where = {"response": error.response, "token": error.token}
            answer = Letter(type(error).__name__, {"message": error.args[0], **where})
        except Exception as error:
            answer = Letter("failed", {"message": f"{type(error).__name__}: {error}"})
        team.answer(answer)
        if crew is not None and letter.name == "backward":
            team.add_gradients(learning(crew))
    team.leave()


def generate(crew: Crew, prompts: PromptBatch, *, microbatch: int) -> Rollout:
    """`rollout.generate`, shared out.

    Raises:
        PromptError, NonFiniteError: as it does.
    """
    team = crew.team
    if team is None:
        return scoring_pass.generate(crew.policy, prompts, crew.sampling, microbatch=microbatch)
    require_room(crew.policy, prompts, crew.sampling)
    pieces: list[Piece] = []
    for first in range(0, len(prompts.ids), microbatch):
        ids, mask = (
            prompts.ids[first : first + microbatch],
            prompts.mask[first : first + microbatch],
        )
        pieces += _write_together(crew, team, ids, mask, first=first)
    return join_pieces(crew.policy, prompts, pieces)


def _write_together(
    crew: Crew, team: Team, ids: Tensor, mask: Tensor, *, first: int
) -> list[Piece]:
    """Every process takes a run of rows; random numbers end where those of one process would."""
    device = crew.policy.device
    team.send(
        Letter("generate", tensors={"ids": ids, "mask": mask, "random": _random_state(device)})
    )
    team.spread(learning(crew))
    shares = _runs(len(ids), team.size)

    def own() -> Piece:
        return write_piece(crew.policy, ids, mask, crew.sampling, rows=shares[0])

    piece, letters = _together(
        team, own, rows=[list(range(first + s.start, first + s.stop)) for s in shares]
    )
    pieces = [piece]
    for letter in letters:
        if letter.tensors:
            got = {name: x.to(device) for name, x in letter.tensors.items()}
            pieces.append(Piece(got["ids"], got["logprobs"], letter.facts["draws"]))
    for _ in range(max(p.draws for p in pieces) - piece.draws):
        random_numbers(len(ids), device)
    return pieces


def _generate(crew: Crew, team: Team, letter: Letter) -> Letter:
    device = crew.policy.device
    ids, mask = (letter.tensors[name].to(device) for name in ("ids", "mask"))
    share = _runs(len(ids), team.size)[team.rank]
    if share.start == share.stop:
        return Letter("done")
    _set_random_state(device, letter.tensors["random"])
    piece = write_piece(crew.policy, ids, mask, crew.sampling, rows=share)
    return Letter("done", {"draws": piece.draws}, {"ids": piece.ids, "logprobs": piece.logprobs})


def score(
    crew: Crew,
    written: Rollout,
    scores: Float[Tensor, " batch"],
    *,
    microbatch: int,
    critic: bool = True,
    spot_check: bool = False,
) -> ScoredRollout:
    """`rollout.score` by the crew's models, shared out.

    Args:
        crew: its policy, reference and, unless left out, critic.
        written: what is read.
        scores: of the reward models, passed through.
        microbatch: responses read at once.
        critic: whether the critic reads it too.
        spot_check: compare a few numbers with an obvious implementation in float64.

    Raises:
        NonFiniteError, ScoringError: as it does.
    """
    team = crew.team
    if team is None:
        return _score(crew, written, scores, microbatch, critic, spot_check, keep=critic)
    facts = {"microbatch": microbatch, "critic": critic, "spot_check": spot_check}
    team.send(Letter("score", facts, _flat(written)))
    team.spread(learning(crew))
    shares = _strides(written, team.size)

    def own() -> ScoredRollout:
        part = select(written, shares[0])
        return _score(crew, part, scores[shares[0]], microbatch, critic, spot_check, keep=False)

    mine, letters = _together(team, own, rows=[share.tolist() for share in shares])
    parts = [{name: x for name, x in _flat(mine).items() if name in _READ}]
    parts += [dict(letter.tensors) for letter in letters]
    whole = {
        name: _in_place(first, [part[name] for part in parts if part], shares, written)
        for name, first in parts[0].items()
    }
    return ScoredRollout(rollout=written, scores=scores, **whole)


def _score_job(crew: Crew, team: Team, letter: Letter) -> Letter:
    written = _rollout_of(_on(letter.tensors, crew))
    share = _strides(written, team.size)[team.rank]
    if not len(share):
        return Letter("done")
    facts = letter.facts
    read = _score(
        crew,
        select(written, share),
        torch.zeros(len(share), device=share.device),
        facts["microbatch"],
        facts["critic"],
        facts["spot_check"],
        keep=False,
    )
    return Letter("done", tensors={n: x for n, x in _flat(read).items() if n in _READ})


def _score(
    crew: Crew,
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
        policy=crew.policy,
        reference=crew.reference,
        scores=scores,
        value=crew.value if critic else None,
        temperature=crew.sampling.temperature,
        microbatch=microbatch,
        keep_ref_hidden=keep and local.needs_exact_kl(crew),
        scorer=scorer,
    )


def backward(crew: Crew, minibatch: Experience, *, microbatch: int) -> Passed:
    """`passes.backward` of a whole minibatch, shared out; the gradients are the leader's.

    Raises:
        RefusedError: as it does.
    """
    team, tokens = crew.team, int(minibatch.mask.sum())
    if team is None:
        return local.backward(crew, minibatch, tokens=tokens, microbatch=microbatch)
    facts = {"microbatch": microbatch, "tokens": tokens}
    team.send(Letter("backward", facts, _flat(minibatch)))
    team.spread(learning(crew))
    shares = _strides(minibatch.scored.rollout, team.size)

    def own() -> Passed:
        part = select(minibatch, shares[0])
        return local.backward(crew, part, tokens=tokens, microbatch=microbatch)

    try:
        mine, letters = _together(team, own, rows=[share.tolist() for share in shares])
    finally:
        team.add_gradients(learning(crew))
    weights = torch.zeros_like(minibatch.mask, dtype=torch.float64)
    weights[shares[0]] = mine.weights
    metrics, error = list(mine.metrics), mine.ratio_error
    for share, letter in zip(shares[1:], letters, strict=True):
        if letter.tensors:
            weights[share] = letter.tensors["weights"].to(weights.device)
            metrics += letter.facts["metrics"]
            error = max(error, letter.facts["ratio_error"])
    return Passed(metrics, error, weights)


def _backward(crew: Crew, team: Team, letter: Letter) -> Letter:
    crew.optimizer.zero_grad(set_to_none=True)
    minibatch = _experience_of(_on(letter.tensors, crew))
    share = _strides(minibatch.scored.rollout, team.size)[team.rank]
    if not len(share):
        return Letter("done")
    passed = local.backward(
        crew,
        select(minibatch, share),
        tokens=letter.facts["tokens"],
        microbatch=letter.facts["microbatch"],
    )
    facts = {"metrics": passed.metrics, "ratio_error": passed.ratio_error}
    return Letter("done", facts, {"weights": passed.weights})


_JOBS: Mapping[str, Callable[[Crew, Team, Letter], Letter]] = {
    "generate": _generate,
    "score": _score_job,
    "backward": _backward,
}


def _together(
    team: Team, own: Callable[[], T], *, rows: list[list[int]] | None = None
) -> tuple[T, list[Letter]]:
    """The leader's own share, and the answers of the others; whoever failed, all are heard first.

    Args:
        team: everyone.
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
    letters = team.answers()
    if failure is not None:
        raise failure
    for rank, letter in enumerate(letters, start=1):
        if letter.name in _REFUSALS:
            place = {key: letter.facts[key] for key in ("response", "token")}
            refused = _REFUSALS[letter.name](letter.facts["message"], **place)
            if rows is not None:
                refused.among(rows[rank])
            raise refused
        if letter.name != "done":
            raise RunError(f"process {rank} of {team.size} failed: {letter.facts['message']}")
    assert mine is not None
    return mine, letters


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


def _on(tensors: Mapping[str, Tensor], crew: Crew) -> dict[str, Tensor]:
    return {name: tensor.to(crew.policy.device) for name, tensor in tensors.items()}


def _random_state(device: torch.device) -> Tensor:
    return torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state, device)
