"""What comes with the package is listed, copied and trained by name; a model gets a first YAML."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import yaml

from kleash.cli.console import split_overrides
from kleash.cli.main import app
from kleash.cli.starting_config import ModelFacts, starting_config
from kleash.config.loading import load_config
from kleash.config.recipe_library import FOLDER, configuration_file, recipes
from kleash.errors import ConfigError, KleashError, ModelError, UsageError
from kleash.preflight.runner import check
from kleash.rollout.prompts import prompt_content

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_every_file_of_the_folder_is_listed_with_one_line_and_what_it_needs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    app(["recipes"])
    printed = capsys.readouterr().out.splitlines()
    assert sorted(printed[0::3]) == sorted(path.stem for path in FOLDER.iterdir())
    assert all(len(line) < 110 for line in printed)
    assert all(line.startswith("    needs ") and len(line) > 16 for line in printed[2::3])


def test_a_copy_is_the_recipe_and_never_takes_the_place_of_a_file() -> None:
    app(["recipes", "copy", "ziegler"])
    assert Path("ziegler.yaml").read_bytes() == (FOLDER / "ziegler.yaml").read_bytes()
    Path("mine.yaml").write_text("mine")
    for arguments in (["ziegler"], ["ziegler", "--output", "mine.yaml"]):
        with pytest.raises(ConfigError, match="is there already"):
            app(["recipes", "copy", *arguments])
    assert Path("mine.yaml").read_text() == "mine"
    app(["recipes", "copy", "sample-prompts", "--output", "prompts.jsonl"])
    assert len(Path("prompts.jsonl").read_text().splitlines()) == 24


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        (["copy", "storys"], UsageError, "'storys': did you mean stories?"),
        (["copy", "xyzxyz"], UsageError, "there are distill, .*sample-chat-prompts"),
        (["copy", "../ziegler"], UsageError, "the name of a recipe, got '../ziegler'"),
        (["copy", "ziegler", "--output", "no/where.yaml"], KleashError, "cannot write 'no/where"),
        (["copy", "ziegler", "--output", "."], ConfigError, "is there already"),
    ],
)
def test_what_cannot_be_copied_is_said_in_one_sentence(
    tmp_path: Path, arguments: list[str], error: type[KleashError], sentence: str
) -> None:
    with pytest.raises(error, match=sentence) as caught:
        app(["recipes", *arguments])
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_plain_name_is_a_recipe_unless_a_file_has_it() -> None:
    path, overrides = split_overrides(("stories", "--steps", "2"))
    assert (path, overrides) == (FOLDER / "stories.yaml", {"steps": "2"})
    Path("ziegler").mkdir()  # a folder is no configuration
    assert configuration_file("ziegler") == FOLDER / "ziegler.yaml"
    Path("stories").write_text("a: file")
    assert configuration_file("stories") == Path("stories")
    assert configuration_file("recipes/stories") == Path("recipes/stories")
    assert configuration_file("stories.yaml") == Path("stories.yaml")
    with pytest.raises(ConfigError, match="got 'storie': did you mean stories"):
        configuration_file("storie")
    with pytest.raises(ConfigError, match="recipe, got 'sample-prompts'"):
        configuration_file("sample-prompts")


def test_the_folder_of_recipes_in_a_checkout_is_the_packages_own() -> None:
    assert (ROOT / "recipes").resolve() == FOLDER.resolve()


def test_the_sample_prompts_are_prompts_and_no_two_are_the_same() -> None:
    for recipe in recipes():
        if recipe.path.suffix == ".jsonl":
            rows = [json.loads(line) for line in recipe.path.read_text().splitlines()]
            contents = [prompt_content(row, "a row") for row in rows]
            assert len({str(content) for content in contents}) == 24
            assert all(isinstance(each, list) == ("chat" in recipe.name) for each in contents)


def saved_model(*, chat: bool) -> Path:
    """A tiny model that reads any text, in `models/sft`."""
    folder = Path("models/sft")
    template = tiny_models.CHAT_TEMPLATE if chat else None
    tokenizer = tiny_models.tokenizer(chat_template=template)
    return tiny_models.save_model(folder, "llama", tok=tokenizer)


@pytest.mark.parametrize("chat", [False, True])
def test_what_init_writes_passes_the_check_once_prompts_are_there(chat: bool) -> None:
    folder = saved_model(chat=chat)
    app(["init", str(folder), "--output", "run.yaml"])
    text = Path("run.yaml").read_text(encoding="utf-8")
    assert "context 64" in text
    assert ("a chat template" in text) != ("no chat template" in text)
    contents = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9", "w3 w1"]
    rows = [[{"role": "user", "content": c}] if chat else c for c in contents]
    lines = "".join(json.dumps({"prompt": row}) + "\n" for row in rows)
    Path("prompts.jsonl").write_text(lines, encoding="utf-8")
    config = load_config(Path("run.yaml"), {}, base=Path("run.yaml"))
    assert config.policy.path == str(folder)
    assert config.rollout.max_new_tokens == 16  # a quarter of the context
    report = check(config, quick=True)
    assert report.fails == ()


def test_init_refuses_what_is_there_and_what_is_no_model() -> None:
    Path("kleash.yaml").write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        app(["init", "nowhere/at/all"])
    assert Path("kleash.yaml").read_text() == "mine"
    with pytest.raises(ModelError, match="nothing there"):
        app(["init", "nowhere/at/all", "--output", "other.yaml"])
    assert not Path("other.yaml").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts | {"path": 'odd "name": #1\n{x}\\'},
        lambda facts: facts | {"architecture": "llama\npolicy: {path: /elsewhere}"},
        lambda facts: facts | {"context": None},
        lambda facts: facts | {"context": 2},
        lambda facts: facts | {"path": "/", "chat": True},
    ],
)
def test_names_from_outside_stay_names(
    change: Callable[[dict[str, object]], dict[str, object]],
) -> None:
    facts = change({"path": "models/sft", "architecture": "llama", "context": 64, "chat": False})
    text = starting_config(ModelFacts(**facts))  # pyright: ignore[reportArgumentType]
    Path("run.yaml").write_text(text, encoding="utf-8")
    Path("prompts.jsonl").write_text('{"prompt": "hello"}\n', encoding="utf-8")
    assert yaml.safe_load(text)["policy"]["path"] == facts["path"]
    config = load_config(Path("run.yaml"), {}, base=Path("run.yaml"))
    assert config.rollout.max_new_tokens == {None: 128, 2: 1, 64: 16}[facts["context"]]  # pyright: ignore
