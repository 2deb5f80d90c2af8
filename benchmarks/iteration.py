"""One iteration of PPO, GRPO or RLOO beside TRL's: CPU time, wall time, memory, by phase.

    python benchmarks/iteration.py --shape a --epochs 1 --runs 5
    python benchmarks/iteration.py --algorithm grpo --shape a --runs 5

The same models with random weights, the same prompts, lengths and epochs, on one thread, the
systems in processes of their own that take turns, one iteration each, after a warm-up:

    trl             TRL's trainer: policy, reference and reward model, with PPO also a value model
    kleash-four     PPO: `kleash.train`, the same four models
    kleash-default  kleash as it is by default; with PPO, values from a head on the policy's trunk

Every response has 64 tokens. TRL is given no stop token, kleash a stop id beyond the vocabulary.
TRL finds padding by comparing ids, so its padding id lies beyond the vocabulary too: nothing is
masked in either. One minibatch of the whole batch (`--minibatches`), so one optimiser step an
epoch.

Phases: `generate` is writing alone; `score` every forward pass before the update (policy,
reference, value and reward model) and what is read off it; `update` forward, backward and
optimiser, in kleash's first update without the forward pass, which is that of scoring; `other` the
rest (TRL: its entropy for the log is there). Memory "above" is the peak less what the
process held before it loaded a model, less weights, gradients and optimiser states.

GRPO and RLOO are TRL 1.16's, in groups of 4 responses and with β > 0, so that it reads a reference.
PPO is TRL 1.12's, the last to have it. Both are installed, without dependencies, into folders of
their own.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

TRL = {"ppo": "trl==1.12.0", "grpo": "trl==1.16.0", "rloo": "trl==1.16.0"}
"""The newest release that has the algorithm."""
SYSTEMS = {
    "ppo": ("trl", "kleash-four", "kleash-default"),
    "grpo": ("trl", "kleash-default"),
    "rloo": ("trl", "kleash-default"),
}
GROUP = 4
"""Responses to a prompt, for GRPO and RLOO."""
PHASES = ("generate", "score", "update", "other")
PROMPT_TOKENS, NEW_TOKENS = 32, 64


@dataclass(frozen=True)
class Shape:
    """A model and a batch."""

    kind: str
    vocabulary: int
    batch: int
    sizes: dict[str, int]
    together: bool = True
    """Whether all systems fit into memory at once; else each is started anew for every turn."""

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
        together=False,
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


class Passes(NamedTuple):
    """Over a rollout."""

    epochs: int
    minibatches: int = 1


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
            raise SystemExit(
                f"a worker failed with exit code {self._process.wait()}: --verbose shows why"
            )
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
    program = Path(__file__).with_name("iteration_worker.py")
    command = [sys.executable, "-W", "ignore", program, options.algorithm, system, folder]
    passes = f"{options.epochs}x{options.minibatches}"
    command += [options.shape, passes, options.threads]
    if system == "trl":
        command.append(options.trl)
    return subprocess.Popen(
        [str(part) for part in command],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None if options.verbose else subprocess.DEVNULL,
        text=True,
    )


def measure(options: argparse.Namespace, folder: Path) -> dict[str, list[Iteration]]:
    """Let the systems take turns."""
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
                if not SHAPES[options.shape].together:
                    worker.close()
                elif system not in resident:
                    stack.callback(worker.close)
                    resident[system] = worker
    return results


def _require_same_work(iteration: Iteration, options: argparse.Namespace) -> None:
    expected = (SHAPES[options.shape].new_tokens, options.epochs * options.minibatches)
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
        f"| {options.algorithm}, shape {options.shape}, epochs {options.epochs}, "
        f"minibatches {options.minibatches} | " + " | ".join([*systems, *ratios]) + " |",
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
        f"{platform.python_version()}, {libraries}, "
        f"{TRL[options.algorithm].replace('==', ' ')}; "
        f"medians of {options.runs} after a warm-up, taking turns."
    )


def install_trl(folder: Path, release: str) -> None:
    """Install TRL, and TRL alone, into a folder, unless it is there."""
    if not (folder / "trl").is_dir():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target"]
        subprocess.run([*command, str(folder), release], check=True)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--algorithm", choices=sorted(TRL), default="ppo")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="a")
    parser.add_argument("--epochs", type=int, default=1, help="passes over a rollout")
    parser.add_argument("--minibatches", type=int, default=1, help="optimiser steps of an epoch")
    parser.add_argument("--runs", type=int, default=5, help="measured iterations of each system")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--systems", nargs="+", help="default: all that there are")
    parser.add_argument("--trl", type=Path, help="folder of TRL; made if missing")
    parser.add_argument("--verbose", action="store_true", help="show what the workers print")
    options = parser.parse_args()
    known = SYSTEMS[options.algorithm]
    options.systems = options.systems or list(known)
    if unknown := sorted(set(options.systems) - set(known)):
        parser.error(f"expected systems among {', '.join(known)}, got {', '.join(unknown)}")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    options.trl = options.trl or cache / "kleash" / TRL[options.algorithm]
    return options


def main() -> None:
    """Measure and print the table."""
    options = parse()
    if "trl" in options.systems:
        install_trl(options.trl, TRL[options.algorithm])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if _start("build", options, folder).wait():
            raise SystemExit("the models could not be built: --verbose shows why")
        results = measure(options, folder)
    print(table(results, options))
    print()
    print(machine(options))


if __name__ == "__main__":
    main()
