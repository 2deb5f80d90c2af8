"""Every causal language model of transformers, tiny and random, through a run's whole life.

    python benchmarks/architectures.py                     every architecture there is
    python benchmarks/architectures.py gpt2 llama mamba    these
    python benchmarks/architectures.py twelve              those of the test, for docs/models.md
    python benchmarks/architectures.py --summary           of what is kept: the tables of the docs

For each architecture and each way in which a policy begins (all weights, LoRA, LoRA on a trained
adapter, LoRA with the head trained whole): train two steps, open both checkpoints with plain
transformers and peft, audit the last against itself and the start, and resume from the first. A
cell is the largest of the differences that must be 0, in nats, or the sentence with which kleash
refuses. Results are kept in --into as they come: run again to go on.
"""

import argparse
import itertools
import json
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import defaultdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

import run_life  # pyright: ignore[reportMissingImports]
import small_run  # pyright: ignore[reportMissingImports]
import tiny_architectures as tiny  # pyright: ignore[reportMissingImports]
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kleash.errors import KleashError

CPU_SECONDS, SECONDS = 30, 900
DRAFTS = ("gemma4_assistant", "gemma4_unified_assistant")
"""They write drafts for another model, whose keys and values they read."""


def cell(kind: str, way: str, folder: Path, material: Path) -> str:
    """The largest difference of a run's life, a refusal, or what went wrong."""
    if kind in DRAFTS:
        return "not made: a model that drafts for another one and reads its keys and values"
    try:
        base = tiny.save(folder / "base", kind)
        policy = tiny.way(way, folder, base)
    except Exception as error:
        return f"not made: {type(error).__name__}: {_one_line(error)}"
    try:
        found = run_life.live(policy, folder, material)
    except KleashError as error:
        return f"refused: {str(error).replace(str(folder), '…')}"
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        return f"TRACEBACK: {type(error).__name__}: {_one_line(error)} ({where})"
    if found.worst <= 1e-5:
        return f"{found.worst:.1e}"
    return f"WRONG: {found}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def kept(kind: str, way: str, into: Path) -> Path:
    """Where a cell is kept."""
    return into / f"{kind}-{way}.json".replace(" ", "_")


def make(kind: str, way: str, into: Path, material: Path) -> None:
    """Make a cell in a process of its own, for some end theirs; keep what came of it."""
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
            said = cell(kind, way, Path(folder), material)
        kept(kind, way, into).write_text(json.dumps(said))
        os._exit(0)
    deadline = time.monotonic() + SECONDS
    while not (done := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    if not kept(kind, way, into).is_file():
        said = f"CRASHED: status {done[1]} (at most {CPU_SECONDS} s of a CPU, {SECONDS} s in all)"
        kept(kind, way, into).write_text(json.dumps(said))


def print_table(kinds: list[str], into: Path) -> None:
    """A row for each architecture, a column for each way."""
    print("| architecture | " + " | ".join(tiny.WAYS) + " |")
    print("|---|" + "---|" * len(tiny.WAYS))
    for kind in kinds:
        cells = [json.loads(kept(kind, way, into).read_text()) for way in tiny.WAYS]
        print(f"| {tiny.TWELVE.get(kind, kind)} | " + " | ".join(cells) + " |")


def print_summary(into: Path) -> None:
    """For each way: what equals, and a line for each reason why an architecture does not."""
    for way in tiny.WAYS:
        groups: dict[str, list[str]] = defaultdict(list)
        worst = 0.0
        for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
            file = kept(kind, way, into)
            said = json.loads(file.read_text()) if file.is_file() else "not reached"
            if said[0].isdigit():
                worst, said = max(worst, float(said)), "equal"
            # Names, paths and numbers are each architecture's own.
            groups[re.sub(r"'….*?'|for \w+|[\d.]+|expected \w+ in", "·", said)[:90]].append(kind)
        print(f"\n{way}: the largest difference of those that are equal is {worst:.1e}")
        for said, kinds in sorted(groups.items(), key=lambda item: -len(item[1])):
            print(f"| {len(kinds)} | {', '.join(kinds)} | {said} |")


def main() -> None:
    """Make what is not there yet, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("kinds", nargs="*")
    parser.add_argument("--into", type=Path, default=Path("architectures"))
    parser.add_argument("--summary", action="store_true", help="of what is kept; make nothing")
    given = parser.parse_args()
    if given.summary:
        print_summary(given.into)
        return
    every = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    kinds = list(tiny.TWELVE) if given.kinds == ["twelve"] else given.kinds or every
    given.into.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        material = small_run.save_material(Path(folder), prompts=["w1 w2", "w4"], heldout=["w5"])
        for way, kind in itertools.product(tiny.WAYS, kinds):
            if not kept(kind, way, given.into).is_file():
                make(kind, way, given.into, material)
    print_table(kinds, given.into)


if __name__ == "__main__":
    main()
