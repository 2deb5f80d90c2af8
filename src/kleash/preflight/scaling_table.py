"""What `kleash check --world-size` prints: one column for each way to share a run among devices."""

from dataclasses import asdict, replace
from typing import Any, cast

from rich.console import Console
from rich.text import Text

from kleash.config.algorithm import DistillConfig, GRPOConfig, PPOConfig, RLOOConfig
from kleash.config.rollout import RolloutConfig
from kleash.config.schema import Config, PolicyConfig
from kleash.kl.placements import DIFFERENTIATES_KL
from kleash.models.batching import most_rows
from kleash.models.loading import load_config
from kleash.models.lora import AdapterSpec
from kleash.preflight.memory import OptimizerName, Workload
from kleash.preflight.scaling import Prediction, Rates, Step, measure_rates, predictions
from kleash.report.terminal import TableColumn, print_table
from kleash.training.model_assembly import choose_device

_GIB = 2**30
_ROWS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimiser",
    "reference": "reference",
    "critic": "value model",
    "gathered": "gathered for a pass",
    "layers": "whole for a layer",
    "activations": "activations",
    "backward": "backward of a layer",
    "rounded": "rounded matrices",
    "head": "tiles and head",
    "generation": "writing (instead)",
    "exchange": "sums (instead)",
}


def workload_of(
    policy: PolicyConfig,
    algorithm: PPOConfig | GRPOConfig | RLOOConfig | DistillConfig,
    rollout: RolloutConfig,
    *,
    optimizer: OptimizerName,
    copied_reference: bool,
    prompt_tokens: int,
    quantized_reference: bool = False,
    update_reads_reference: bool = True,
) -> Workload:
    """What memory depends on, out of the sections of a configuration."""
    lora = policy.lora
    critic = algorithm.value if isinstance(algorithm, PPOConfig) else None
    longest = prompt_tokens + rollout.max_new_tokens
    return Workload(
        precision=policy.precision,
        optimizer=optimizer,
        gradient_checkpointing=policy.gradient_checkpointing,
        adapter=None
        if lora is None
        else AdapterSpec(
            rank=lora.rank,
            alpha=lora.alpha,
            targets=() if lora.targets == "auto" else tuple(lora.targets),
            modules_to_save=tuple(lora.modules_to_save),
        ),
        reference=copied_reference,
        quantized=policy.quantization != "none",
        quantized_reference=quantized_reference,
        update_reads_reference=update_reads_reference,
        critic=critic is not None and critic.kind == "model",
        update_rows=most_rows(algorithm.microbatch, longest),
        rollout_rows=most_rows(rollout.microbatch, longest),
        prompt_tokens=prompt_tokens,
        response_tokens=rollout.max_new_tokens,
        keep_logits=algorithm.keep_logits_mib << 20,
    )


def predict_run(
    config: Config, *, world_size: int, prompt_tokens: int, network: float
) -> tuple[list[Prediction], Rates]:
    """Predict a configured run on so many devices; only the policy's `config.json` is read.

    Raises:
        ModelError: there is no such model.
        ValueError: more devices than responses.
    """
    shape = load_config(config.policy.path, revision=config.policy.revision)
    device = choose_device(config.device)
    rates = measure_rates(device, config.policy.precision, network=network)
    algorithm = config.algorithm
    step = Step(config.responses_per_step, algorithm.epochs, algorithm.minibatches)
    load = workload_of(
        config.policy,
        algorithm,
        config.rollout,
        optimizer=config.optimizer.name,
        copied_reference=config.reference.kind == "copy",
        quantized_reference=config.reference.quantization != "none",
        prompt_tokens=prompt_tokens,
        update_reads_reference=isinstance(algorithm, DistillConfig)
        or config.leash.placement in DIFFERENTIATES_KL,
    )
    load = replace(load, device="cuda" if device.type == "cuda" else "cpu")
    return predictions(shape, load, step, world_size=world_size, rates=rates), rates


def not_counted(rates: Rates) -> str:
    """What a device takes beside what is predicted."""
    context = "about 0.4 GiB" if rates.device == "cpu" else "about 1 GiB with the device's context"
    said = f"not counted: the libraries ({context}), reward models, and engines of their own"
    if rates.device == "cpu":
        said += (
            "; holes in the heap of the C library, up to a third more where matrices and "
            "activations are smaller than 2 MiB (docs/scaling.md)"
        )
    return said


def as_json(found: list[Prediction], rates: Rates) -> dict[str, Any]:
    """Bytes and seconds as plain numbers."""
    return {
        "rates": asdict(rates),
        "not_counted": not_counted(rates),
        "predictions": [
            {
                **asdict(one),
                "steady": one.memory.steady,
                "peak": one.memory.peak,
                "seconds": one.seconds,
            }
            for one in found
        ],
    }


def print_predictions(found: list[Prediction], rates: Rates, console: Console) -> None:
    """A table of bytes for each device, of bytes sent and of seconds."""
    columns = [TableColumn("each device", "name")]
    columns += [TableColumn(f"{one.strategy} × {one.world_size}", "number") for one in found]
    rows: list[tuple[str | Text, ...]] = []
    for key, name in _ROWS.items():
        held = [cast(int, getattr(one.memory, key)) for one in found]
        if any(held):
            rows.append((name, *(_size(number) for number in held)))
    rows.append(("steady", *(_size(one.memory.steady) for one in found)))
    rows.append(("at the highest", *(_size(one.memory.peak) for one in found)))
    rows.append(("sent in a step", *(_size(one.sent) for one in found)))
    for key, name in (("computing", "computing"), ("writing", "writing"), ("sending", "sending")):
        rows.append((name, *(f"{cast(float, getattr(one, key)):.3g} s" for one in found)))
    rows.append(("a step", *(f"{one.seconds:.3g} s" for one in found)))
    print_table(console, tuple(columns), rows)
    console.print(
        f"at {rates.flops / 1e12:.3g} TFLOP/s and {rates.memory / 1e9:.3g} GB/s of memory, both "
        f"measured on this device, and {rates.network / 1e9:.3g} GB/s of network, as given"
    )
    console.print(not_counted(rates))


def _size(number: int) -> str:
    return f"{number / _GIB:.2f} GiB" if number >= _GIB else f"{number / 2**20:.3g} MiB"
