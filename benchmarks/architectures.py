"""Every causal language model of transformers, tiny and random, through a run's whole life.

    python benchmarks/architectures.py                     every architecture there is
    python benchmarks/architectures.py gpt2 llama mamba    these
    python benchmarks/architectures.py twelve              those of the test, for docs/models.md

For each architecture and each way in which a policy begins (all weights, LoRA, LoRA on a trained
adapter, LoRA with the head trained whole): train two steps, open the checkpoint with plain
transformers and peft, audit it against itself, resume. A cell is the largest difference of
log-probabilities between the policy that was held and the checkpoint as others open it, or the
sentence with which kleash refuses. Results are kept in --into as they come: run again to go on.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

import small_run  # pyright: ignore[reportMissingImports]
import tiny_architectures as tiny  # pyright: ignore[reportMissingImports]

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [20, 3, 4, 1, 12, 13]])
LAYER: dict[str, Any] = {
    "rollout": {"prompts_per_step": 2, "responses_per_prompt": 2, "max_new_tokens": 4},
    "algorithm": {"name": "rloo", "epochs": 1, "minibatches": 1},
    "logging": {"checkpoint_every": 1, "samples_per_step": 0},
    "optimizer": {"lr": 1e-1},
    "reward_models": {"sum": {"callable": "tiny_architectures:sum_of_words"}},
    "steps": 2,
}
SECONDS = 300


def one(kind: str, way: str, folder: Path) -> str:
    """A cell: a difference, or a refusal."""
    import kleash
    from kleash.errors import KleashError
    from kleash.models.policy import Policy
    from kleash.training.assembly import assemble
    from kleash.training.loop import train

    folder.mkdir(parents=True)
    material = small_run.save_material(folder, prompts=["w1 w2", "w4"], heldout=["w5"])
    try:
        base = tiny.save(folder / "base", kind)
        policy = tiny.way(way, folder, base)
    except Exception as error:
        return f"not made: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
    held: list[torch.Tensor] = []
    save = Policy.save

    def record(self: Policy, path: str | Path) -> None:
        held.append(tiny.reading(self.model, IDS))
        save(self, path)

    Policy.save = record
    prompts = {"train": str(material / "prompts.jsonl"), "heldout": None}
    config = small_run.settings(material, folder / "run", LAYER, policy=policy, prompts=prompts)
    try:
        run = train(config)
        saved = sorted((run / "checkpoints").iterdir())[-1] / "policy"
        opened = tiny.reading(tiny.open_plainly(saved), IDS)
        worst = (opened - held[-1]).abs().max().item()
        again = assemble(config).policy
        again.restore(saved)
        resumed = (tiny.reading(again.model, IDS) - held[-1]).abs().max().item()
        own = kleash.audit(saved, again, prompts["train"], max_new_tokens=2).kl.per_token.mean
    except KleashError as error:
        return f"refused: {str(error).replace(str(folder), '…')}"
    finally:
        Policy.save = save
    found = max(worst, resumed, abs(own))
    return f"{found:.1e}" if found <= 1e-5 else f"WRONG: {worst:.1e} {resumed:.1e} {own:.1e}"


def every() -> list[str]:
    """The model types that have a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def kept(kind: str, way: str, into: Path) -> Path:
    """Where a cell is kept."""
    return into / f"{kind}-{way}.json".replace(" ", "_")


def row(kind: str, into: Path) -> list[str]:
    """The cells of an architecture, by a process of its own: some end theirs."""
    files = [kept(kind, way, into) for way in tiny.WAYS]
    said = ""
    if not all(file.is_file() for file in files):
        code = [sys.executable, __file__, "--row", kind, "--into", str(into)]
        try:
            done = subprocess.run(code, capture_output=True, text=True, timeout=SECONDS)
            said = "CRASHED: " + (done.stderr.strip().splitlines() or ["no output"])[-1][:200]
        except subprocess.TimeoutExpired:
            said = f"not done in {SECONDS} s"
    for file in files:
        if not file.is_file():
            file.write_text(json.dumps(said))
    return [json.loads(file.read_text()) for file in files]


def make_row(kind: str, into: Path) -> None:
    """Every cell of an architecture that is not there yet."""
    torch.set_num_threads(1)
    for way in tiny.WAYS:
        file = kept(kind, way, into)
        if not file.is_file():
            with tempfile.TemporaryDirectory() as folder:
                file.write_text(json.dumps(one(kind, way, Path(folder) / "cell")))


def main() -> None:
    """Print the table, a row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("kinds", nargs="*")
    parser.add_argument("--into", type=Path, default=Path("architectures"))
    parser.add_argument("--row", metavar="KIND", help="make one row; print nothing")
    given = parser.parse_args()
    given.into.mkdir(parents=True, exist_ok=True)
    if given.row:
        make_row(given.row, given.into)
        return
    kinds = list(tiny.TWELVE) if given.kinds == ["twelve"] else given.kinds or every()
    print("| architecture | " + " | ".join(tiny.WAYS) + " |")
    print("|---|" + "---|" * len(tiny.WAYS))
    for kind in kinds:
        cells = row(kind, given.into)
        print(f"| {tiny.TWELVE.get(kind, kind)} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
