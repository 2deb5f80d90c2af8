"""Checks `prompts.*`: copies, leaks into the held-out set, and chat templates that do not fit.

Prompts longer than the context are refused while they are read.
"""

from collections import Counter

from transformers import PreTrainedTokenizerBase

from kleash.models.chat_templates import content_text, render_chat
from kleash.models.reward_model import text_of
from kleash.preflight.findings import Check, Finding
from kleash.preflight.probe_batch import Trial
from kleash.rollout.prompts import Prompt, encode_prompt

_LOOKED_AT = 32
"""Prompts with tools that are written a second time, without them."""
_MANY = 0.2
"""Share of copies from which a file is no longer an honest sample."""


def duplicates(trial: Trial) -> Finding:
    """Prompts that are in the file more than once count as different clusters, and are not."""
    check = Check("prompts.duplicates", f"under {_MANY:.0%} of the prompts are copies")
    counts = Counter(_normalised(prompt) for prompt in trial.components.prompts)
    total = len(trial.components.prompts)
    copies = total - len(counts)
    measured = f"{copies} of {total} prompts are copies"
    if copies <= _MANY * total:
        return check.ok(measured)
    first = next(iter(counts.most_common(1)))[0]
    answer = check.fail if copies > 0.5 * total else check.warn
    return answer(
        measured,
        f"Prompts are duplicated ({first[:40]!r} is there {counts[first]} times): a standard error "
        "clustered by prompt takes each copy for a new prompt and comes out too small.",
        f"Remove the copies from {trial.config.prompts.train}, and raise "
        "rollout.responses_per_prompt instead.",
    )


def leak(trial: Trial) -> Finding:
    """Held-out prompts that are trained on."""
    check = Check("prompts.leak", "no held-out prompt is trained on")
    if not trial.components.heldout:
        return check.skip("There are no held-out prompts.")
    train = {_normalised(prompt) for prompt in trial.components.prompts}
    held = [_normalised(prompt) for prompt in trial.components.heldout]
    leaked = [text for text in held if text in train]
    measured = f"{len(leaked)} of {len(held)} held-out prompts are trained on"
    files = trial.config.prompts
    if not leaked:
        return check.ok(measured)
    answer = check.fail if len(leaked) > 0.05 * len(held) else check.warn
    return answer(
        measured,
        f"The held-out set leaks: {leaked[0][:40]!r} is in both files, so its score is one of "
        "training.",
        "Give prompts.heldout a file of its own: it is the one of prompts.train."
        if files.heldout == files.train
        else f"Remove the prompts of {files.heldout} from {files.train}.",
    )


def chat_template(trial: Trial) -> Finding:
    """A chat model reads its template, once."""
    check = Check("prompts.chat_template", "messages go through the chat template, text does not")
    tokenizer = trial.components.policy.tokenizer
    prompts = [*trial.components.prompts, *trial.components.heldout]
    special = [str(t) for t in tokenizer.all_special_tokens if len(str(t)) > 2]
    marks = [*_marks(tokenizer, trial.config.prompts.chat_template), *special]
    doubled = [p for p in prompts if not isinstance(p.content, str) and _marked(p, marks)]
    if doubled:
        mark = next(m for m in marks if m in text_of(doubled[0].content))
        return check.fail(
            f"{len(doubled)} of {len(prompts)} conversations have a template in their text",
            f"The chat template is applied twice: the content of a message already has {mark!r}, "
            "and the template writes it again.",
            f"Remove {mark!r} from the messages in {_files(trial, doubled)}: the template adds "
            "what belongs around their words.",
        )
    begin, ids = tokenizer.bos_token_id, tokenizer.eos_token_id
    twice = [p for p in prompts if begin is not None and p.ids[:2] == (begin, begin)]
    if twice and begin != ids:
        return check.fail(
            f"{len(twice)} of {len(prompts)} prompts begin with two BOS",
            f"Prompts begin with a doubled BOS: the text has {tokenizer.bos_token!r} and the "
            "tokenizer adds another.",
            f"Remove {tokenizer.bos_token!r} from the prompts in {_files(trial, twice)}.",
        )
    bare = [p for p in prompts if isinstance(p.content, str) and not _marked(p, marks)]
    if tokenizer.chat_template is not None and bare:
        return check.warn(
            f"{len(bare)} of {len(prompts)} prompts are bare text",
            "The chat template is missing: the policy has one and the prompts are plain text that "
            "does not use it.",
            'Write prompts as messages: {"messages": [{"role": "user", "content": …}]}.',
        )
    return check.ok(f"{len(prompts)} prompts")


def tools(trial: Trial) -> Finding:
    """The tools of a prompt are in what the policy reads."""
    check = Check("prompts.tools", "the tools that prompts bring are written by the template")
    prompts = [*trial.components.prompts, *trial.components.heldout]
    bringing = [prompt for prompt in prompts if prompt.columns.get("tools")]
    if not bringing:
        return check.skip("No prompt brings tools.")
    unread = [prompt for prompt in bringing[:_LOOKED_AT] if not _reads_tools(trial, prompt)]
    measured = f"{len(unread)} of {min(len(bringing), _LOOKED_AT)} prompts with tools lose them"
    if not unread:
        return check.ok(measured)
    return check.warn(
        measured,
        "Prompts bring `tools` that the policy does not read: they are plain text, or the chat "
        "template does not write tools.",
        f"Take a template that writes tools (prompts.chat_template), or messages in "
        f"{_files(trial, unread)}.",
    )


def _reads_tools(trial: Trial, prompt: Prompt) -> bool:
    if isinstance(prompt.content, str):
        return False
    without = {name: value for name, value in prompt.columns.items() if name != "tools"}
    ids = encode_prompt(
        prompt.content,
        trial.components.policy.tokenizer,
        f"prompt {prompt.index}",
        None,
        0,
        without,
        trial.config.prompts.chat_template,
    )
    return ids != prompt.ids


def _files(trial: Trial, guilty: list[Prompt]) -> str:
    """Where these prompts stand."""
    components, files = trial.components, trial.config.prompts
    held = {id(prompt) for prompt in components.heldout}
    names = dict.fromkeys(files.heldout if id(p) in held else files.train for p in guilty)
    return " and ".join(map(str, names))


def _normalised(prompt: Prompt) -> str:
    return " ".join(text_of(prompt.content).split()).casefold()


def _marks(tokenizer: PreTrainedTokenizerBase, template: str | None) -> list[str]:
    """What the chat template writes around a message: words that no author types by chance."""
    turn = [{"role": "user", "content": "CONTENT"}]
    arguments = {"add_generation_prompt": True}
    try:
        written = render_chat(
            tokenizer, turn, place="of the check", arguments=arguments, template=template
        )
    except ValueError:  # No template, or none for a conversation of this kind: no marks to find.
        return []
    around = written.replace("CONTENT", " ").split()
    return [mark for mark in around if len(mark) > 2 and not mark.isalpha()]


def _marked(prompt: Prompt, marks: list[str]) -> bool:
    content = prompt.content
    texts = [content] if isinstance(content, str) else [content_text(m) for m in content]
    return any(mark in text for mark in marks for text in texts)
