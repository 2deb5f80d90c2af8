"""How long does `kleash train` take to its first rollout, and `kleash audit A A` to its end?

    python benchmarks/start_up.py --baseline OTHER/src --runs 5
    python benchmarks/start_up.py --profile train

`train` is the embedded world without a configuration, built once before anything is measured; the
clock stops when the responses of the first step would be written, after the quick checks and after
the reference's scores were looked at for β. `audit` is a model of that world against itself on 16
prompts. Every run is a process of its own, from the start of Python, and the sources take turns;
`--baseline` names the `src` folder of another checkout. `libraries` imports torch and the parts of
transformers that a model needs, and opens the same model, without kleash.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1] / "src"
LIBRARIES = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoTokenizer.from_pretrained(sys.argv[1])
AutoModelForCausalLM.from_pretrained(sys.argv[1])
"""


def until_the_first_rollout(output: str) -> None:
    """`kleash train`, ended when the first step begins to write."""
    from kleash.cli.main import app
    from kleash.storage.run_directory import RunWriter
    from kleash.training.components import Components

    write, create = Components.write, RunWriter.create
    begun: list[bool] = []

    def create_and_note(*given: Any, **named: Any) -> Any:
        begun.append(True)
        return create(*given, **named)

    def write_or_end(*given: Any, **named: Any) -> Any:
        if begun:
            print(json.dumps("the first rollout"), flush=True)
            os._exit(0)
        return write(*given, **named)

    RunWriter.create = create_and_note
    Components.write = write_or_end
    app(["train", "--output", output])


def whole_audit(model: str, prompts: str) -> None:
    """`kleash audit A A`."""
    from kleash.cli.main import app

    app(["audit", model, model, "--prompts", prompts])


def prepare(folder: Path) -> tuple[str, str]:
    """The world's supervised policy, and 16 of its prompts."""
    code = (
        "from kleash.config.loading import load_config\n"
        "from kleash.config.recipe_library import FOLDER\n"
        "from kleash.playground.build import with_world\n"
        "path = FOLDER / 'embedded-world.yaml'\n"
        "config = with_world(load_config(None, {}, base=path))\n"
        "print(config.policy.path); print(config.prompts.train)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=_environment(HERE), capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    model, prompts = done.stdout.splitlines()[-2:]
    few = folder / "prompts.jsonl"
    lines = Path(prompts).read_text(encoding="utf-8").splitlines()[:16]
    few.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return model, str(few)


def _environment(source: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}


def timed(command: list[str], source: Path) -> tuple[float, float]:
    """Wall and CPU seconds of a process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    done = subprocess.run(command, env=_environment(source), capture_output=True, text=True)
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--baseline", type=Path, help="src folder of another checkout")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--profile", choices=("train", "audit"))
    parser.add_argument("--only", choices=("train", "audit", "libraries"))
    parser.add_argument("--worker", nargs="+")
    given = parser.parse_args()
    if given.worker:
        what, *rest = given.worker
        {"train": until_the_first_rollout, "audit": whole_audit}[what](*rest)
        return
    with tempfile.TemporaryDirectory() as name:
        model, prompts = prepare(Path(name))
        own = [sys.executable, __file__, "--worker"]
        commands = {
            "libraries": [sys.executable, "-c", LIBRARIES, model],
            "audit": [*own, "audit", model, prompts],
            "train": [*own, "train"],
        }
        if given.profile:
            profile(given.profile, commands[given.profile], Path(name))
            return
        sources = {"now": HERE} | ({"before": given.baseline} if given.baseline else {})
        chosen = [given.only] if given.only else list(commands)
        compare({what: commands[what] for what in chosen}, sources, given.runs, Path(name))


def compare(
    commands: dict[str, list[str]], sources: dict[str, Path], runs: int, folder: Path
) -> None:
    """The table; one round that is not counted comes first."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for number in range(runs + 1):
        for what, command in commands.items():
            for source, path in sources.items():
                output = [str(folder / f"{source}-{number}")] if what == "train" else []
                if what == "libraries" and source != "now":
                    continue
                seconds = timed([*command, *output], path)
                if number:
                    found.setdefault((what, source), []).append(seconds)
    print("| what | source | wall seconds | CPU-seconds |\n|---|---|---:|---:|")
    for (what, source), all_runs in found.items():
        wall, cpu = (statistics.median(column) for column in zip(*all_runs, strict=True))
        print(f"| {what} | {source} | {wall:.2f} | {cpu:.2f} |")


def profile(what: str, command: list[str], folder: Path) -> None:
    """What importing each package takes, less what it imports in turn (`-X importtime`)."""
    output = [str(folder / "run")] if what == "train" else []
    done = subprocess.run(
        [command[0], "-X", "importtime", *command[1:], *output],
        env=_environment(HERE),
        capture_output=True,
        text=True,
    )
    packages: dict[str, float] = defaultdict(float)
    for line in done.stderr.splitlines():
        parts = line.removeprefix("import time:").split("|")
        if len(parts) == 3 and parts[0].strip().isdigit():
            packages[parts[2].strip().split(".")[0]] += int(parts[0]) / 1e6
    total = sum(packages.values())
    print(f"seconds of imports by package, {total:.2f} together:")
    for package, seconds in sorted(packages.items(), key=lambda one: -one[1])[:20]:
        print(f"{seconds:8.2f} {package}")


if __name__ == "__main__":
    main()
