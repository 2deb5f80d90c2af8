"""Memory of each device and bytes on the network for three sizes: the table of docs/scaling.md.

python benchmarks/scaling.py
"""

from dataclasses import replace

from transformers import LlamaConfig

from kleash.models.lora import AdapterSpec
from kleash.preflight.memory import Workload
from kleash.preflight.scaling import Rates, Step, predictions

ATTENTION_AND_MLP = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHAPES = {  # width, inner width, layers, heads, heads of keys, words
    "7 B": (4096, 11008, 32, 32, 32, 32_000),
    "8 B": (4096, 14336, 32, 32, 8, 128_256),
    "70 B": (8192, 28672, 80, 64, 8, 128_256),
}
COMMON = Workload(
    precision="bf16",
    gradient_checkpointing=True,
    prompt_tokens=512,
    response_tokens=512,
    device="cuda",
)
ADAPTER = replace(
    COMMON,
    adapter=AdapterSpec(rank=16, targets=ATTENTION_AND_MLP),
    reference=False,
    update_rows=4,
    rollout_rows=8,
)
CASES = (
    ("7 B", "LoRA", 1, 24, ADAPTER, Step(128, 1, 2)),
    ("8 B", "full", 8, 80, COMMON, Step(512, 1, 2)),
    ("70 B", "full", 64, 80, COMMON, Step(1024, 1, 2)),
)
NOMINAL = Rates(flops=4e14, memory=2e12, network=5e10)


def main() -> None:
    print("| model | trained | devices | share | steady, GiB | peak, GiB | has, GB | sent, GiB |")
    print("|---|---|---|---|---|---|---|---|")
    for name, trained, devices, has, load, step in CASES:
        width, inner, layers, heads, keys, words = SHAPES[name]
        config = LlamaConfig(
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=keys,
            vocab_size=words,
        )
        for one in predictions(config, load, step, world_size=devices, rates=NOMINAL):
            print(
                f"| {name} | {trained} | {devices} | {one.strategy} "
                f"| {one.memory.steady / 2**30:.1f} | {one.memory.peak / 2**30:.1f} "
                f"| {has} | {one.sent / 2**30:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
