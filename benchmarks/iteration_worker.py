"""One of the systems that `iteration.py` compares, in a process of its own.

    python benchmarks/iteration_worker.py ALGORITHM SYSTEM FOLDER SHAPE PASSES THREADS [TRL]

PASSES is epochs x minibatches, such as 4x1. Builds the models (SYSTEM = build), or runs iterations
of a system for ever, each when a line "go" comes in, and reports each as a line of JSON. kleash and
TRL are imported by name and late: a system is not to carry the other's libraries. Both are driven
through their own loops, `kleash.train` and TRL's `Trainer.train`, with a gate at the beginning of
an iteration and clocks around functions.
"""

import importlib
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from iteration import (
    GROUP,
    NEW_TOKENS,
    PHASES,
    PROMPT_TOKENS,
    SHAPES,
    Iteration,
    Passes,
    Shape,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

BETA, LEARNING_RATE = 0.05, 3e-6
MIB = 2**20
FOR_EVER = 10**6


class Phases:
    """Wall and CPU seconds by phase, taken by wrapping functions."""

    def __init__(self) -> None:
        self.clear()
        self._inside = False

    def clear(self) -> None:
        self.wall: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self.cpu: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self.tokens = self.updates = 0

    def wrap(self, owner: Any, name: str, phase: str | None = None) -> None:
        """Time every outermost call of `owner.name`.

        Args:
            owner: module, class or object that holds the function.
            name: of the function.
            phase: where its time goes; None: "update" where gradients are recorded, else "score".
        """
        original: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return original(*args, **kwargs)
            where = phase or ("update" if torch.is_grad_enabled() else "score")
            self._inside = True
            wall, cpu = time.perf_counter(), time.process_time()
            try:
                return original(*args, **kwargs)
            finally:
                self.wall[where] += time.perf_counter() - wall
                self.cpu[where] += time.process_time() - cpu
                self._inside = False

        setattr(owner, name, timed)


class Gate:
    """Where an iteration begins: reports the one before, and waits for leave to begin another."""

    def __init__(self, phases: Phases, idle: float):
        """Open a gate.

        Args:
            phases: the clocks that the wrapped functions write to.
            idle: resident memory before any model was loaded, MiB.
        """
        self._phases, self._idle, self._begun = phases, idle, False
        self.held = 0.0
        """Weights, gradients and optimiser states, MiB."""
        # What libraries print must not mix with the reports.
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def pass_through(self) -> None:
        """Call at the beginning of every iteration."""
        if self._begun:
            self._report()
        if sys.stdin.readline().strip() != "go":
            os._exit(0)
        self._begun = True
        self._phases.clear()
        _forget_peak()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def _report(self) -> None:
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        phases, peak = self._phases, _memory("VmHWM")
        phases.wall["other"] = wall - sum(phases.wall.values())
        phases.cpu["other"] = cpu - sum(phases.cpu.values())
        iteration = Iteration(
            wall=wall,
            cpu=cpu,
            wall_by_phase=dict(phases.wall),
            cpu_by_phase=dict(phases.cpu),
            peak=peak,
            above=peak - self._idle - self.held,
            tokens=phases.tokens,
            updates=phases.updates,
        )
        print(json.dumps(asdict(iteration)), file=self._out)


def _memory(key: str) -> float:
    """A figure of this process in MiB: VmRSS (now) or VmHWM (peak since it was forgotten)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # no /proc: the peak of the whole process is all there is
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key + ":"))


def _forget_peak() -> None:
    """Let the kernel count the peak anew, where it can; else the peak includes loading."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _mib(models: list[Any], *, times: int = 1) -> float:
    """Memory of the parameters of some models, MiB."""
    sizes = [p.numel() * p.element_size() for model in models for p in model.parameters()]
    return times * sum(sizes) / MIB


def build(folder: Path, shape: Shape) -> None:
    """Save the models with random weights, their tokenizer, and prompts of exactly 32 tokens."""
    torch.manual_seed(0)
    words = ["<unk>", "<eos>", "<pad>"]
    words += [f"w{i}" for i in range(shape.vocabulary - len(words))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>"
    )
    config = AutoConfig.for_model(
        shape.kind,
        vocab_size=shape.vocabulary,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=2,
        num_labels=1,
        **shape.sizes,
    )
    makers: dict[str, Any] = {
        "policy": AutoModelForCausalLM,
        "reward": AutoModelForSequenceClassification,
        "value": AutoModelForSequenceClassification,
    }
    for name, maker in makers.items():
        maker.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    draw = random.Random(0)
    with (folder / "prompts.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(8 * shape.batch):
            prompt = " ".join(draw.choice(words[3:]) for _ in range(PROMPT_TOKENS))
            file.write(json.dumps({"prompt": prompt}) + "\n")


def run_kleash(
    folder: Path, shape: Shape, algorithm: str, passes: Passes, *, own_value_model: bool
) -> None:
    """Drive `kleash.train` itself; a gate stands before each of its steps."""
    loading: Any = importlib.import_module("kleash.config.loading")
    components: Any = importlib.import_module("kleash.training.components").Components
    loop: Any = importlib.import_module("kleash.training.loop")
    kept_reading: Any = importlib.import_module("kleash.training.kept_reading")
    optimization: Any = importlib.import_module("kleash.training.optimization")
    startup: Any = importlib.import_module("kleash.training.startup")
    phases = Phases()
    gate = Gate(phases, _memory("VmRSS"))
    assemble, step, write = startup.assemble, loop.Trainer._step, components.write
    optimise = optimization.PolicyUpdater._optimise

    def assemble_without_stop(*args: Any, **named: Any) -> Any:
        assembled = assemble(*args, **named)
        learning = [assembled.policy.model, assembled.value]
        ((reward, _),) = assembled.reward.rewards.values()
        frozen = [assembled.reference.model, reward._model]
        gate.held = _mib(frozen) + _mib([m for m in learning if m is not None], times=4)
        return replace(assembled, policy=replace(assembled.policy, stop_ids=(shape.vocabulary,)))

    def gated_step(*args: Any, **kwargs: Any) -> Any:
        gate.pass_through()
        return step(*args, **kwargs)

    def counted_write(*args: Any, **kwargs: Any) -> Any:
        responses = write(*args, **kwargs)
        phases.tokens += int(responses.rollout.response_mask.sum())
        return responses

    def counted_optimise(*args: Any, **kwargs: Any) -> Any:
        phases.updates += 1
        return optimise(*args, **kwargs)

    startup.assemble, loop.Trainer._step = assemble_without_stop, gated_step
    optimization.PolicyUpdater._optimise, components.write = counted_optimise, counted_write
    phases.wrap(components, "write", "generate")
    phases.wrap(components, "judge", "score")
    phases.wrap(components, "score", "score")
    phases.wrap(kept_reading.SharedReading, "score", "score")
    phases.wrap(optimization.PolicyUpdater, "update", "update")
    tree = kleash_config(folder, shape, algorithm, passes, own_value_model=own_value_model)
    # Without the preflight, which refuses a policy that never ends a response.
    loop.train(loading.parse_config(tree, where="benchmark"))


def kleash_config(
    folder: Path, shape: Shape, algorithm: str, passes: Passes, *, own_value_model: bool
) -> dict[str, Any]:
    """The run as kleash reads it."""
    group = 1 if algorithm == "ppo" else GROUP
    value = {"kind": "model", "path": str(folder / "value")} if own_value_model else {}
    critic = {"value": value} if algorithm == "ppo" else {}
    name = "four" if own_value_model else "default"
    return {
        "policy": {"path": str(folder / "policy")},
        "reward_models": {
            "reward": {"path": str(folder / "reward"), "template": "{prompt} {response}"}
        },
        "prompts": {"train": str(folder / "prompts.jsonl")},
        "rollout": {
            "prompts_per_step": shape.batch // group,
            "responses_per_prompt": group,
            "max_new_tokens": NEW_TOKENS,
            "microbatch_size": shape.batch,
        },
        "leash": {"beta": BETA},
        "algorithm": {
            "name": algorithm,
            "epochs": passes.epochs,
            "minibatches": passes.minibatches,
            "microbatch_size": shape.batch,
            **critic,
        },
        "optimizer": {"lr": LEARNING_RATE},
        # Of eight responses, two with the likeliest words at each token would be a quarter.
        "logging": {"samples_per_step": 0},
        "steps": FOR_EVER,
        "device": "cpu",
        "output": tempfile.mkdtemp(prefix=f"run-{name}-", dir=folder) + "/run",
    }


def run_trl_ppo(folder: Path, shape: Shape, passes: Passes) -> None:
    """Drive `PPOTrainer.train`; a gate stands before each of its generations."""
    datasets: Any = importlib.import_module("datasets")
    ppo: Any = importlib.import_module("trl.experimental.ppo")
    module: Any = importlib.import_module("trl.experimental.ppo.ppo_trainer")
    phases = Phases()
    gate = Gate(phases, _memory("VmRSS"))

    tokenizer = _trl_tokenizer(folder)
    tokenizer.add_special_tokens({"pad_token": "<beyond>"})
    lines = (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    ids = [tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines]
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "policy") for _ in "12")
    value, reward = (
        AutoModelForSequenceClassification.from_pretrained(folder / name)
        for name in ("value", "reward")
    )
    gate.held = _mib([reference, reward]) + _mib([policy, value], times=4)
    trainer = ppo.PPOTrainer(
        args=trl_config(ppo.PPOConfig, folder, shape, passes),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=datasets.Dataset.from_dict({"input_ids": ids}),
        eval_dataset=datasets.Dataset.from_dict({"input_ids": ids[: shape.batch]}),
    )
    write, optimise = module.batch_generation, trainer.optimizer.step

    def counted_write(*args: Any, **kwargs: Any) -> Any:
        texts, logits = write(*args, **kwargs)
        phases.tokens += texts[:, PROMPT_TOKENS:].numel()
        return texts, logits

    def counted_optimise(*args: Any, **kwargs: Any) -> Any:
        phases.updates += 1
        return optimise(*args, **kwargs)

    module.batch_generation, trainer.optimizer.step = counted_write, counted_optimise
    phases.wrap(module, "batch_generation", "generate")
    for name in ("forward", "get_reward", "selective_log_softmax"):
        phases.wrap(module, name)
    phases.wrap(trainer.accelerator, "backward", "update")
    phases.wrap(trainer.optimizer, "step", "update")
    phases.wrap(trainer.optimizer, "zero_grad", "update")
    timed_write = module.batch_generation

    def gated_write(*args: Any, **kwargs: Any) -> Any:
        gate.pass_through()
        return timed_write(*args, **kwargs)

    module.batch_generation = gated_write
    trainer.train()


def trl_config(maker: Any, folder: Path, shape: Shape, passes: Passes) -> Any:
    """The run as TRL reads it; what kleash has by default is set where TRL's default differs."""
    return maker(
        output_dir=str(folder / "trl-output"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        num_sample_generations=0,
        per_device_train_batch_size=shape.batch // passes.minibatches,
        gradient_accumulation_steps=1,
        num_mini_batches=passes.minibatches,
        num_ppo_epochs=passes.epochs,
        local_rollout_forward_batch_size=shape.batch,
        total_episodes=FOR_EVER * shape.batch,
        response_length=NEW_TOKENS,
        temperature=1.0,
        kl_coef=BETA,
        learning_rate=LEARNING_RATE,
    )


def run_trl_group(folder: Path, shape: Shape, algorithm: str, passes: Passes) -> None:
    """Drive `GRPOTrainer.train` or `RLOOTrainer.train`; a gate stands before each generation."""
    datasets: Any = importlib.import_module("datasets")
    trl: Any = importlib.import_module("trl")
    phases = Phases()
    gate = Gate(phases, _memory("VmRSS"))

    # A stop token beyond the vocabulary: no response ends early.
    tokenizer = _trl_tokenizer(folder)
    tokenizer.add_special_tokens({"eos_token": "<beyond>", "pad_token": "<beyond>"})
    lines = (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    policy = AutoModelForCausalLM.from_pretrained(folder / "policy")
    policy.generation_config.eos_token_id = None
    reward = AutoModelForSequenceClassification.from_pretrained(folder / "reward")
    reader = _trl_tokenizer(folder)

    @torch.no_grad()
    def judge(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        texts = [f"{p} {c}" for p, c in zip(prompts, completions, strict=True)]
        return reward(**reader(texts, return_tensors="pt", padding=True)).logits[:, 0].tolist()

    kinds = {"grpo": (trl.GRPOTrainer, trl.GRPOConfig), "rloo": (trl.RLOOTrainer, trl.RLOOConfig)}
    make, make_config = kinds[algorithm]
    trainer = make(
        model=policy,
        reward_funcs=[judge],
        args=make_config(
            output_dir=str(folder / "trl-output"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            per_device_train_batch_size=shape.batch // passes.minibatches,
            steps_per_generation=passes.minibatches,
            gradient_accumulation_steps=1,
            num_generations=GROUP,
            num_iterations=passes.epochs,
            max_steps=FOR_EVER,
            max_completion_length=NEW_TOKENS,
            temperature=1.0,
            beta=BETA,
            learning_rate=LEARNING_RATE,
        ),
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list([json.loads(line) for line in lines]),
    )
    gate.held = _mib([trainer.ref_model, reward]) + _mib([policy], times=4)
    generate, rollout = trainer._generate_single_turn, trainer._generate_and_score_completions

    def counted(*args: Any, **kwargs: Any) -> Any:
        written = generate(*args, **kwargs)
        # GRPO's has the log-probabilities beside the ids.
        ids = written[0] if isinstance(written, tuple) else written
        phases.tokens += sum(len(row) for row in ids)
        return written

    def gated(*args: Any, **kwargs: Any) -> Any:
        gate.pass_through()
        return rollout(*args, **kwargs)

    def count_step(*args: Any, **kwargs: Any) -> Any:
        phases.updates += 1
        return optimise(*args, **kwargs)

    trainer._generate_single_turn, trainer._generate_and_score_completions = counted, gated
    phases.wrap(trainer, "_generate_single_turn", "generate")
    phases.wrap(trainer, "_calculate_rewards", "score")
    phases.wrap(trainer, "_get_per_token_logps_and_entropies")
    phases.wrap(trainer, "_compute_loss", "update")
    phases.wrap(trainer.accelerator, "backward", "update")
    trainer.create_optimizer()
    optimise = trainer.optimizer.step
    trainer.optimizer.step = count_step
    phases.wrap(trainer.optimizer, "step", "update")
    trainer.train()


def _trl_tokenizer(folder: Path) -> Any:
    """Not AutoTokenizer, which for some architectures makes a tokenizer of another kind."""
    return PreTrainedTokenizerFast.from_pretrained(folder / "policy")


def main() -> None:
    """Be a worker."""
    algorithm, system, name, size, given, threads, *trl = sys.argv[1:]
    folder, shape, passes = Path(name), SHAPES[size], Passes(*map(int, given.split("x")))
    torch.set_num_threads(int(threads))
    # Before an installed TRL, which may be another; the folder holds nothing but TRL itself.
    sys.path[:0] = trl
    if system == "build":
        build(folder, shape)
    elif system == "trl" and algorithm == "ppo":
        run_trl_ppo(folder, shape, passes)
    elif system == "trl":
        run_trl_group(folder, shape, algorithm, passes)
    else:
        own = system == "kleash-four"
        run_kleash(folder, shape, algorithm, passes, own_value_model=own)


if __name__ == "__main__":
    main()
