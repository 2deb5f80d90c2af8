"""Write `docs/configuration.md` from the code: `python docs/make_configuration.py`."""

from pathlib import Path

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from kleash.config.keys import inner_sections
from kleash.config.schema import Config, RewardConfig
from kleash.config.section import Section

PAGE = Path(__file__).with_name("configuration.md")
HEAD = """# Configuration

Every key, its default and its sentence. In YAML a section is a mapping; on the command line a key
is `--section.key VALUE`, and `-` and `_` are the same. Unknown keys are refused with the nearest
known one. A run directory holds the resolved configuration as `config.yaml`,
with every value in force: `auto` is written as what it stands for where that follows from other
keys, and keys that have no effect are left out. Giving a key that has no effect is an error.

**The command line and the file.** An override wins over the file. `--section.key none` takes a key
of the file away, or switches off what is on by default. A run has one kind of leash, so
`--leash.beta`, `--leash.target-kl`, `--leash.target-kl-per-token`, `--leash.schedule` and
`--leash.groups` take the place of the file's kind, and of its keys that then do nothing; each key
that is left out so is named on the terminal. Nothing else in the file is ever dropped.

**Relative paths.** A path, or the module of a `module:function`, is sought beside the YAML file
that names it, then in the working directory; one on the command line in the working directory
alone.

**Algorithms.** `algorithm` knows the keys of the algorithm it names: `algorithm: grpo` is short for
`algorithm: {name: grpo}`, and `algorithm: {epochs: 4}` for `algorithm: {name: ppo, epochs: 4}`. On
the command line `--algorithm grpo` changes the name and `--algorithm.epochs 4` a key.

**Resuming.** A run may be continued with another value of `steps` (if `optimizer.schedule` is
constant), `logging.*`, `distributed.*`, `heldout.every`, `output`, `device`, `rollout.engine`,
`rollout.vllm.*`,
`rollout.microbatch_size`, `rollout.microbatch_tokens`,
`algorithm.microbatch_size`, `algorithm.microbatch_tokens`,
`algorithm.keep_logits_mib`, `tripwires.undo` and
`tripwires.undo_copy_mib`: no step already made would have been
another one, up to rounding and random draws.

This page is made from the code by `python docs/make_configuration.py`; a test holds it to it.
"""


def page() -> str:
    """The whole page."""
    return HEAD + "\n".join(_section("", Config, "A whole run."))


def _section(prefix: str, section: type[Section], about: str, title: str = "") -> list[str]:
    own: list[str] = []
    inner: list[str] = []
    for name, field in section.model_fields.items():
        found, key = _inner(name, field), f"{prefix}{name}"
        for one in found:
            label = f"{key}.NAME." if name == "reward_models" else f"{key}."
            several = f"{key}: {one.model_fields['name'].default}" if len(found) > 1 else ""
            inner += _section(label, one, field.description or one.__doc__ or "", several)
        if not found:
            sentence = " ".join((field.description or "").split())
            own.append(f"| `{key}` | {_default(field)} | {sentence} |")
    head = [
        f"\n## {title or prefix.rstrip('.') or 'the run'}\n",
        " ".join(about.split()),
        "",
        "| key | default | what |",
        "|---|---|---|",
    ]
    return [*head, *own, *inner]


def _inner(name: str, field: FieldInfo) -> tuple[type[Section], ...]:
    return (RewardConfig,) if name == "reward_models" else inner_sections(field)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "*required*"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined or value is None:
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
