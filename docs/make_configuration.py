"""Write `docs/configuration.md` from the code: `python docs/make_configuration.py`."""

from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from kleash.config.schema import Config

PAGE = Path(__file__).with_name("configuration.md")
HEAD = """# Configuration

Every key, its default and its sentence. In YAML a section is a mapping; on the command line a key
is `--section.key VALUE`, and `-` and `_` are the same. Unknown keys are refused with the nearest
known one. A run directory holds the resolved configuration as `config.yaml`.

This page is made from the code by `python docs/make_configuration.py`; a test holds it to it.
"""


def page() -> str:
    """The whole page."""
    return HEAD + "\n".join(_section("", Config, "A whole run."))


def _section(prefix: str, section: type[BaseModel], about: str) -> list[str]:
    own: list[str] = []
    inner: list[str] = []
    for name, field in section.model_fields.items():
        found = _inner(field)
        key = f"{prefix}{name}"
        if found is not None:
            label = f"{key}.NAME." if name == "reward_models" else f"{key}."
            inner += _section(label, found, field.description or found.__doc__ or "")
        else:
            sentence = " ".join((field.description or "").split())
            own.append(f"| `{key}` | {_default(field)} | {sentence} |")
    title = prefix.rstrip(".") or "the run"
    head = [
        f"\n## {title}\n",
        " ".join(about.split()),
        "",
        "| key | default | what |",
        "|---|---|---|",
    ]
    return [*head, *own, *inner]


def _inner(field: FieldInfo) -> type[BaseModel] | None:
    candidates: list[Any] = [field.annotation, *get_args(field.annotation)]
    for candidate in candidates:
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "*required*"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined or value is None:
        return "none"
    return f"`{value}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
