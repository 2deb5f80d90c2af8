"""An embedding's gradient where it belongs: autograd's own sums, without its matrices."""

from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from kleash.models.gradients_in_place import embedding_gradient_in_place

PADDING = 7


def model_of(*, tied: bool, padding: int | None) -> Any:
    torch.manual_seed(0)
    config = tiny_models.config("llama", 20, tie_word_embeddings=tied, num_hidden_layers=1)
    model = AutoModelForCausalLM.from_config(config).double()
    model.get_input_embeddings().padding_idx = padding
    return model


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("padding", [None, PADDING])
@pytest.mark.parametrize("tied", [True, False])
def test_sums_are_those_of_autograd(tied: bool, padding: int | None) -> None:
    ids = torch.randint(0, 9, (2, 3, 11), generator=torch.Generator().manual_seed(1))
    assert (ids == PADDING).any()
    found: list[dict[str, torch.Tensor]] = []
    for in_place in (False, True):
        model = model_of(tied=tied, padding=padding)
        for microbatch in ids:
            if in_place:
                with embedding_gradient_in_place(SimpleNamespace(model=model)):
                    loss = model(input_ids=microbatch).logits.square().mean()
            else:
                loss = model(input_ids=microbatch).logits.square().mean()
            loss.backward()
        found.append(gradients(model))
        assert "forward" not in vars(model.get_input_embeddings())
    ordinary, added = found
    for name, gradient in ordinary.items():
        torch.testing.assert_close(added[name], gradient, atol=1e-14, rtol=1e-12)


def test_no_matrix_of_the_vocabulary_is_made_beside_the_gradient() -> None:
    """Autograd is handed nothing to add, and what there is already stays the same tensor."""
    model = model_of(tied=False, padding=None)
    weight = model.get_input_embeddings().weight
    weight.grad = torch.zeros_like(weight)
    before, handed = weight.grad, list[torch.Tensor | None]()
    weight.register_hook(handed.append)
    with embedding_gradient_in_place(SimpleNamespace(model=model)):
        model(input_ids=torch.tensor([[1, 2]])).logits.square().mean().backward()
    assert weight.grad is before
    assert before.any(dim=1).nonzero().flatten().tolist() == [1, 2]
    assert all(gradient is None for gradient in handed)


def test_several_threads_add_in_the_same_order_each_time() -> None:
    """Words that many rows read are where threads meet."""
    ids = torch.randint(0, 9, (600, 500), generator=torch.Generator().manual_seed(1))
    model = model_of(tied=False, padding=None).float()
    model.requires_grad_(False).get_input_embeddings().requires_grad_(True)
    weight, threads = model.get_input_embeddings().weight, torch.get_num_threads()
    upstream = torch.randn(*ids.shape, weight.shape[1])
    found: list[torch.Tensor] = []
    torch.set_num_threads(2)
    try:
        for _ in range(6):
            weight.grad = None
            with embedding_gradient_in_place(SimpleNamespace(model=model)):
                model.get_input_embeddings()(ids).backward(upstream)
            found.append(weight.grad)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_other_embeddings_are_left_alone() -> None:
    model = model_of(tied=False, padding=None)
    layer = model.get_input_embeddings()

    def stays() -> bool:
        with embedding_gradient_in_place(SimpleNamespace(model=model)):
            return "forward" not in vars(layer)

    assert not stays()
    with torch.no_grad():
        assert stays()
    layer.weight.requires_grad_(False)
    assert stays()
    layer.weight.requires_grad_(True)
    layer.scale_grad_by_freq = True
    assert stays()
    layer.scale_grad_by_freq = False
    model.set_input_embeddings(nn.Embedding(20, layer.embedding_dim, max_norm=1.0))
    layer = model.get_input_embeddings()
    assert stays()
    with embedding_gradient_in_place(SimpleNamespace()):
        pass
