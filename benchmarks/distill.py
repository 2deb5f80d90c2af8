"""On-policy distillation beside SFT on teacher samples and TRL's GKD: docs/distillation.md.

    python benchmarks/distill.py OUT [--steps 30] [--seeds 3] [--ways kleash passes gkd sft]

The teacher is stories260K (five layers); the student is the same model with its first, third and
fifth layer, after a first SFT on teacher samples. From there each way gets the same number of
batches of responses, prompts, response tokens, learning rate and AdamW:

    kleash       algorithm: distill, KL(student‖teacher), token-local; one optimiser step a batch
    passes       the same with kleash's usual two passes of two minibatches: four steps a batch
    sequence     one step, with `gradient: sequence`
    sft          likelihood of fresh samples of the teacher; one step
    gkd          TRL's GKDTrainer with lmbda=1, beta=1: the same divergence on student samples; one
                 step, since it has no others

Printed: exact KL(student‖teacher), nats per token, on held-out prompts, the student writing, with
the standard error of the last; and the CPU time of the training alone. TRL is not a dependency:
without it that way is left out. One thread.
"""

import argparse
import copy
import json
import random
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import kleash

REAL = Path(__file__).parents[2] / "shared" / "real"
TEACHER = REAL / "models" / "stories260K"
LAYERS, PROMPTS, TOKENS, LR, WARM_STEPS = (0, 2, 4), 24, 24, 1e-3, 60
EVALUATIONS = 2
RESPONSES = 8
"""Responses to each held-out prompt."""


def opened(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def read_prompts(name: str) -> list[str]:
    lines = (REAL / "prompts" / name).read_text("utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines]


class Texts:
    """Prompts as padded batches, and what a model writes to them."""

    def __init__(self) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(TEACHER)
        self.train = read_prompts("story-openings.jsonl")
        self.heldout = read_prompts("story-openings-heldout.jsonl")
        self.end = opened(TEACHER).generation_config.eos_token_id

    def batch(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        rows = [self.tokenizer(text, add_special_tokens=True)["input_ids"] for text in prompts]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])

    @torch.no_grad()
    def write(self, model: Any, prompts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, attention mask and response mask; nothing cuts into the distribution."""
        ids, mask = self.batch(prompts)
        sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=TOKENS,
            eos_token_id=self.end,
            pad_token_id=0,
            **sampling,
        )
        ends = (out[:, ids.shape[1] :] == self.end).long()
        response = ends.cumsum(1) - ends == 0
        whole = torch.cat([mask.bool(), response], dim=1)
        return out, whole, torch.cat([torch.zeros_like(mask).bool(), response], dim=1)


class Evaluation:
    """Exact KL(student‖teacher) per token, and the CPU time of all that is not evaluation."""

    def __init__(self, texts: Texts) -> None:
        self._texts, self._teacher = texts, opened(TEACHER)
        self.found: list[float] = []
        self.standard_error = 0.0
        self._evaluating, self._began = 0.0, time.process_time()

    def __call__(self, student: Any) -> None:
        """Measure on the student's responses to the held-out prompts."""
        began, state = time.process_time(), torch.get_rng_state()
        torch.manual_seed(123)
        prompts = self._texts.heldout * RESPONSES
        ids, mask, response = self._texts.write(student, prompts)
        torch.set_rng_state(state)
        with torch.no_grad():
            scores = kleash.score(student, self._teacher, ids, mask, response_mask=response)
        clusters = torch.arange(len(prompts)) % len(self._texts.heldout)
        mean = kleash.clustered_ratio(scores.kl.sum(1), response.sum(1), clusters)
        self.found.append(mean.mean)
        self.standard_error = mean.standard_error or 0.0
        self._evaluating += time.process_time() - began

    def __str__(self) -> str:
        seconds = time.process_time() - self._began - self._evaluating
        numbers = " ".join(f"{each:.4f}" for each in self.found)
        return f"{numbers} ± {self.standard_error:.4f}   {seconds:.0f} s of CPU"


def optimizer_of(model: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)


def sft(student: Any, teacher: Any, texts: Texts, steps: int, seen: Callable[[int], None]) -> None:
    optimizer = optimizer_of(student)
    for step in range(1, steps + 1):
        ids, mask, response = texts.write(teacher, random.sample(texts.train, PROMPTS))
        scores = kleash.score(student, teacher, ids, mask, response_mask=response)
        optimizer.zero_grad()
        (-scores.logprobs.sum() / response.sum()).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        seen(step)


def make_student(folder: Path, texts: Texts) -> Path:
    """Fewer layers of the teacher, and a first SFT, once for all."""
    if folder.exists():
        return folder
    teacher, student = opened(TEACHER), opened(TEACHER)
    student.model.layers = torch.nn.ModuleList(student.model.layers[i] for i in LAYERS)
    student.config.num_hidden_layers = len(LAYERS)
    if getattr(student.config, "layer_types", None):
        student.config.layer_types = student.config.layer_types[: len(LAYERS)]
    for number, layer in enumerate(student.model.layers):
        attention: Any = layer.self_attn
        attention.layer_idx = number
    torch.manual_seed(0)
    random.seed(0)
    sft(student, teacher, texts, WARM_STEPS, lambda step: None)
    student.save_pretrained(folder)
    texts.tokenizer.save_pretrained(folder)
    return folder


def by_kleash(
    student: Path, out: Path, evaluation: Evaluation, steps: int, seed: int, **algorithm: Any
) -> None:
    evaluation(opened(student))

    class Watch:
        def on_rollout(self, event: Any) -> None:
            done = event.step - 1
            if done and done % (steps // EVALUATIONS) == 0:
                evaluation(event.components.policy.model)

    run = kleash.train(
        {
            "algorithm": {"name": "distill", **algorithm},
            "policy": {"path": str(student)},
            "reference": {"path": str(TEACHER)},
            "prompts": {"train": str(REAL / "prompts" / "story-openings.jsonl")},
            "rollout": {"prompts_per_step": PROMPTS, "max_new_tokens": TOKENS},
            "leash": {"beta": 0.0, "placement": "measure"},
            "optimizer": {"lr": LR},
            "steps": steps,
            "seed": seed,
            "output": str(out),
        },
        callbacks=[Watch()],
        check=False,
    )
    evaluation(opened(run.policy_path))


def by_sft(student: Path, evaluation: Evaluation, texts: Texts, steps: int) -> None:
    model, teacher = opened(student), opened(TEACHER)
    evaluation(model)

    def seen(step: int) -> None:
        if step % (steps // EVALUATIONS) == 0:
            evaluation(model)

    sft(model, teacher, texts, steps, seen)


def by_gkd(
    student: Path, out: Path, evaluation: Evaluation, texts: Texts, steps: int, seed: int
) -> None:
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    model, teacher = opened(student), opened(TEACHER)
    evaluation(model)

    def collate(rows: list[dict[str, str]]) -> dict[str, Tensor]:
        ids, mask = texts.batch([row["prompt"] for row in rows])
        # The trainer divides by the labels of the batch it was given: as many as will be written.
        labels = torch.zeros(len(rows), TOKENS + 1, dtype=torch.long)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels,
            "prompts": ids,
            "prompt_attention_mask": mask,
        }

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % (steps // EVALUATIONS) == 0:
                evaluation(copy.deepcopy(model).eval())

    arguments = GKDConfig(
        output_dir=str(out),
        per_device_train_batch_size=PROMPTS,
        max_steps=steps,
        learning_rate=LR,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        max_grad_norm=1.0,
        lmbda=1.0,
        beta=1.0,
        temperature=1.0,
        max_new_tokens=TOKENS,
        seed=seed,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = GKDTrainer(
        model=model,
        teacher_model=teacher,
        args=arguments,
        data_collator=collate,
        train_dataset=Dataset.from_list([{"prompt": text} for text in texts.train]),
        processing_class=texts.tokenizer,
        callbacks=[Watch()],
    )
    trainer.train()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    ways = ["kleash", "passes", "sequence", "sft", "gkd"]
    parser.add_argument("--ways", nargs="+", choices=ways, default=ways)
    args = parser.parse_args()
    torch.set_num_threads(1)
    texts = Texts()
    student = make_student(args.out / "student", texts)
    marks = [PROMPTS * TOKENS * args.steps * i // EVALUATIONS for i in range(EVALUATIONS + 1)]
    print("tokens at most:", *marks, flush=True)
    for seed in range(args.seeds):
        once = {"epochs": 1, "minibatches": 1}
        kinds = {"kleash": once, "passes": {}, "sequence": {**once, "gradient": "sequence"}}
        for name in args.ways:
            torch.manual_seed(seed)
            random.seed(seed)
            evaluation, out = Evaluation(texts), args.out / f"{name}-{seed}"
            if name in kinds:
                by_kleash(student, out, evaluation, args.steps, seed, **kinds[name])
            elif name == "sft":
                by_sft(student, evaluation, texts, args.steps)
            elif find_spec("trl") is not None:
                by_gkd(student, out, evaluation, texts, args.steps, seed)
            print(seed, f"{name:8s}", evaluation, flush=True)


if __name__ == "__main__":
    main()
