"""Models with a state beside attention: does an audit depend on the size of its batches?

    python benchmarks/padding.py                 those below
    python benchmarks/padding.py mamba rwkv      these

For each: two tiny random models, 30 texts of 3 to 19 tokens, KL per token with one text at a time
and with batches of 100 and 8,192 tokens, in float32; and prompts that one of the models answers.
Printed is the largest difference from the KL of one text at a time, or the cause for which the
audit refuses; and whether `train` takes the model.
"""

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

import audit_models  # pyright: ignore[reportMissingImports]
import tiny_architectures as tiny  # pyright: ignore[reportMissingImports]

import kleash
from kleash.errors import KleashError
from kleash.models.policy import load_policy

KINDS = (
    *("rwkv", "xlstm", "mamba", "falcon_mamba", "mamba2", "jamba", "bamba", "falcon_h1"),
    *("granitemoehybrid", "nemotron_h", "zamba", "zamba2", "recurrent_gemma", "minimax"),
    *("qwen3_next", "qwen3_5_text", "olmo_hybrid", "bailing_hybrid", "lfm2", "lfm2_moe", "lfm3"),
    *("qwen4_exp_text", "kimi_linear"),
)


def row(kind: str, folder: Path) -> str:
    """What came of an architecture."""
    try:
        base = tiny.save(folder / "base", kind)
        tuned = audit_models.change(base, folder / "tuned", audit_models.noise)
    except Exception as error:
        return f"not made: {type(error).__name__}: {' '.join(str(error).split())[:150]} | |"
    try:
        load_policy(base)
        train = "takes it"
    except KleashError as error:
        train = _cause(error, folder)
    texts = audit_models.write_texts(folder / "texts.jsonl")
    prompts = audit_models.write_prompts(folder / "prompts.jsonl")
    found: list[float] = []
    try:
        for size in (1, 100, 8192):
            found.append(
                kleash.audit(tuned, base, texts=texts, batch_tokens=size, keep=1).kl.per_token.mean
            )
        kleash.audit(tuned, base, prompts, max_new_tokens=4, keep=1)
    except KleashError as error:
        return f"{_cause(error, folder)} | {found[0] if found else float('nan'):.4f} | {train} |"
    apart = max(abs(one - found[0]) for one in found)
    return f"{apart:.1e} | {found[0]:.4f} | {train} |"


def _cause(error: KleashError, folder: Path) -> str:
    said = str(error).replace(str(folder), "…")
    number = said.partition("got ")[2].split(" nats")[0].split()
    if "padding" in said:
        return f"refused: padding, {number[-1] if number else '?'} nats"
    return f"refused: {said[:160]}"


def main() -> None:
    """Print the table, a row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("kinds", nargs="*", default=KINDS)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("| architecture | KL by batch size, largest difference | KL per token | train |")
    print("|---|---|---|---|")
    for kind in parser.parse_args().kinds:
        with tempfile.TemporaryDirectory() as folder:
            print(f"| {kind} | {row(kind, Path(folder))}", flush=True)


if __name__ == "__main__":
    main()
