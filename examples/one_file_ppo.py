"""PPO on a KL leash, on one page: the loop of kleash without its machinery, for reading.

    python examples/one_file_ppo.py MODEL_DIR PROMPTS.jsonl --target-kl 5

The policy writes responses; a frozen copy of it reads the same tokens. The difference of their
log-probabilities (k1) is charged at every token, and the score is paid on the last one:

    r_t = −β · (log π(y_t) − log π_ref(y_t)) + score · 1[t is the last token]

Then advantages, clipped updates, and β moves so that the KL spent meets its target. A test holds
the numbers of this file against the engine's.

Left out, because it would hide the algorithm (the engine has all of it): the exact KL, here only
estimated from the token drawn; scoring without logits in memory, here [batch, token, vocab] tensors
are made; micro-batches, reward models, other placements of the KL, truncated responses, held-out
prompts, checkpoints, error messages, GPUs, and models that take no `position_ids`.
"""

import argparse
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

GAMMA, LAM, CLIP, VALUE_CLIP, VALUE_COEF = 1.0, 0.95, 0.2, 0.2, 0.1
EPOCHS, MINIBATCHES, MAX_GRAD_NORM = 2, 2, 1.0


def reward(prompt: str, response: str) -> float:
    """What the policy climbs: the share of the letter e among its characters. Put yours here."""
    return response.count("e") / max(1, len(response))


class Texts(NamedTuple):
    """Prompts padded on the left, responses padded on the right; [batch, prompt + token]."""

    ids: Tensor
    mask: Tensor  # True on real tokens; from lengths: a padding id is never looked for
    prompt: int  # columns of the prompts


class Lesson(NamedTuple):
    """What an update learns from, per response token; [batch, token], no gradient flows."""

    logprobs: Tensor  # of the policy that wrote
    values: Tensor
    advantages: Tensor
    returns: Tensor


@torch.no_grad()
def write(policy: Any, prompts: list[list[int]], tokens: int, eos: int | None) -> Texts:
    """Sample a response to each prompt at temperature 1; nothing cuts into the distribution."""
    width = max(len(p) for p in prompts)
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts])
    writing, new, cache = mask[:, -1], slice(None), None
    for _ in range(tokens):
        positions, seen = _positions(mask)[:, new], {"past_key_values": cache, "use_cache": True}
        out = policy(ids[:, new], attention_mask=mask.long(), position_ids=positions, **seen)
        heap = out.logits[:, -1].float().softmax(-1).double().cumsum(-1)
        drawn = torch.searchsorted(heap, heap[:, -1:] * torch.rand_like(heap[:, -1:]), right=True)
        ids, mask = torch.cat([ids, drawn], 1), torch.cat([mask, writing[:, None]], 1)
        new, cache = slice(-1, None), out.past_key_values
        # The token that ends a response belongs to it; what follows does not.
        writing = writing & (drawn[:, 0] != (-1 if eos is None else eos))
        if not writing.any():
            break
    return Texts(ids, mask, width)


def read(model: Any, texts: Texts) -> tuple[Tensor, Tensor]:
    """log-probability of each response token, and the trunk's state that predicts it."""
    ids, mask, prompt = texts
    places = {"attention_mask": mask.long(), "position_ids": _positions(mask)}
    out = model(ids, **places, output_hidden_states=True)
    # Position t predicts token t + 1, so the last prompt token predicts the first of the response.
    logprobs = out.logits[:, prompt - 1 : -1].float().log_softmax(-1)
    chosen = logprobs.gather(-1, ids[:, prompt:, None]).squeeze(-1)
    return chosen, out.hidden_states[-1][:, prompt - 1 : -1]


def _positions(mask: Tensor) -> Tensor:
    """Real tokens count from 0, however far the row is padded."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def shaped_rewards(scores: Tensor, k1: Tensor, mask: Tensor, beta: float) -> Tensor:
    """r_t = −β · k1_t + score on the last token; a row sums to score − β · Σ k1."""
    last = mask.sum(1, keepdim=True) - 1
    return torch.where(mask, -beta * k1, 0.0).scatter_add(1, last, scores[:, None])


def gae(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """δ_t = r_t + γ V_{t+1} − V_t;  A_t = δ_t + γλ A_{t+1};  return_t = A_t + V_t."""
    advantages = torch.zeros_like(rewards)
    advantage = after = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + GAMMA * after - values[:, t]
        advantage = torch.where(mask[:, t], delta + GAMMA * LAM * advantage, 0.0)
        after = torch.where(mask[:, t], values[:, t], 0.0)
        advantages[:, t] = advantage
    return advantages, torch.where(mask, advantages + values, 0.0)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the real tokens."""
    scaled = (x - x[mask].mean()) * torch.rsqrt(x[mask].var(correction=0) + 1e-8)
    return torch.where(mask, scaled, 0.0)


def losses(policy: Any, critic: nn.Module, texts: Texts, lesson: Lesson) -> tuple[Tensor, Tensor]:
    """PPO's clipped losses of policy and critic, as means over the real tokens."""
    mask = texts.mask[:, texts.prompt :]
    logprobs, hidden = read(policy, texts)
    values = critic(hidden.detach()).squeeze(-1)  # detached: the critic leaves the trunk alone
    ratio = (logprobs - lesson.logprobs)[mask].exp()
    gain = lesson.advantages[mask]
    surrogate = torch.minimum(ratio * gain, ratio.clamp(1 - CLIP, 1 + CLIP) * gain)
    near = values.clamp(lesson.values - VALUE_CLIP, lesson.values + VALUE_CLIP)
    errors = torch.maximum((values - lesson.returns) ** 2, (near - lesson.returns) ** 2)
    return -surrogate.mean(), 0.5 * errors[mask].mean()


def batches(path: Path, tokenizer: Any, size: int) -> Iterator[tuple[list[str], list[list[int]]]]:
    """Prompts and their ids, for ever, in an order shuffled anew each time round."""
    prompts = [json.loads(line)["prompt"] for line in path.read_text("utf-8").splitlines()]
    while True:
        for rows in torch.randperm(len(prompts)).split(size):
            texts = [prompts[i] for i in rows]
            yield texts, [tokenizer(text)["input_ids"] for text in texts]


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description="PPO on a KL leash, on one page.")
    parser.add_argument("model", help="directory of a causal language model")
    parser.add_argument("prompts", type=Path, help="JSON lines with the key prompt")
    parser.add_argument("--steps", type=int, default=50, help="rollouts, each with its updates")
    parser.add_argument("--batch", type=int, default=64, help="responses in a step")
    parser.add_argument("--tokens", type=int, default=32, help="length limit of a response")
    parser.add_argument("--beta", type=float, default=0.02, help="score per nat")
    parser.add_argument("--target-kl", type=float, help="nats per response for β to hold")
    parser.add_argument("--lr", type=float, default=1e-4)
    args = parser.parse_args()

    torch.manual_seed(0)
    tokenizer: Any = AutoTokenizer.from_pretrained(args.model)
    policy: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    policy.eval()  # dropout off, or the first ratio would not be 1
    reference, beta = copy.deepcopy(policy).requires_grad_(False), args.beta
    width = policy.config.hidden_size
    critic = nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, 1))
    for parameter in critic[2].parameters():
        nn.init.zeros_(parameter)  # V = 0 at first, and not noise
    parameters = [*policy.parameters(), *critic.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    stream = batches(args.prompts, tokenizer, args.batch)

    for step in range(1, args.steps + 1):
        # 1. The policy writes; the reward reads.
        prompts, ids = next(stream)
        texts = write(policy, ids, args.tokens, tokenizer.eos_token_id)
        mask = texts.mask[:, texts.prompt :]
        written = zip(prompts, texts.ids[:, texts.prompt :], mask, strict=True)
        said = [(p, tokenizer.decode(row[m], skip_special_tokens=True)) for p, row, m in written]
        scores = torch.tensor([reward(prompt, response) for prompt, response in said])

        # 2. Policy, reference and critic read the same tokens; then rewards and advantages.
        with torch.no_grad():
            (logprobs, hidden), (ref_logprobs, _) = read(policy, texts), read(reference, texts)
            values, k1 = critic(hidden).squeeze(-1), logprobs - ref_logprobs
        advantages, returns = gae(shaped_rewards(scores, k1, mask, beta), values, mask)
        lesson = Lesson(logprobs, values, whiten(advantages, mask), returns)

        # 3. Passes over what was written, in minibatches.
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(mask)).chunk(MINIBATCHES):
                some = Texts(texts.ids[rows], texts.mask[rows], texts.prompt)
                lessons = Lesson(*(numbers[rows] for numbers in lesson))
                policy_loss, value_loss = losses(policy, critic, some, lessons)
                optimizer.zero_grad()
                (policy_loss + VALUE_COEF * value_loss).backward()
                nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
                optimizer.step()

        # 4. β moves: up when the KL is over its target, by at most 2 % (Ziegler et al. 2019, §2.2).
        kl = float(torch.where(mask, k1, 0.0).sum(1).mean())
        print(f"step {step:4d}  score {scores.mean():7.4f}  KL {kl:7.3f} nats  β {beta:.4g}")
        if args.target_kl:
            beta *= 1 + 0.1 * max(-0.2, min(0.2, kl / args.target_kl - 1))


if __name__ == "__main__":
    main()
