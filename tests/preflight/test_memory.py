"""Predicted memory against counts by hand; `benchmarks/memory.py` compares it with processes."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import tiny_models
from config_trees import minimal
from transformers import LlamaConfig

from kleash.config.loading import parse_config
from kleash.models.fingerprint import all_weights
from kleash.models.loading import load_config
from kleash.models.lora import AdapterSpec
from kleash.models.policy import load_policy, load_reference
from kleash.preflight.memory import (
    Memory,
    Strategy,
    Workload,
    activation_bytes,
    model_size,
    predict,
)
from kleash.preflight.scaling import Rates, Step, bytes_sent, predictions
from kleash.preflight.scaling_table import workload_of

WIDTH, INNER, LAYERS, WORDS = 64, 160, 5, 300
CONFIG = LlamaConfig(
    hidden_size=WIDTH,
    intermediate_size=INNER,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=WORDS,
)
LAYER = 2 * WIDTH * WIDTH + 2 * WIDTH * WIDTH // 2 + 3 * WIDTH * INNER + 2 * WIDTH
ALL = LAYERS * LAYER + 2 * WORDS * WIDTH + WIDTH
LOAD = Workload(update_rows=2, rollout_rows=4, prompt_tokens=10, response_tokens=20)


@cache
def predicted(load: Workload = LOAD, strategy: Strategy = "none", world_size: int = 1) -> Memory:
    """`predict` of the model above."""
    return predict(CONFIG, load, strategy=strategy, world_size=world_size)


def test_parameters_of_a_llama_counted_by_hand() -> None:
    size = model_size(CONFIG, LOAD)
    assert (size.parameters, size.trainable, size.largest_layer) == (ALL, ALL, LAYER)
    # Two heads of 16 numbers for keys, as many for values, in each layer.
    assert size.cache_numbers == LAYERS * 2 * 2 * 16


@pytest.mark.parametrize(
    ("changes", "weights", "gradients", "moments", "reference"),
    [
        ({}, 4, 4, 8, 4),
        ({"optimizer": "adamw_8bit"}, 4, 4, 2, 4),
        ({"precision": "pure_bf16"}, 2, 2, 4, 2),
        ({"reference": False}, 4, 4, 8, 0),
    ],
)
def test_bytes_a_weight(
    changes: dict, weights: int, gradients: int, moments: int, reference: int
) -> None:
    found = predicted(replace(LOAD, **changes))
    assert found.weights == weights * ALL
    assert found.gradients == gradients * ALL
    assert found.optimizer == moments * ALL
    assert found.reference == reference * ALL


def test_an_adapter_trains_its_matrices_alone_on_a_base_in_half_precision() -> None:
    adapter = AdapterSpec(rank=3, targets=("q_proj",))
    found = predicted(replace(LOAD, precision="bf16", adapter=adapter, reference=False))
    matrices = LAYERS * 3 * 2 * WIDTH
    assert found.gradients == 4 * matrices
    assert found.weights == 2 * ALL + 4 * matrices
    assert found.reference == 0


def test_fsdp_divides_what_stays_and_gathers_the_rest() -> None:
    one = predicted()
    shared = predicted(LOAD, "fsdp", 4)
    assert shared.steady == pytest.approx(one.steady / 4, abs=8)
    assert shared.gradients == shared.accumulated == ALL
    # Of both models embedding, last norm and head, and the gradient of the policy's head.
    ends, head = 2 * WORDS * WIDTH + WIDTH, WORDS * WIDTH
    assert shared.gathered == 4 * (2 * ends + head)
    # Two layers, and a layer's gradients twice.
    assert shared.layers == 4 * 4 * LAYER
    # In the end the gradients of the ends twice, beside the reference's ends.
    assert shared.exchange == 4 * (2 * ends + ends)
    assert shared.generation - one.generation == 4 * ALL
    copied = predicted(LOAD, "ddp", 4)
    assert (copied.steady, copied.gathered, copied.layers) == (one.steady, 0, 0)
    assert copied.exchange == 4 * ALL
    with pytest.raises(ValueError, match="expected ddp or fsdp for several processes, got 2"):
        predict(CONFIG, LOAD, world_size=2)


def test_fsdp_gathers_layers_in_the_type_that_they_compute_in() -> None:
    ends = 2 * WORDS * WIDTH + WIDTH
    half = replace(LOAD, precision="bf16")
    rounded = predicted(half, "fsdp", 4)
    # Gradients as they were computed, in bfloat16, and as they are summed, in float32.
    assert rounded.layers == 2 * 2 * LAYER + (2 + 4) * LAYER
    assert rounded.gathered == 4 * (2 * ends + WORDS * WIDTH)
    alone = predicted(half)
    assert rounded.reference == (2 * LAYERS * LAYER + 4 * ends) // 4 == alone.reference // 4
    adapter = replace(half, adapter=AdapterSpec(rank=3, targets=("q_proj",)), reference=False)
    beside = predicted(adapter, "fsdp", 4)
    # A frozen base is in bfloat16, its ends too, and there is one copy of it.
    assert beside.gathered == 2 * ends
    assert beside.layers == 2 * 2 * (LAYER + 6 * WIDTH) + (2 + 4) * 6 * WIDTH


def test_a_reference_that_the_loss_does_not_read_is_gathered_for_scoring_alone() -> None:
    ends = 4 * (2 * WORDS * WIDTH + WIDTH)
    both = predicted(LOAD, "fsdp", 4)
    load = replace(LOAD, update_reads_reference=False)
    alone = predicted(load, "fsdp", 4)
    assert both.gathered - alone.gathered == both.exchange - alone.exchange == ends
    assert both.scoring == alone.scoring > 2 * ends + 2 * 4 * LAYER


def test_rounded_matrices_are_counted_once() -> None:
    """Autocast keeps a copy for the backward pass; FSDP gathers the matrix as what it would be."""
    half = replace(LOAD, precision="bf16")
    vectors = 2 * WIDTH
    matrices = LAYERS * (LAYER - vectors)
    kept = activation_bytes(CONFIG, half)[0]
    assert kept - activation_bytes(CONFIG, half, gathered=True)[0] == 2 * matrices
    alone = predicted(half)
    assert (alone.gathered, alone.rounded, alone.activations) == (0, 0, kept)
    # Where activations are made again their copies are not kept, but all there in the end.
    assert predicted(replace(half, gradient_checkpointing=True)).rounded >= 2 * matrices


def test_gradients_are_there_while_they_add_up_and_not_between_steps() -> None:
    several, single = (predicted(replace(LOAD, microbatches=n)) for n in (2, 1))
    assert several.steady == single.steady == (4 + 8 + 4) * ALL
    assert several.peak - single.peak == 4 * ALL


def test_two_graphs_wait_for_one_backward_pass_where_the_critic_is_a_model() -> None:
    alone, both = predicted(), predicted(replace(LOAD, critic=True))
    assert both.activations == 2 * alone.activations
    assert (both.critic, both.gradients) == ((4 + 8) * ALL, 2 * alone.gradients)


def test_a_cpu_writes_with_copies_of_what_learns() -> None:
    load = replace(LOAD, response_tokens=16)
    cpu, gpu = (predicted(replace(load, device=device)) for device in ("cpu", "cuda"))
    matrices = LAYERS * LAYER + WORDS * WIDTH
    assert cpu.generation - gpu.generation == 4 * matrices
    assert predicted(replace(load, rollout_rows=0)).generation == 0


def test_activations_grow_with_depth_rows_and_length_as_they_must() -> None:
    deep = LlamaConfig(**{**CONFIG.to_dict(), "num_hidden_layers": 3})
    (kept, _), (less, _) = (activation_bytes(c, LOAD) for c in (CONFIG, deep))
    direct = activation_bytes(LlamaConfig(**{**CONFIG.to_dict(), "num_hidden_layers": 2}), LOAD)[0]
    # From three depths that were run or extrapolated, each layer adds the same.
    assert kept - less == 2 * (less - direct)
    twice = activation_bytes(CONFIG, replace(LOAD, update_rows=4))[0]
    assert 1.9 < twice / kept < 2.1
    recomputed, added = activation_bytes(CONFIG, replace(LOAD, gradient_checkpointing=True))
    inputs = LAYERS * 4 * 2 * 30 * WIDTH
    assert inputs <= recomputed < 1.5 * inputs
    # A layer is whole again in its own backward pass.
    assert added > (kept - less) / 2


def test_bytes_on_the_network_by_the_laws_of_rings() -> None:
    size, step = model_size(CONFIG, LOAD), Step(responses=16, epochs=2, minibatches=2)
    for ranks in (2, 4):
        share = (ranks - 1) / ranks
        ddp = bytes_sent(size, LOAD, step, strategy="ddp", world_size=ranks)
        assert ddp == int(4 * 2 * share * 4 * ALL)
    # 4 rows a rank: once to write, twice to read, 4 updates of one microbatch forward and back.
    fsdp = bytes_sent(size, LOAD, step, strategy="fsdp", world_size=4)
    assert fsdp == int(0.75 * 4 * ALL * (1 + 2 + 2 * 4 + 4))
    assert bytes_sent(size, LOAD, step, strategy="none", world_size=1) == 0


def test_one_device_has_one_way_and_more_devices_than_responses_none() -> None:
    step, rates = Step(8, 1, 1), Rates(1e12, 1e11, 1e10)
    (alone,) = predictions(CONFIG, LOAD, step, world_size=1, rates=rates)
    assert alone.strategy == "none" and alone.sending == 0
    tokens = 8 * LOAD.tokens
    assert alone.computing == pytest.approx(tokens * ALL * (6 + 4) / 1e12)
    both = predictions(CONFIG, LOAD, step, world_size=4, rates=rates)
    assert [one.strategy for one in both] == ["ddp", "fsdp"]
    assert both[0].computing == pytest.approx(alone.computing / 4)
    with pytest.raises(ValueError, match="from 1 to 8 devices, as many as a step has responses"):
        predictions(CONFIG, LOAD, step, world_size=9, rates=rates)


def test_a_budget_of_tokens_is_as_many_of_the_longest_rows_as_fit() -> None:
    budgets = {"algorithm": {"microbatch_tokens": 100}, "rollout": {"microbatch_tokens": 25}}
    config = parse_config(minimal(**budgets), where="here")
    load = workload_of(
        config.policy,
        config.algorithm,
        config.rollout.model_copy(update={"max_new_tokens": 20}),
        optimizer="adamw",
        copied_reference=True,
        prompt_tokens=10,
    )
    # Rows of 30 tokens; one is longer than the second budget and read alone.
    assert (load.update_rows, load.rollout_rows) == (3, 1)


def test_four_bits_are_counted_as_the_library_keeps_them(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    folder = tiny_models.save_model(
        tmp_path, hidden_size=128, intermediate_size=256, max_position_embeddings=64
    )
    model_config = load_config(folder)
    adapter = AdapterSpec(rank=3, targets=("q_proj",))
    policy = load_policy(folder, adapter=adapter, quantization="nf4")
    held = sum(w.numel() * w.element_size() for _, w in all_weights(policy.model))
    found = predict(model_config, replace(LOAD, adapter=adapter, quantized=True))
    # Sixteen numbers of a table for each layer are left out.
    assert found.weights == pytest.approx(held, rel=0.01)
    own = {"quantized": False, "quantized_reference": True}
    copied = predict(model_config, replace(LOAD, adapter=adapter, **own)).reference
    reference = load_reference(folder, quantization="nf4")
    kept = sum(w.numel() * w.element_size() for _, w in all_weights(reference.model))
    assert copied == pytest.approx(kept, rel=0.01)
    plain = predict(model_config, replace(LOAD, adapter=adapter))
    whole = load_reference(folder)
    assert plain.reference == sum(w.numel() * w.element_size() for _, w in all_weights(whole.model))
    assert found.weights < 0.25 * plain.weights
    # One matrix is dequantised at a time.
    assert found.layers == 4 * 128 * 256


def test_the_configuration_says_what_is_quantised() -> None:
    policy = {"path": "p", "lora": {"rank": 2}, "quantization": "nf4"}
    config = parse_config(
        minimal(policy=policy, reference={"quantization": "none"}), where="the test"
    )
    load = workload_of(
        config.policy,
        config.algorithm,
        config.rollout,
        optimizer="adamw",
        copied_reference=config.reference.kind == "copy",
        quantized_reference=config.reference.quantization != "none",
        prompt_tokens=10,
    )
    assert (load.reference, load.quantized, load.quantized_reference) == (True, True, False)
