"""The prompts of a run, and whose leash each of them is on."""

from collections.abc import Mapping, Sequence

from kleash.config.inputs import IN_MEMORY
from kleash.config.leash import LeashConfig
from kleash.config.schema import PromptsConfig
from kleash.errors import PromptError
from kleash.kl.control.groups import OTHERS, group_of
from kleash.models.policy import Policy
from kleash.models.vocabulary import require_known_ids
from kleash.rollout.prompt_files import Source
from kleash.rollout.prompts import Prompt, read_prompts
from kleash.rollout.scoring_pass import SamplingSpec


def prompt_sets(
    section: PromptsConfig,
    rows: Mapping[str, Sequence[object]],
    policy: Policy,
    sampling: SamplingSpec,
) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts to train on, and those held out.

    Args:
        section: of the configuration.
        rows: prompts in memory, `train` and `heldout`, which take the place of the files.
        policy: which is given them.
        sampling: how long a response may be.

    Raises:
        PromptError: they cannot be read, or one cannot be given to the policy.
    """
    named = section.chat_template
    train = _source(section.train, "train", rows)
    held = _source(section.heldout, "heldout", rows)
    prompts = _read(train or [], policy, sampling, named)
    return prompts, _read(held, policy, sampling, named) if held else []


def _source(path: str | None, name: str, rows: Mapping[str, Sequence[object]]) -> Source | None:
    """Where prompts come from: rows in memory, or a file.

    Raises:
        PromptError: they were in memory, and are not there now.
    """
    if path == IN_MEMORY and name not in rows:
        raise PromptError(
            f"expected the rows of `prompts.{name}` in memory, as this run was begun with, got "
            "none: call kleash.train with the same rows again"
        )
    return rows.get(name, path)


def _read(
    source: Source, policy: Policy, sampling: SamplingSpec, chat_template: str | None
) -> list[Prompt]:
    """Read prompts that the policy can be given.

    Raises:
        PromptError: one cannot.
    """
    prompts = read_prompts(
        source,
        policy.tokenizer,
        context=policy.context,
        max_new_tokens=sampling.max_new_tokens,
        chat_template=chat_template,
    )
    for prompt in prompts:
        of = repr(source) if isinstance(source, str) else "those in memory"
        where = f"prompt {prompt.index + 1} of {of}"
        require_known_ids(prompt.ids, policy.words, policy.tokenizer, where)
    return prompts


def groups_of_prompts(prompts: Sequence[Prompt], leash: LeashConfig, path: str) -> list[str]:
    """Whose leash each prompt is on.

    Raises:
        PromptError: a group has no target.
    """
    leashes = leash.each()
    groups = [group_of(prompt.group, leashes) for prompt in prompts]
    without = sorted(
        {
            "without a group" if prompt.group is None else f"of {prompt.group!r}"
            for prompt, group in zip(prompts, groups, strict=True)
            if group not in leashes
        }
    )
    if without:
        raise PromptError(
            f"expected a target for every prompt in {path!r}, got none for those "
            f"{', '.join(without)}: name each group in leash.groups, or give leash.target_kl for "
            "all others"
        )
    return groups


def require_every_group(prompts: Sequence[Prompt], leash: LeashConfig, path: str) -> None:
    """Every target belongs to a prompt.

    Raises:
        PromptError: leash.groups names a group that no prompt has.
    """
    leashes = leash.each()
    unused = sorted(leashes.keys() - {group_of(prompt.group, leashes) for prompt in prompts})
    if unused == [OTHERS]:
        raise PromptError(
            f"expected prompts in {path!r} for leash.target_kl, got only such as have a target in "
            "leash.groups: leave target_kl out"
        )
    if unused:
        known = sorted({prompt.group for prompt in prompts if prompt.group is not None})
        raise PromptError(
            f"expected prompts of every group of leash.groups in {path!r}, got none of {unused}: "
            f"the groups there are {known}"
        )
