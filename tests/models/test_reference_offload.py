"""Wherever the reference lives it says the same, and it can prove which one it is."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM

import kleash.models.loading
from kleash.errors import ModelError
from kleash.models.loading import load_causal_lm
from kleash.models.lora import AdapterSpec
from kleash.models.merging import merge_adapter
from kleash.models.policy import Policy, Reference, freeze_copy, load_policy, load_reference
from kleash.models.reference_offload import (
    FrozenReference,
    OffloadedReference,
    anchor_at,
    open_cache,
    underlying,
)
from kleash.rollout.scoring_pass import score
from kleash.types import Rollout, ScoredRollout

LORA = AdapterSpec(rank=4, alpha=8, targets=("q_proj", "v_proj"))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def sft(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that supervised training might have left: it does change the model."""
    policy = load_policy(base, adapter=LORA)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.normal_(std=0.3)
    folder = tmp_path_factory.mktemp("models") / "sft"
    policy.save(folder)
    return folder


def rollout() -> Rollout:
    torch.manual_seed(5)
    ids = torch.randint(3, 24, (6, 9))
    lengths = torch.tensor([9, 1, 4, 9, 7, 2])
    given = torch.tensor([5, 2, 5, 1, 3, 4])
    return Rollout(
        prompt_ids=torch.randint(3, 24, (6, 5)),
        prompt_mask=torch.arange(5) >= 5 - given[:, None],
        response_ids=ids,
        response_mask=torch.arange(9) < lengths[:, None],
        ended=torch.ones(6) > 0,
        prompt_index=torch.arange(6),
    )


def read(policy: Policy, reference: FrozenReference, microbatch: int = 4) -> ScoredRollout:
    scores = torch.zeros(6)
    return score(
        rollout(),
        policy=policy,
        reference=reference,
        scores=scores,
        temperature=0.7,
        microbatch=microbatch,
    )


def moved(policy: Policy) -> Policy:
    """Some way from its reference, as training would take it."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return policy


def test_every_back_end_gives_the_same_numbers(base: Path, sft: Path, tmp_path: Path) -> None:
    """The one of base + SFT adapter, whose weights are put together here by hand."""
    model = AutoModelForCausalLM.from_pretrained(base)
    stored = kleash.models.loading.load_config(base)
    adapter = {
        name.removeprefix("base_model.model."): tensor
        for name, tensor in _tensors(sft / "adapter_model.safetensors").items()
    }
    for name in {name.split(".lora_")[0] for name in adapter}:
        a, b = (adapter[f"{name}.lora_{side}.weight"] for side in "AB")
        model.get_submodule(name).weight.data += (LORA.alpha / LORA.rank) * b @ a
    by_hand = tmp_path / "by hand"
    model.save_pretrained(by_hand)
    tiny_models.tokenizer().save_pretrained(by_hand)
    assert stored.vocab_size == model.config.vocab_size

    policy = load_policy(base, adapter=LORA, merge=str(sft))
    off = freeze_copy(policy)
    moved(policy)
    own = load_reference(base, merge=str(sft))
    expected = read(policy, load_reference(by_hand))
    assert float(expected.kl.max()) > 0.01
    cached = open_cache(load_reference(base, merge=str(sft)), tmp_path / "cache")
    offloaded = OffloadedReference(load_reference(base, merge=str(sft)), CPU)
    for reference in (off, own, offloaded, cached, cached):
        got = read(policy, reference)
        torch.testing.assert_close(got.ref_logprobs, expected.ref_logprobs, atol=1e-5, rtol=0)
        torch.testing.assert_close(got.kl, expected.kl, atol=1e-5, rtol=0)
    identities = [r.identity() for r in (off, own, offloaded, cached)]
    assert len({identity.sha256 for identity in identities}) == 1
    assert {identity.merged for identity in identities} == {str(sft)}


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def test_a_merged_policy_without_a_new_adapter_learns_whole(base: Path, sft: Path) -> None:
    policy = load_policy(base, merge=str(sft))
    assert len(policy.parameters()) == len(list(policy.model.parameters()))


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("missing", r"expected an adapter saved by peft in .*got no adapter_model.safetensors"),
        ("another model", r"expected an adapter for LlamaForCausalLM in"),
        ("damaged", r"expected an adapter for LlamaForCausalLM in"),
    ],
)
def test_an_adapter_that_does_not_fit(
    base: Path, sft: Path, tmp_path: Path, fault: str, sentence: str
) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    if fault != "missing":
        for file in sft.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    if fault == "another model":
        config = json.loads((sft / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    if fault == "damaged":
        weights = folder / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
    model = load_causal_lm(base, dtype="float32", device="cpu", attention="auto")
    with pytest.raises(ModelError, match=sentence):
        merge_adapter(model, folder)


def test_offloaded_weights_stay_and_readings_happen_on_the_device(base: Path) -> None:
    """`meta` is a device that every machine has; it computes shapes and no numbers."""
    meta = torch.device("meta")
    reference = OffloadedReference(load_reference(base), meta)
    part = rollout()
    tensors = (part.prompt_ids, part.prompt_mask, part.response_ids)
    ones = torch.ones_like(part.prompt_mask), torch.ones_like(part.response_mask)
    # Without padding, so that no value has to be looked at to find that out.
    hidden = torch.no_grad()(reference.hidden_states)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "__bool__", lambda _: True)
        states = hidden(
            tensors[0].to(meta), ones[0].to(meta), tensors[2].to(meta), ones[1].to(meta)
        )
    assert states.device == meta
    assert states.shape == (6, 10, 16)
    assert reference.head.weight.device == meta
    assert {p.device for p in underlying(reference).model.parameters()} == {CPU}
    assert reference.fingerprint() == load_reference(base).fingerprint()


def test_what_is_cached_is_not_read_again(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = rollout()
    tensors = part.prompt_ids, part.prompt_mask, part.response_ids, part.response_mask
    cached = open_cache(load_reference(base), tmp_path / "cache")
    first = cached.hidden_states(*tensors)
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 6

    def never(*_: Any) -> None:
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr(Reference, "hidden_states", never)
        again = open_cache(load_reference(base), tmp_path / "cache")
        # Whatever the batch: the numbers are those of the first reading, to the last bit.
        for rows in ([0, 1, 2, 3, 4, 5], [4, 2], [3], [5, 5, 0]):
            assert torch.equal(again.hidden_states(*(t[rows] for t in tensors)), first[rows])
    # One text is gone: its batch is read again, and the other's numbers stay.
    file = sorted((tmp_path / "cache").glob("*.safetensors"))[0]
    file.unlink()
    other = torch.cat([again.hidden_states(*(t[[i, i + 1]] for t in tensors)) for i in (0, 2, 4)])
    assert int((other == first).all(dim=(1, 2)).sum()) >= 5
    torch.testing.assert_close(other, first)
    assert file.exists()


def test_a_cache_belongs_to_one_reference(base: Path, tmp_path: Path) -> None:
    open_cache(load_reference(base), tmp_path / "cache")
    other = load_reference(tiny_models.save_model(tmp_path / "other", seed=1))
    with pytest.raises(ModelError, match=r"belongs to another reference: .*base.* got .*other"):
        open_cache(other, tmp_path / "cache")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "letters.txt").touch()
    with pytest.raises(ModelError, match="expected an empty directory or a cache"):
        open_cache(other, tmp_path / "taken")


def test_a_damaged_cache_file_is_named(base: Path, tmp_path: Path) -> None:
    policy, cached = load_policy(base), open_cache(load_reference(base), tmp_path / "cache")
    read(policy, cached)
    file = sorted((tmp_path / "cache").glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match=f"cache file .*{file.name}.* is damaged"):
        read(policy, cached)


@pytest.mark.parametrize("adapter", [None, LORA], ids=["whole", "adapter"])
@pytest.mark.parametrize("kind", ["copy", "offloaded"])
def test_an_anchor_is_the_policy_then_and_stays(
    base: Path, adapter: AdapterSpec | None, kind: str
) -> None:
    policy = load_policy(base, adapter=adapter)
    original: FrozenReference = load_reference(base)
    if kind == "offloaded":
        original = OffloadedReference(load_reference(base), CPU)
    moved(policy)
    anchor = anchor_at(policy, 3, like=original)
    assert type(anchor) is type(original)
    assert float(read(policy, anchor).kl.abs().max()) < 1e-6
    before = anchor.fingerprint(), anchor.identity()
    assert before[1].how == "policy after step 3"
    moved(policy)
    assert (anchor.fingerprint(), anchor.identity()) == before
    assert float(read(policy, anchor).kl.max()) > 1e-3
    # An anchor's own adapter is part of what it is.
    name, weights = list(underlying(anchor).model.named_parameters())[-1]
    with torch.no_grad():
        weights.view(-1)[0] += 1
    assert anchor.fingerprint() != before[0], name


def test_all_are_references(base: Path, tmp_path: Path) -> None:
    plain = load_reference(base)
    assert isinstance(plain, FrozenReference)
    assert isinstance(OffloadedReference(plain, CPU), FrozenReference)
    assert isinstance(open_cache(plain, tmp_path / "c"), FrozenReference)


def test_a_revision_reaches_the_hub_and_the_identity(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No network: the library's loaders are replaced by ones that note what they were asked."""
    monkeypatch.setattr(kleash.models.loading, "require_source", lambda *_: None)
    asked: list[str] = []

    def local(auto: Any) -> Any:
        inner = auto.from_pretrained

        def from_pretrained(path: str, **kwargs: Any) -> Any:
            if path == "someone/model":
                asked.append(kwargs.pop("revision"))
            return inner(str(base), **kwargs)

        return from_pretrained

    for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"):
        auto = getattr(kleash.models.loading, name)
        monkeypatch.setattr(auto, "from_pretrained", local(auto))
    policy = load_policy("someone/model", revision="v2")
    assert set(asked) == {"v2"}
    assert policy.identity().revision == "v2"
    assert freeze_copy(policy).identity().revision == "v2"
    assert load_reference("someone/model", revision="v3").identity().revision == "v3"
    assert dataclasses.asdict(policy.identity())["path"] == "someone/model"
    load_policy("someone/model")
    assert asked[-1] == "main"


def test_a_directory_has_no_revisions(base: Path) -> None:
    with pytest.raises(ModelError, match="a hub name with revision 'v2', got the directory"):
        load_reference(base, revision="v2")
