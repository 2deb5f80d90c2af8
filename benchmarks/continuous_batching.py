"""transformers' continuous batching beside `generate` as `hf` has it: law, repetition, speed.

`python benchmarks/continuous_batching.py`: the same model and prompts in one process, in turn.
Responses are ragged: of random weights every word is about as likely, and a part of the words ends
a response, so lengths are geometric with the mean of `--mean`. CPU seconds are those of all
threads.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from rollouts import PROMPT, SHAPES, random_policy
from transformers import ContinuousBatchingConfig, GenerationConfig

from kleash.rollout.prompts import Prompt, batch_prompts
from kleash.rollout.sampling import SamplingSpec, generate


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What it gives, and its wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    return found, {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def off_by(policy: Any, prompt: tuple[int, ...], ids: list[int], said: list[float]) -> float:
    """Largest difference of log-probabilities to a reading of the whole text at once."""
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0].double()
    law = logits[len(prompt) - 1 : -1].log_softmax(-1)
    own = law.gather(1, torch.tensor(ids)[:, None]).squeeze(1)
    return float((own - torch.tensor(said).double()).abs().max())


def _number(name: str) -> int:
    """Of a request, as transformers names it."""
    return int(name.split("_")[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="9.7 M")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--mean", type=int, default=32)
    arguments = parser.parse_args()
    policy = random_policy(SHAPES[arguments.shape], ragged=arguments.mean)
    stops = policy.stop_ids
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(policy.words, (arguments.prompts, PROMPT), generator=generator).tolist()
    prompts = [Prompt("", tuple(row), i) for i, row in enumerate(rows)]
    batch = batch_prompts(prompts, pad_id=0)
    spec = SamplingSpec(arguments.tokens)
    settings = GenerationConfig(
        do_sample=True,
        max_new_tokens=arguments.tokens,
        eos_token_id=list(stops),
        pad_token_id=0,
        top_k=0,
        top_p=1.0,
    )
    batching = ContinuousBatchingConfig(return_logprobs=True, seed=3, page_size=32, num_blocks=512)

    def continuous(inputs: list[list[int]]) -> list[Any]:
        found: dict[str, Any] = cast(Any, policy.model).generate_batch(
            inputs=inputs,
            generation_config=settings,
            continuous_batching_config=batching,
            progress_bar=False,
        )
        return [found[name] for name in sorted(found, key=_number)]

    attention = cast(str, getattr(policy.model.config, "_attn_implementation"))  # noqa: B009
    generate(policy, batch_prompts(prompts[:2], pad_id=0), SamplingSpec(4), microbatch=2)
    torch.manual_seed(3)
    rollout, plain = timed(lambda: generate(policy, batch, spec, microbatch=arguments.prompts))
    continuous(rows[:2])
    first, ours = timed(lambda: continuous(rows))
    second = continuous(rows)
    alone = continuous(rows[:1])
    policy.model.set_attn_implementation(attention)
    lengths = rollout.response_mask.sum(-1)
    written = sum(len(one.generated_tokens) for one in first)
    pair = (first[0], tuple(rows[0]))
    found = {
        "generate": {**plain, "tokens": int(lengths.sum())},
        "continuous": {**ours, "tokens": written},
        "cpu_s_per_1000_tokens": {
            "generate": 1e3 * plain["cpu_s"] / int(lengths.sum()),
            "continuous": 1e3 * ours["cpu_s"] / written,
        },
        "log_probabilities_off_by": off_by(
            policy, pair[1], pair[0].generated_tokens, pair[0].logprobs
        ),
        "same_seed_same_tokens": [one.generated_tokens for one in first]
        == [one.generated_tokens for one in second],
        "a_response_is_the_same_in_another_batch": first[0].generated_tokens
        == alone[0].generated_tokens,
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
