"""Files that come from others: whatever is wrong with them is said in one sentence.

Each row breaks one file of a model that opens. What the library raises for it is anything from a
TypeError to a bare Exception.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models

from kleash.errors import ModelError
from kleash.models.judge_loading import load_judge
from kleash.models.policy import load_policy

pytestmark = pytest.mark.filterwarnings("ignore")

SETTINGS = "config.json"
TOKENS, TOKENIZER, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
BROKEN: list[tuple[str, Any, str]] = [
    (SETTINGS, {"hidden_size": "abc"}, "'hidden_size' expected int, got str"),
    (SETTINGS, {"num_attention_heads": 0}, "ZeroDivisionError"),
    (SETTINGS, {"num_attention_heads": 3}, "not a multiple of"),
    (SETTINGS, {"vocab_size": None}, "'vocab_size' expected int, got NoneType"),
    (SETTINGS, {"eos_token_id": [1, "a"]}, "'eos_token_id'"),
    (SETTINGS, {"dtype": "float7"}, "float7"),
    (SETTINGS, {"quantization_config": "x"}, "no attribute 'to_dict'"),
    (SETTINGS, {"id2label": [1]}, "no attribute 'items'"),
    (SETTINGS, {"num_hidden_layers": 1}, r"every layer .* got none for model\.layers\.1\."),
    (SETTINGS, "null", "'NoneType'"),
    (TOKENS, "null", "a tokenizer at"),
    (TOKENS, {"model": []}, "did not match"),
    (TOKENIZER, "null", "a tokenizer at"),
    (TOKENIZER, "[]", "a tokenizer at"),
    (TOKENIZER, {"eos_token": 3}, "eos_token has to be"),
    (TOKENIZER, {"chat_template": [1]}, "a tokenizer at"),
    (GENERATION, {"eos_token_id": "a"}, r"token ids as eos_token_id of Llama.*, got 'a'"),
    (GENERATION, {"eos_token_id": [[1]]}, r"token ids as eos_token_id of Llama.*, got \[\[1\]\]"),
    (GENERATION, "{", r"JSON object in .*generation_config.json', which says what ends a text"),
    (GENERATION, "[1]", "a list; copy it from where the model began"),
]


def broken(folder: Path, base: Path, file: str, change: Any) -> Path:
    shutil.copytree(base, folder)
    path = folder / file
    if isinstance(change, dict):
        change = json.dumps(json.loads(path.read_text()) | change)
    path.write_text(change)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_classifier(tmp_path_factory.mktemp("judge") / "model")


@pytest.mark.parametrize(("file", "change", "said"), BROKEN)
def test_a_file_that_cannot_be_used(
    file: str, change: Any, said: str, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        load_policy(broken(tmp_path / "model", base, file, change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("file", "change", "said"), [row for row in BROKEN if row[0] == SETTINGS])
def test_a_judges_settings_that_cannot_be_used(
    file: str, change: Any, said: str, judge: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        load_judge(broken(tmp_path / "model", judge, file, change))
    assert "\n" not in str(caught.value)


def test_what_is_not_broken_opens(base: Path, judge: Path) -> None:
    load_policy(base)
    load_judge(judge)
