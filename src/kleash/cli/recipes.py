"""`kleash recipes` and `kleash init`: a configuration to begin with."""

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from kleash.config.recipe_library import recipe_named, recipes
from kleash.errors import ConfigError
from kleash.storage.atomic_files import cannot_write

_Debug = Annotated[bool, Parameter(negative="", help="Show the traceback of an error.")]

recipes_app = App(
    name="recipes",
    help="The configurations that come with the package; `kleash recipes copy NAME` writes one.",
    help_epilogue="Examples:\n\n    kleash recipes\n\n    kleash recipes copy ziegler"
    "\n\n    kleash recipes copy sample-prompts --output prompts.jsonl",
)


@recipes_app.default
def list_recipes(*, debug: _Debug = False) -> None:
    """List every recipe: its name, what it is, what it needs."""
    del debug  # read by `main`
    for recipe in recipes():
        print(f"{recipe.name}\n    {recipe.what}\n    needs {recipe.needs}")


@recipes_app.command(name="copy")
def copy_recipe(name: str, /, *, output: Path | None = None, debug: _Debug = False) -> None:
    """Write a recipe to a file of your own.

    Parameters
    ----------
    name
        Its name in `kleash recipes`.
    output
        The file to write; by default its own name in the working directory.
    """
    del debug
    recipe = recipe_named(name)
    target = output or Path(recipe.path.name)
    write_new(target, recipe.path.read_text(encoding="utf-8"))
    print(target)


def init(model_path: str, /, *, output: Path = Path("kleash.yaml"), debug: _Debug = False) -> None:
    """Write a commented configuration for a model, with what its files say about it.

    Parameters
    ----------
    model_path
        Directory of a Hugging Face causal language model, or its hub name.
    output
        The YAML file to write.
    """
    del debug
    if output.exists():  # before the model is looked at: that can be a download
        raise ConfigError(_in_the_way(output))
    from kleash.cli.console import quiet_libraries
    from kleash.cli.starting_config import facts_of, starting_config

    quiet_libraries()
    write_new(output, starting_config(facts_of(model_path)))
    print(f"{output}: written. Give it prompts and a reward, then: kleash check {output}")


def write_new(path: Path, text: str) -> None:
    """Write a file that must not exist yet, whole or not at all.

    Raises:
        ConfigError: there is something at the path.
        RunError: it cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as stream:
            try:
                stream.write(text)
                stream.flush()
            except OSError:
                path.unlink()
                raise
    except FileExistsError:
        raise ConfigError(_in_the_way(path)) from None
    except OSError as error:
        raise cannot_write(path, error) from error


def _in_the_way(path: Path) -> str:
    return f"{str(path)!r} is there already: give another --output, or move it away"
