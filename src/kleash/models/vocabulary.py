"""Which token ids mean the same in two models, so that one can be measured against the other.

Ids 0 … words − 1 are shared; added tokens beyond them (a `[PAD]` that only one model has) are left
out of the comparison, with probability 0 on both sides, as the padding rows of a head are. Roles
may differ: each model ends its responses with its own tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from kleash.errors import ModelError, PromptError

_SHOWN = 3


@dataclass(frozen=True)
class SharedVocabulary:
    """What two models have in common, and what only one of them has."""

    words: int
    """Ids below this stand for the same token in both."""
    policy_only: tuple[str, ...] = ()
    """Added tokens of the policy that are left out of the comparison."""
    reference_only: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    """Special tokens whose roles differ, a sentence each."""
    rows: tuple[int, int] = (0, 0)
    """Ids that the policy and the reference each have a row for; those beyond `words` left out."""

    @property
    def notes(self) -> list[str]:
        """Sentences that belong beside every number that is measured so."""
        sides = (("policy", self.policy_only), ("reference", self.reference_only))
        left_out = [
            f"Only the {who} has {_some(tokens)}: left out, the KL is that of the distributions "
            "over the tokens that both models have."
            for who, tokens in sides
            if tokens
        ]
        return [*left_out, *self.roles]


def shared_vocabulary(
    policy: PreTrainedTokenizerBase,
    reference: PreTrainedTokenizerBase,
    *,
    words: tuple[int, int],
    path: str,
) -> SharedVocabulary:
    """The token ids that two models can both produce.

    Tokens of the basic vocabulary must have the same ids in both. Added tokens may differ, as long
    as their ids lie beyond the basic vocabulary.

    Args:
        policy: the policy's tokenizer.
        reference: the reference's.
        words: number of ids of each that have a row in its head.
        path: where the reference lies, for the message.

    Raises:
        ModelError: naming the first token of the basic vocabulary that differs.
    """
    mine, theirs = policy.get_vocab(), reference.get_vocab()
    added = set(policy.added_tokens_decoder), set(reference.added_tokens_decoder)
    shared = min(words)
    for token in sorted(mine.keys() | theirs.keys()):
        ids = mine.get(token), theirs.get(token)
        if ids[0] == ids[1]:
            continue
        if any(id_ is not None and id_ not in own for id_, own in zip(ids, added, strict=True)):
            raise ModelError(
                f"expected the reference in {path!r} to have the policy's vocabulary, got token "
                f"{token!r} with id {ids[0]} in the policy and {ids[1]} in the reference "
                f"({len(mine)} and {len(theirs)} tokens): take models of one tokenizer"
            )
        shared = min(shared, *(id_ for id_ in ids if id_ is not None))
    _require_basic_tokens(shared, (mine, theirs), added, path)
    return SharedVocabulary(
        shared,
        _beyond(mine, theirs, shared, words[0]),
        _beyond(theirs, mine, shared, words[1]),
        roles=_roles(policy, reference),
        rows=words,
    )


def require_shared_ending(
    tokenizer: PreTrainedTokenizerBase, stops: Sequence[int], shared: SharedVocabulary, path: str
) -> None:
    """Check that a model that writes can end its responses with a token that both models have.

    Raises:
        ModelError: it ends them with a token that is left out of the comparison.
    """
    known = {number: token for token, number in tokenizer.get_vocab().items()}
    for stop in stops:
        if stop >= shared.words and stop in known:
            raise ModelError(
                f"expected {path!r} to end its responses with a token that both models have, got "
                f"{known[stop]!r} (id {stop}), which only it has: the KL of its responses would be "
                "infinite; compare along given texts"
            )


def require_known_ids(
    ids: Sequence[int], words: int, tokenizer: PreTrainedTokenizerBase, where: str
) -> None:
    """Check that every id of a text can be read by every model that has to read it.

    Args:
        ids: token ids of the text.
        words: number of ids that the models have a row for.
        tokenizer: whose ids they are.
        where: the place of the text, for the message.

    Raises:
        PromptError: naming the first token without a row.
    """
    found = next((number for number in ids if number >= words), None)
    if found is not None:
        raise PromptError(
            f"expected tokens that every model has a row for on {where}, got "
            f"{tokenizer.convert_ids_to_tokens(found)!r} (id {found}, of {words}): remove it from "
            "the text"
        )


def _require_basic_tokens(
    shared: int,
    vocabularies: tuple[dict[str, int], dict[str, int]],
    added: tuple[set[int], set[int]],
    path: str,
) -> None:
    for names, own in zip(vocabularies, added, strict=True):
        lost = [token for token, number in names.items() if number >= shared and number not in own]
        if lost:
            raise ModelError(
                f"expected policy and reference of one vocabulary, got only {shared} ids that mean "
                f"the same in the policy and in {path!r}: {_some(sorted(lost))} would be left out; "
                "take models of one tokenizer"
            )


def _beyond(
    names: dict[str, int], others: dict[str, int], shared: int, rows: int
) -> tuple[str, ...]:
    """Tokens of one model beyond the shared ids that have a row in it, or differ in the other."""
    found = {
        number: token
        for token, number in names.items()
        if number >= shared and (number < rows or others.get(token) != number)
    }
    return tuple(found[number] for number in sorted(found))


def _roles(policy: PreTrainedTokenizerBase, reference: PreTrainedTokenizerBase) -> tuple[str, ...]:
    found: list[str] = []
    if policy.eos_token_id != reference.eos_token_id:
        found.append(
            f"The end token is {policy.eos_token!r} in the policy and {reference.eos_token!r} in "
            "the reference: each ends its responses with its own."
        )
    if policy.bos_token_id != reference.bos_token_id:
        found.append(
            f"The token that begins a text is {policy.bos_token!r} in the policy and "
            f"{reference.bos_token!r} in the reference: both read the policy's encoding."
        )
    return tuple(found)


def _some(tokens: Sequence[str]) -> str:
    shown = ", ".join(repr(token) for token in tokens[:_SHOWN])
    return shown if len(tokens) <= _SHOWN else f"{shown} and {len(tokens) - _SHOWN} more"
