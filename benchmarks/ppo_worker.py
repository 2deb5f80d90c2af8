"""One of the systems that `ppo_iteration.py` compares, in a process of its own.

    python benchmarks/ppo_worker.py SYSTEM FOLDER SHAPE EPOCHS THREADS [TRL]

Builds the models (SYSTEM = build), or runs iterations of a system for ever, each when a line "go"
comes in, and reports each as a line of JSON. kleash and TRL are imported by name and late: a system
is not to carry the other's libraries. Both are driven through their own loops, `kleash.train`
and `PPOTrainer.train`, with a gate at the beginning of an iteration and clocks around functions.
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
from ppo_iteration import NEW_TOKENS, PHASES, PROMPT_TOKENS, SHAPES, Iteration, Shape
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


def run_kleash(folder: Path, shape: Shape, epochs: int, *, own_value_model: bool) -> None:
    """Drive `kleash.train` itself; a gate stands before each of its steps."""
    loop: Any = importlib.import_module("kleash.training.loop")
    opening: Any = importlib.import_module("kleash.training.startup")
    updates: Any = importlib.import_module("kleash.training.optimization")
    rollout: Any = importlib.import_module("kleash.rollout.scoring_pass")
    rewards: Any = importlib.import_module("kleash.models.reward_model")
    configuration: Any = importlib.import_module("kleash.config.schema")
    phases = Phases()
    gate = Gate(phases, _memory("VmRSS"))
    assemble, step, write = opening.assemble, loop._step, rollout.generate
    optimise = updates._optimise

    def assemble_without_stop(config: Any) -> Any:
        components = assemble(config)
        learning = [components.policy.model, components.value]
        frozen = [components.reference.model, rewards_of(components)]
        gate.held = _mib(frozen) + _mib(learning, times=4)
        return replace(components, policy=replace(components.policy, stop_ids=(shape.vocabulary,)))

    def rewards_of(components: Any) -> Any:
        ((reward, _),) = components.reward.rewards.values()
        return reward._model

    def gated_step(*args: Any, **kwargs: Any) -> Any:
        gate.pass_through()
        return step(*args, **kwargs)

    def counted_write(*args: Any, **kwargs: Any) -> Any:
        rollout = write(*args, **kwargs)
        phases.tokens += int(rollout.response_mask.sum())
        return rollout

    def counted_optimise(*args: Any, **kwargs: Any) -> Any:
        phases.updates += 1
        return optimise(*args, **kwargs)

    opening.assemble, loop._step = assemble_without_stop, gated_step
    updates._optimise, rollout.generate = counted_optimise, counted_write
    phases.wrap(rollout, "generate", "generate")
    phases.wrap(rewards.WeightedSum, "score_each", "score")
    phases.wrap(rollout, "score", "score")
    phases.wrap(loop, "update", "update")
    tree = kleash_config(folder, shape, epochs, own_value_model=own_value_model)
    loop.train(configuration.parse_config(tree, where="benchmark"))


def kleash_config(
    folder: Path, shape: Shape, epochs: int, *, own_value_model: bool
) -> dict[str, Any]:
    """The run as kleash reads it."""
    value = {"kind": "model", "path": str(folder / "value")} if own_value_model else {}
    name = "four" if own_value_model else "default"
    return {
        "policy": {"path": str(folder / "policy")},
        "reward_models": {
            "reward": {"path": str(folder / "reward"), "template": "{prompt} {response}"}
        },
        "prompts": {"train": str(folder / "prompts.jsonl")},
        "rollout": {
            "prompts_per_step": shape.batch,
            "max_new_tokens": NEW_TOKENS,
            "microbatch_size": shape.batch,
        },
        "leash": {"beta": BETA},
        "algorithm": {
            "epochs": epochs,
            "minibatches": 1,
            "microbatch_size": shape.batch,
            "value": value,
        },
        "optimizer": {"lr": LEARNING_RATE},
        # Of eight responses, two with the likeliest words at each token would be a quarter.
        "logging": {"samples_per_step": 0},
        "steps": FOR_EVER,
        "device": "cpu",
        "output": tempfile.mkdtemp(prefix=f"run-{name}-", dir=folder) + "/run",
    }


def run_trl(folder: Path, shape: Shape, epochs: int) -> None:
    """Drive `PPOTrainer.train`; a gate stands before each of its generations."""
    datasets: Any = importlib.import_module("datasets")
    ppo: Any = importlib.import_module("trl.experimental.ppo")
    module: Any = importlib.import_module("trl.experimental.ppo.ppo_trainer")
    phases = Phases()
    gate = Gate(phases, _memory("VmRSS"))

    # Not AutoTokenizer, which for some architectures makes a tokenizer of another kind.
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder / "policy")
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
        args=trl_config(ppo.PPOConfig, folder, shape, epochs),
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


def trl_config(maker: Any, folder: Path, shape: Shape, epochs: int) -> Any:
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
        per_device_train_batch_size=shape.batch,
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        num_ppo_epochs=epochs,
        local_rollout_forward_batch_size=shape.batch,
        total_episodes=FOR_EVER * shape.batch,
        response_length=NEW_TOKENS,
        temperature=1.0,
        kl_coef=BETA,
        learning_rate=LEARNING_RATE,
    )


def main() -> None:
    """Be a worker."""
    system, folder, shape, epochs, threads, *trl = sys.argv[1:]
    torch.set_num_threads(int(threads))
    # Behind everything that is installed: nothing but TRL itself is to come from there.
    sys.path += trl
    match system:
        case "build":
            build(Path(folder), SHAPES[shape])
        case "trl":
            run_trl(Path(folder), SHAPES[shape], int(epochs))
        case "kleash-four":
            run_kleash(Path(folder), SHAPES[shape], int(epochs), own_value_model=True)
        case _:
            run_kleash(Path(folder), SHAPES[shape], int(epochs), own_value_model=False)


if __name__ == "__main__":
    main()
