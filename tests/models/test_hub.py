"""A name that is neither a path nor a model is said at once, in one sentence."""

from pathlib import Path

import pytest
import tiny_models
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from kleash.errors import ModelError
from kleash.models import hub
from kleash.models.loading import load_config, load_tokenizer


class Hub:
    """Stands for the network: counts the questions and answers each with an error."""

    def __init__(self, error: Exception) -> None:
        self.asked, self._error = 0, error

    def answer(self, *_args: object, **_more: object) -> None:
        self.asked += 1
        raise self._error


def absent() -> RepositoryNotFoundError:
    error = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
    Exception.__init__(error, "404")
    return error


@pytest.mark.parametrize(
    ("error", "reason"),
    [(ConnectionError("refused"), "the hub cannot be reached"), (absent(), "has no such model")],
)
@pytest.mark.parametrize("load", [load_config, load_tokenizer])
def test_the_hub_is_asked_once(monkeypatch, error, reason, load) -> None:
    network = Hub(error)
    monkeypatch.setattr(HfApi, "model_info", network.answer)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("nope", "someone/nope"):
        network.asked = 0
        with pytest.raises(ModelError, match=rf"at '{name}' .*got: nothing there .*{reason}"):
            load(name)
        assert network.asked == 1


@pytest.mark.parametrize("name", ["./nope", "runs/a/nope", "/nope", "nope/", "~/nope", "../nope"])
def test_what_is_a_path_is_not_asked_of_the_hub(monkeypatch, name) -> None:
    network = Hub(AssertionError("asked"))
    monkeypatch.setattr(HfApi, "model_info", network.answer)
    with pytest.raises(
        ModelError, match=r"got: nothing there( \(it is looked for in .*\))?: check the path"
    ):
        load_config(name)
    assert network.asked == 0


def test_offline_is_said(monkeypatch) -> None:
    network = Hub(AssertionError("asked"))
    monkeypatch.setattr(HfApi, "model_info", network.answer)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        load_config("nope")
    assert network.asked == 0


def test_a_directory_is_not_asked_of_the_hub(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(HfApi, "model_info", Hub(AssertionError("asked")).answer)
    load_config(tiny_models.save_model(tmp_path / "a"))
