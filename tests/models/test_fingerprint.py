"""Hash and sum of weights: unmoved by what is no change, moved by every bit that is."""

import copy

import pytest
import tiny_models
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from kleash.models.fingerprint import base_weights, weights_sha256, weights_sum
from kleash.models.lora import AdapterSpec, add_adapter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_bit_of_one_weight_is_seen(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 7)).to(dtype)
    before = weights_sum(model.named_parameters()), weights_sha256(model.named_parameters())
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    for parameter in model.parameters():
        flat = parameter.detach().view(-1).view(words)
        for place in range(len(flat)):
            flat[place] ^= 1
            assert weights_sum(model.named_parameters()) != before[0]
            assert weights_sha256(model.named_parameters()) != before[1]
            flat[place] ^= 1
    after = weights_sum(model.named_parameters()), weights_sha256(model.named_parameters())
    assert after == before


def test_the_sum_is_that_of_the_bits() -> None:
    weights = [("a", torch.tensor([1.0, -2.0, 0.5])), ("b", torch.arange(6.0)[1:4])]
    bits = [int(x) for _, tensor in weights for x in tensor.clone().view(torch.int32)]
    assert weights_sum(weights) == sum(bits)


def test_an_adapter_changes_nothing_of_the_base() -> None:
    model = AutoModelForCausalLM.from_config(tiny_models.config("llama", 24))
    plain = dict(base_weights(copy.deepcopy(model)))
    wrapped = add_adapter(model, AdapterSpec(rank=2, targets=("q_proj",)))
    assert weights_sha256(base_weights(model)) == weights_sha256(plain.items())
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.add_(1)
    assert weights_sha256(base_weights(model)) == weights_sha256(plain.items())
    assert weights_sha256(model.named_parameters()) != weights_sha256(plain.items())
