"""Kill an audit without warning at random moments, resume it, and compare the results.

    python benchmarks/audit_kill.py [--kills 20]

Each time: `kleash audit … --output DIR` is killed (SIGKILL) at a moment drawn from the second half of
an uninterrupted run, the first being start-up, then run again with `--resume`. The final audit.json
must be the uninterrupted one, byte for byte.
"""

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from audit_speed import make_pair
from transformers.utils import logging

WORDS = 500


def command(folder: Path, into: Path, *more: str) -> list[str]:
    """The audit under test: both models write, many small batches."""
    return [
        sys.executable, "-m", "kleash", "audit", str(folder / "policy"), str(folder / "reference"),
        "--prompts", str(folder / "prompts.jsonl"), "--both", "--max-new-tokens", "32",
        "--batch-tokens", "800", "--keep", "5", "--output", str(into), *more,
    ]  # fmt: skip


def digest(into: Path) -> str:
    """Fingerprint of the result."""
    return hashlib.sha256((into / "audit.json").read_bytes()).hexdigest()


def main() -> None:
    """Print one line for each kill, and how many results were the same."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    kills = parser.parse_args().kills
    rng = random.Random(0)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_pair(folder, words=WORDS, width=64, layers=2)
        rows = [{"prompt": f"w{rng.randrange(2, WORDS)} w{n % 400 + 2}"} for n in range(160)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "prompts.jsonl").write_text(text)
        began = time.perf_counter()
        subprocess.run(command(folder, folder / "whole"), check=True, capture_output=True)
        length = time.perf_counter() - began
        expected = digest(folder / "whole")
        batches = len((folder / "whole" / "responses.jsonl").read_bytes().splitlines()) - 1
        print(f"uninterrupted: {length:.1f} s, {batches} batches, {expected[:12]}")
        same = 0
        for number in range(1, kills + 1):
            into = folder / "killed"
            moment = rng.uniform(0.5, 1.0) * length
            victim = subprocess.Popen(
                command(folder, into), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            time.sleep(moment)
            victim.send_signal(signal.SIGKILL)
            victim.wait()
            file = into / "responses.jsonl"
            there = file.read_bytes().count(b"\n") - 1 if file.exists() else -1
            subprocess.run(command(folder, into, "--resume"), check=True, capture_output=True)
            found = digest(into)
            same += found == expected
            print(
                f"{number}: killed after {moment:.1f} s with {max(there, 0)} batches "
                f"on disk, resumed to {found[:12]}",
                flush=True,
            )
            shutil.rmtree(into)
        print(f"{same} of {kills} the same")


if __name__ == "__main__":
    main()
