"""What every page is made of: its template, its policy, text that cannot run, numbers in words.

A page is one file that needs no network and asks for none: its content security policy admits
exactly the style and the script it was written with, by their hashes. Text from models, prompts and
configurations is untrusted: it enters through autoescaping or as JSON that the script only
ever shows as text.
"""

import base64
import hashlib
import math
import re
from datetime import datetime
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from kleash.report.svg_chart import Drawing, format_number, format_with_error
from kleash.storage.atomic_files import plain_json


def render_page(template: str, script: str | None, data: dict[str, Any], **values: Any) -> str:
    """Fill a template, with the style, a script and the data that it shows.

    Args:
        template: a file of `templates/`.
        script: a file of `templates/`; None: the page has none.
        data: plain values for the script.
        values: what the template names.
    """
    style, code = _resource("page.css"), "" if script is None else _resource(script)
    return (
        _environment()
        .get_template(template)
        .render(
            style=Markup(style),
            script=Markup(code),
            style_hash=_hash(style),
            script_hash=_hash(code),
            data=Markup(_embed(data)),
            **values,
        )
    )


def pointer_data(drawing: Drawing) -> dict[str, Any]:
    """What the page needs to say the numbers under the pointer."""
    return {
        "unit": drawing.chart.unit,
        "x": drawing.chart.x_title,
        "domain": list(drawing.x_domain),
        "series": [
            {
                "name": one.name,
                "colour": one.colour,
                "style": one.style,
                "points": [
                    [_digits(p.x), _digits(p.y), None if p.error is None else _digits(p.error)]
                    for p in one.points
                ],
            }
            for one in drawing.chart.series
        ],
        "marks": [[_digits(one.x), one.kind, one.text] for one in drawing.chart.marks],
    }


def _digits(value: float) -> float:
    return float(f"{value:.6g}")


def _embed(data: dict[str, Any]) -> str:
    """JSON that cannot leave its script element, whatever its strings hold."""
    text = plain_json(data)
    # plain_json is ASCII, which covers U+2028 and U+2029; these three end or open markup.
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _resource(name: str) -> str:
    return (files("kleash.report") / "templates" / name).read_text(encoding="utf-8")


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kleash.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Typed by jinja2 as a union of its own filters.
    filters: dict[str, Any] = environment.filters
    filters |= {
        "duration": _duration,
        "error": _error,
        "marked": _marked,
        "moment": _moment,
        "number": _number,
        "per_row": _per_row,
        "percent": "{:.0%}".format,
        "plus_minus": _plus_minus,
        "probability": _probability,
        "share": _share,
        "short_path": short_path,
        "slug": _slug,
        "visible": visible,
        "with_error": _with_error,
    }
    return environment


def short_path(path: str) -> str:
    """The two last telling parts of a path, for a heading; a hub name and a file stay as they are.

    Example:
        >>> short_path("/data/runs/leashed/checkpoints/step-000040/policy")
        'leashed/step-000040'
        >>> short_path("org/name"), short_path("recipes/stories.yaml")
        ('org/name', 'recipes/stories.yaml')
    """
    parts = [part for part in path.split("/") if part]
    if len(parts) <= 2:
        return path
    telling = [part for part in parts if part not in ("checkpoints", "policy")]
    return "/".join((telling or parts)[-2:])


def _per_row(charts: int) -> str:
    """Class of a row of charts: as many in a row as leave no chart alone in the last."""
    counts = (3, 4, 2)
    fits = next((count for count in counts if charts % count != 1), 3)
    return f"by{2 if charts == 4 else fits}"


def _number(value: float | int | None) -> str:
    return "—" if value is None else format_number(float(value))


def _marked(text: str) -> str:
    """A token with its spaces and line ends to be seen.

    Example:
        >>> _marked(" the\\n")
        '␣the⏎'
    """
    return text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")


def _share(probability: float) -> str:
    return f"{100 * probability:.3g} %"


def _probability(logprob: float) -> str:
    return f"{100 * math.exp(logprob):.2g} %"


def _plus_minus(one: Any) -> str:
    """Mean ± half of an interval."""
    if one.half_width is None:
        return format_number(one.mean)
    return format_with_error(one.mean, one.half_width)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _with_error(value: float | None, error: float | None) -> str:
    if value is None or error is None:
        return _number(value)
    return format_with_error(float(value), float(error))


def _error(value: float, error: float) -> str:
    return format_with_error(float(value), float(error)).split(" ± ")[1]


def _moment(text: object) -> str:
    """A time from run.json for people; whatever else stands there is shown as it is."""
    try:
        return datetime.fromisoformat(str(text)).strftime("%Y-%m-%d %H:%M %Z").strip()
    except ValueError:
        return str(text)


def _duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "—"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def visible(text: str) -> str:
    """Show what would not show, or would mislead: controls, direction marks, lone surrogates.

    Example:
        >>> visible("a\\x00b \\u202e \\ud800")
        'a[U+0000]b [U+202E] [U+D800]'
    """
    return "".join(f"[U+{ord(c):04X}]" if _is_hidden(c) else c for c in text)


def _is_hidden(character: str) -> bool:
    code = ord(character)
    return (
        (code < 0x20 and character not in "\n\t")
        or 0x7F <= code <= 0x9F
        or code in (0x061C, 0x200B, 0x200E, 0x200F, 0x2028, 0x2029, 0x2060, 0xFEFF)
        or 0x202A <= code <= 0x202E
        or 0x2066 <= code <= 0x2069
        or 0xD800 <= code <= 0xDFFF
    )
