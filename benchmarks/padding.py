"""What padding does to models with a recurrent state, tiny and random, or attend linearly.

    python benchmarks/padding.py                the kinds of docs/models.md
    python benchmarks/padding.py mamba rwkv     these

For each kind: the largest distance, in nats, between a text's log-probabilities alone and padded
beside a longer one, when reading (as training and audits read) and when writing (with a cache); the
measure that `check_padding` refuses by.
"""

import sys
import tempfile
import warnings
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

import tiny_architectures as tiny  # pyright: ignore[reportMissingImports]

from kleash.models import probing

KINDS = ("mamba", "mamba2", "falcon_mamba", "rwkv", "recurrent_gemma", "jamba", "xlstm", "lfm2")


def main() -> None:
    """Print a row for each kind."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    print("| kind | reading, nats | writing, nats |")
    print("|---|---|---|")
    for kind in sys.argv[1:] or KINDS:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                path = tiny.save(Path(folder), kind)
                model = AutoModelForCausalLM.from_pretrained(path).eval()
                found = [
                    f"{measure(model, 20):.2g}"
                    for measure in (probing._padding_in_reading, probing._padding_in_writing)  # pyright: ignore[reportPrivateUsage]
                ]
            # The code of any architecture: it raises whatever it likes.
            except Exception as error:
                found = [f"{type(error).__name__}: {str(error).splitlines()[0][:60]}", "–"]
        print(f"| {kind} | {found[0]} | {found[1]} |", flush=True)


if __name__ == "__main__":
    main()
