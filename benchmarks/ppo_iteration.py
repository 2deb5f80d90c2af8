"""One PPO iteration, kleash beside TRL's PPOTrainer: CPU time, wall time, memory, by phase.

    python benchmarks/ppo_iteration.py --shape a --epochs 1 --runs 5

The same models with random weights, the same prompts, lengths and epochs, on one thread, three
systems in processes of their own that take turns, one iteration each, after a warm-up:

    trl             TRL 1.12's PPOTrainer: policy, reference, reward and value model
    kleash-four     `kleash.train`, the same four models
    kleash-default  `kleash.train` as it is by default: values from a head on the policy's trunk

Every response has 64 tokens. TRL is given no stop token, kleash a stop id beyond the vocabulary.
TRL finds padding by comparing ids, so its padding id lies beyond the vocabulary too: nothing is
masked in either. One minibatch of the whole batch, so one optimiser step an epoch.

Phases: `generate` is writing alone; `score` every forward pass without gradient (policy, reference,
value and reward model) and what is read off it; `update` forward, backward and optimiser; `other`
the rest (TRL: its entropy for the log is there). Memory "above" is the peak less what the
process held before it loaded a model, less weights, gradients and optimiser states.

TRL 1.16 has no PPO any more, so 1.12 is installed, without dependencies, into a folder of its own.
"""

import argparse
import importlib
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

TRL = "trl==1.12.0"
SYSTEMS = ("trl", "kleash-four", "kleash-default")
PHASES = ("generate", "score", "update", "other")
PROMPT_TOKENS, NEW_TOKENS = 32, 64
BETA, LEARNING_RATE = 0.05, 3e-6
MIB = 2**20
FOR_EVER = 10**6


@dataclass(frozen=True)
class Shape:
    """A model and a batch."""

    kind: str
    vocabulary: int
    batch: int
    sizes: dict[str, int]

    @property
    def new_tokens(self) -> int:
        """Tokens written in an iteration."""
        return self.batch * NEW_TOKENS


SHAPES = {
    "a": Shape(
        "llama",
        vocabulary=50_257,
        batch=16,
        sizes={
            "hidden_size": 160,
            "num_hidden_layers": 4,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "intermediate_size": 640,
        },
    ),
    "b": Shape(
        "qwen2",
        vocabulary=151_936,
        batch=8,
        sizes={
            "hidden_size": 896,
            "num_hidden_layers": 4,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "intermediate_size": 4_864,
        },
    ),
    # Seconds instead of minutes: to try the script itself.
    "tiny": Shape(
        "llama",
        vocabulary=500,
        batch=4,
        sizes={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 64,
        },
    ),
}


@dataclass(frozen=True)
class Iteration:
    """What one iteration took."""

    wall: float
    """Seconds."""
    cpu: float
    """CPU-seconds of the process, all threads."""
    wall_by_phase: dict[str, float]
    cpu_by_phase: dict[str, float]
    peak: float
    """Largest resident memory during the iteration, MiB."""
    above: float
    """The peak less libraries, weights, gradients and optimiser states, MiB."""
    tokens: int
    updates: int


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
        import torch

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
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        PreTrainedTokenizerFast,
    )

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
    """Drive `kleash.train.train` itself; a gate stands before each of its steps."""
    loop: Any = importlib.import_module("kleash.train")
    evaluation: Any = importlib.import_module("kleash.evaluation")
    rewards: Any = importlib.import_module("kleash.reward_models")
    from kleash.config import parse_config

    phases = Phases()
    gate = Gate(phases, _memory("VmRSS"))
    assemble, step, write = loop.assemble, loop._step, evaluation.generate
    optimise = loop._optimise

    def assemble_without_stop(config: Any) -> Any:
        crew = assemble(config)
        learning = [crew.policy.model, crew.value]
        frozen = [crew.reference.model, rewards_of(crew)]
        gate.held = _mib(frozen) + _mib(learning, times=4)
        return replace(crew, policy=replace(crew.policy, stop_ids=(shape.vocabulary,)))

    def rewards_of(crew: Any) -> Any:
        ((reward, _),) = crew.reward.rewards.values()
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

    loop.assemble, loop._step = assemble_without_stop, gated_step
    loop._optimise, evaluation.generate = counted_optimise, counted_write
    phases.wrap(evaluation, "generate", "generate")
    phases.wrap(rewards.WeightedSum, "score_each", "score")
    phases.wrap(loop, "score", "score")
    phases.wrap(loop, "_update", "update")
    tree = kleash_config(folder, shape, epochs, own_value_model=own_value_model)
    loop.train(parse_config(tree, where="benchmark"))


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
        "ppo": {"epochs": epochs, "minibatches": 1, "microbatch_size": shape.batch},
        "value": value,
        "optimizer": {"lr": LEARNING_RATE},
        "steps": FOR_EVER,
        "device": "cpu",
        "output": tempfile.mkdtemp(prefix=f"run-{name}-", dir=folder) + "/run",
    }


def run_trl(folder: Path, shape: Shape, epochs: int) -> None:
    """Drive `PPOTrainer.train`; a gate stands before each of its generations."""
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    ppo: Any = importlib.import_module("trl.experimental.ppo")
    module: Any = importlib.import_module("trl.experimental.ppo.ppo_trainer")
    phases = Phases()
    gate = Gate(phases, _memory("VmRSS"))

    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "policy")
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
        train_dataset=Dataset.from_dict({"input_ids": ids}),
        eval_dataset=Dataset.from_dict({"input_ids": ids[: shape.batch]}),
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


class Worker:
    """A system in a process of its own, warmed up by one iteration."""

    def __init__(self, system: str, options: argparse.Namespace, folder: Path):
        self._process = _start(system, options, folder)
        self.measure()

    def measure(self) -> Iteration:
        """Let it run one iteration."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        stdin.write("go\n")
        stdin.flush()
        line = stdout.readline()
        if not line:
            raise SystemExit(f"a worker failed with exit code {self._process.wait()}; see above")
        return Iteration(**json.loads(line))

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


def _start(system: str, options: argparse.Namespace, folder: Path) -> "subprocess.Popen[str]":
    threads = str(options.threads)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    if system == "trl":
        # Behind everything that is installed: only TRL itself is to come from there.
        environment["KLEASH_BENCHMARK_TRL"] = str(options.trl)
    command = [sys.executable, "-W", "ignore", __file__, "--worker", system, "--folder", folder]
    command += ["--shape", options.shape, "--epochs", str(options.epochs), "--threads", threads]
    return subprocess.Popen(
        [str(part) for part in command],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None if options.verbose else subprocess.DEVNULL,
        text=True,
    )


def work(options: argparse.Namespace) -> None:
    """Be a worker."""
    import torch

    torch.set_num_threads(options.threads)
    folder, shape = options.folder, SHAPES[options.shape]
    if trl := os.environ.get("KLEASH_BENCHMARK_TRL"):
        sys.path.append(trl)
    match options.worker:
        case "build":
            build(folder, shape)
        case "trl":
            importlib.import_module("trl.experimental.ppo.ppo_trainer")
            run_trl(folder, shape, options.epochs)
        case "kleash-four":
            importlib.import_module("kleash.train")
            run_kleash(folder, shape, options.epochs, own_value_model=True)
        case _:
            importlib.import_module("kleash.train")
            run_kleash(folder, shape, options.epochs, own_value_model=False)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, list[Iteration]]:
    """Let the systems take turns; in shape b only one at a time is in memory."""
    results: dict[str, list[Iteration]] = {system: [] for system in options.systems}
    with ExitStack() as stack:
        resident: dict[str, Worker] = {}
        for _ in range(options.runs):
            for system in options.systems:
                worker = resident.get(system) or Worker(system, options, folder)
                iteration = worker.measure()
                _require_same_work(iteration, options)
                results[system].append(iteration)
                print(json.dumps({"system": system, **asdict(iteration)}), file=sys.stderr)
                if options.shape == "b":
                    worker.close()
                elif system not in resident:
                    stack.callback(worker.close)
                    resident[system] = worker
    return results


def _require_same_work(iteration: Iteration, options: argparse.Namespace) -> None:
    expected = (SHAPES[options.shape].new_tokens, options.epochs)
    if (iteration.tokens, iteration.updates) != expected:
        raise SystemExit(
            f"expected {expected[0]} tokens and {expected[1]} updates in an iteration, got "
            f"{iteration.tokens} and {iteration.updates}: the systems do not do the same"
        )


def table(results: dict[str, list[Iteration]], options: argparse.Namespace) -> str:
    """The result in Markdown."""
    systems = list(results)
    first, *others = systems
    rows: list[tuple[str, Callable[[Iteration], float], int]] = [
        ("CPU-seconds", lambda i: i.cpu, 2),
        *((f"– {phase}", _cpu_of(phase), 2) for phase in PHASES),
        ("wall seconds", lambda i: i.wall, 2),
        ("peak RSS, MiB", lambda i: i.peak, 0),
        ("– above libraries, weights, gradients, optimiser, MiB", lambda i: i.above, 0),
    ]
    ratios = [f"{system} / {first}" for system in others]
    lines = [
        f"| shape {options.shape}, epochs {options.epochs} | "
        + " | ".join([*systems, *ratios])
        + " |",
        "|---|" + "---:|" * (len(systems) + len(ratios)),
    ]
    for label, read, digits in rows:
        medians = [statistics.median(read(i) for i in results[system]) for system in systems]
        shares = [f"{m / medians[0]:.2f}" if medians[0] > 0 else "–" for m in medians[1:]]
        cells = [f"{m:,.{digits}f}" for m in medians]
        lines.append(f"| {label} | " + " | ".join([*cells, *shares]) + " |")
    return "\n".join(lines)


def _cpu_of(phase: str) -> Callable[[Iteration], float]:
    return lambda iteration: iteration.cpu_by_phase[phase]


def machine(options: argparse.Namespace) -> str:
    """What it ran on and with."""
    from importlib.metadata import version

    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [s for s in info.read_text().splitlines() if s.startswith("model name")]
        processor = names[0].split(":", 1)[1].strip() if names else processor
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return (
        f"{processor}, {os.cpu_count()} cores, {options.threads} thread(s); Python "
        f"{platform.python_version()}, {libraries}, {TRL.replace('==', ' ')}; "
        f"medians of {options.runs} after a warm-up, taking turns."
    )


def install_trl(folder: Path) -> None:
    """Install TRL, and TRL alone, into a folder, unless it is there."""
    if not (folder / "trl").is_dir():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target"]
        subprocess.run([*command, str(folder), TRL], check=True)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    parser.add_argument("--shape", choices=sorted(SHAPES), default="a")
    parser.add_argument("--epochs", type=int, default=1, help="passes over a rollout")
    parser.add_argument("--runs", type=int, default=5, help="measured iterations of each system")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument(
        "--trl", type=Path, default=cache / "kleash" / TRL, help="folder of TRL; made if missing"
    )
    parser.add_argument("--verbose", action="store_true", help="show what the workers print")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure and print the table."""
    options = parse()
    if options.worker:
        work(options)
        return
    if "trl" in options.systems:
        install_trl(options.trl)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if _start("build", options, folder).wait():
            raise SystemExit("the models could not be built; see --verbose")
        results = measure(options, folder)
    print(table(results, options))
    print()
    print(machine(options))


if __name__ == "__main__":
    main()
