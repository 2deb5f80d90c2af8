"""GRPO of one's own on a KL leash: python examples/grpo_loop.py MODEL PROMPTS.jsonl RUN."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, AutoTokenizer

import kleash

STEPS, GROUP, TOKENS, LR, EPOCHS = 60, 16, 8, 1e-2, 2  # of a tiny model
SAMPLING = {"do_sample": True, "top_k": 0, "max_new_tokens": TOKENS, "num_return_sequences": GROUP}


def train(path: str, prompts: list[str], output: str, reward: Any, target_kl: float) -> None:
    """Train for some steps, and leave a run that `kleash report` opens."""
    tokenizer: Any = AutoTokenizer.from_pretrained(path, padding_side="left")
    policy: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    reference = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, weight_decay=0.0)
    asked = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    width, index = asked["input_ids"].shape[1], torch.arange(len(prompts)).repeat_interleave(GROUP)
    leash = kleash.Leash(target_kl)  # nats per response
    with kleash.RunWriter.create(output, settings={"target_kl": target_kl}, meta={}) as run:
        for step in range(1, STEPS + 1):
            # 1. The policy writes; the token that ends a response belongs to it.
            ids = policy.generate(**asked, **SAMPLING)
            ends = (ids[:, width:] == tokenizer.eos_token_id).long()
            response = pad(ends.cumsum(1) - ends == 0, (width, 0))
            mask = response | pad(asked["attention_mask"].bool(), (0, ids.shape[1] - width))[index]
            texts = tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True)
            scores = torch.tensor([float(reward(text)) for text in texts])
            scores = kleash.group_relative(scores, index)
            # 2. The exact KL, and beta in the unit of what is trained on: spreads of a group.
            with torch.no_grad():
                then = kleash.score(policy, reference, ids, mask, response_mask=response)
            beta, kl = leash.step(then.kl, scores, index), float(then.kl.sum(1).mean())
            run.append_metrics({"step": step, "objective/kl_ref": kl, "objective/beta": beta})
            # 3. Clipped updates; the KL in the loss with its exact gradient.
            count, advantages = int(response.sum()), scores[:, None].expand_as(then.logprobs)
            for _ in range(EPOCHS):
                now = kleash.score(policy, reference, ids, mask, response_mask=response)
                new, old = now.logprobs, then.logprobs
                climb = kleash.clipped_policy_loss(
                    new, old, advantages, response, clip_range=0.2, tokens=count
                )
                penalty = kleash.off_policy_exact_loss(new, old, now.kl, response).sum() / count
                optimizer.zero_grad()
                (climb + beta * penalty).backward()
                optimizer.step()


if __name__ == "__main__":
    lines = Path(sys.argv[2]).read_text("utf-8").splitlines()[:8]
    openings = [json.loads(line)["prompt"] for line in lines]
    train(sys.argv[1], openings, sys.argv[3], reward=len, target_kl=1.0)  # any function of a text
