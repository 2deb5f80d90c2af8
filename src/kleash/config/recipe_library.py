"""The recipes that come with the package: which there are, what each needs, where each lies.

A recipe is a configuration whose opening comment says what it is, what it rests on, what it needs
and how to run it. The two files of sample prompts beside them are listed and copied alike.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from kleash.errors import ConfigError, UsageError

FOLDER = Path(__file__).with_name("recipes")
_SAMPLES = {
    "sample-prompts": ("24 openings of a text, one `prompt` a line", "a model that continues text"),
    "sample-chat-prompts": (
        "24 requests of a user, as chat messages",
        "a model whose tokenizer has a chat template",
    ),
}


@dataclass(frozen=True)
class Recipe:
    """One file that comes with the package."""

    name: str
    path: Path
    what: str
    """One line."""
    needs: str
    """One line."""


def recipes() -> list[Recipe]:
    """Every recipe by name, then the sample prompts.

    Example:
        >>> [recipe.name for recipe in recipes()][:2]
        ['distill', 'embedded-world']
    """
    found = [_described(path) for path in sorted(FOLDER.glob("*.yaml"), key=lambda p: p.stem)]
    samples = [
        Recipe(name, FOLDER / f"{name}.jsonl", what, needs)
        for name, (what, needs) in _SAMPLES.items()
    ]
    return found + samples


def recipe_named(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        UsageError: there is none of that name.
    """
    known = {recipe.name: recipe for recipe in recipes()}
    if name not in known:
        raise UsageError(f"expected the name of a recipe, got {name!r}{_nearest(name, known)}")
    return known[name]


def configuration_file(argument: str) -> Path:
    """The file that CONFIG on the command line means: one that is there, or a recipe by its name.

    A file comes before a recipe of the same name. What has a folder or an ending in its name can
    only be a file.

    Raises:
        ConfigError: a plain name is neither a file nor a recipe.

    Example:
        >>> configuration_file("stories").name, str(configuration_file("mine.yaml"))
        ('stories.yaml', 'mine.yaml')
    """
    path = Path(argument)
    if path.exists() and not path.is_dir():
        return path
    known = {recipe.name: recipe for recipe in recipes() if recipe.path.suffix == ".yaml"}
    if argument in known:
        return known[argument].path
    if path.exists() or path.suffix or path.name != argument:
        return path
    raise ConfigError(
        f"expected a YAML file or the name of a recipe, got {argument!r}"
        f"{_nearest(argument, known)}; `kleash recipes` lists them"
    )


def _described(path: Path) -> Recipe:
    """A recipe from its opening comment: the first line, and what stands behind `Needs`."""
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").rstrip())
    needs: list[str] = []
    for line in lines:
        if line.startswith(" Needs "):
            needs.append(line.removeprefix(" Needs "))
        elif needs and line.startswith("      "):
            needs.append(line)
        elif needs:
            break
    return Recipe(path.stem, path, lines[0].strip(), " ".join(" ".join(needs).split()))


def _nearest(name: str, known: dict[str, Recipe]) -> str:
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    return f": did you mean {close[0]}?" if close else f": there are {', '.join(known)}"
