"""What goes to the hub: seen by a stand-in for its client."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small_run
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from kleash.cli import main as cli
from kleash.errors import ModelError, RunError
from kleash.models.publishing import push_run, require_complete
from kleash.training.loop import train


class Hub:
    """Keeps what is uploaded as the hub would, or refuses it."""

    def __init__(self, folder: Path, *, refuses: bool = False):
        self.folder, self.refuses, self.calls = folder, refuses, list[dict[str, Any]]()

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        if self.refuses:
            answer: Any = SimpleNamespace(headers={}, request=None)
            raise HfHubHTTPError("403 Forbidden", response=answer)
        self.calls.append({"repo": repo_id, "private": private, "exist_ok": exist_ok})

    def upload_folder(self, *, folder_path: str, ignore_patterns: list[str], **rest: Any) -> None:
        ignored = shutil.ignore_patterns(*(p.removesuffix("/*") for p in ignore_patterns))
        shutil.copytree(folder_path, self.folder, ignore=ignored)
        self.calls.append(rest)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("publishing")
    texts = small_run.two_words(range(8))
    material = small_run.save_material(folder, prompts=texts, heldout=texts[:3])
    changes = {"steps": 2, "logging": {"checkpoint_every": 1}}
    return train(small_run.settings(material, folder / "run", **changes))


def test_all_that_others_need_goes_up_and_opens(run: Path, tmp_path: Path) -> None:
    hub = Hub(tmp_path / "hub")
    where = push_run(run, "someone/model", client=hub)
    assert where.endswith("/someone/model")
    created, uploaded = hub.calls
    assert created == {"repo": "someone/model", "private": True, "exist_ok": True}
    assert uploaded["commit_message"] == "Policy after step 2, from kleash"
    model = AutoModelForCausalLM.from_pretrained(hub.folder)
    assert sum(p.numel() for p in model.parameters()) > 0
    assert AutoTokenizer.from_pretrained(hub.folder)("w3").input_ids
    assert GenerationConfig.from_pretrained(hub.folder).eos_token_id is not None
    card = (hub.folder / "README.md").read_text()
    for said in ("reference", "β in force", "95 % interval", "score"):
        assert said in card


def test_a_checkpoint_without_a_card_is_refused(run: Path, tmp_path: Path) -> None:
    hub = Hub(tmp_path / "hub")
    policy = shutil.copytree(run / "checkpoints" / "step-000002" / "policy", tmp_path / "policy")
    require_complete(policy)
    (policy / "README.md").unlink()
    with pytest.raises(ModelError, match=r"got none of README\.md; the card is written where"):
        require_complete(policy)
    with pytest.raises(RunError, match=r"a checkpoint of step 7 .* got those of steps 1, 2"):
        push_run(run, "someone/model", client=hub, step=7)
    assert hub.calls == []


def test_a_damaged_checkpoint_stays_here(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "checkpoints" / "step-000002" / "policy" / "generation_config.json").unlink()
    hub = Hub(tmp_path / "hub")
    with pytest.raises(RunError, match=r"generation_config\.json is missing"):
        push_run(copy, "someone/model", client=hub)
    assert hub.calls == []


def test_the_hubs_refusal_is_one_sentence(run: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"expected the hub to take 'a/b', got HfHubHTTPError: 403"
    ):
        push_run(run, "a/b", client=Hub(tmp_path / "hub", refuses=True))


def test_an_adapter_on_a_local_base_is_refused_and_has_its_generation_settings(
    tmp_path: Path,
) -> None:
    texts = small_run.two_words(range(8))
    material = small_run.save_material(tmp_path, prompts=texts, heldout=texts[:3])
    changes = {"steps": 1, "policy": {"lora": {"rank": 2}}}
    run = train(small_run.settings(material, tmp_path / "run", **changes))
    hub = Hub(tmp_path / "hub")
    with pytest.raises(ModelError, match=r"an adapter whose base is on the hub, got '/"):
        push_run(run, "someone/adapter", client=hub)
    policy = run / "checkpoints" / "step-000001" / "policy"
    assert json.loads((policy / "generation_config.json").read_text())
    assert hub.calls == []


def test_the_command_pushes(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    cli.app(["push", str(run), "someone/model", "--public"])
    assert capsys.readouterr().out.strip() == "https://huggingface.co/someone/model"
    assert hub.calls[0]["private"] is False
