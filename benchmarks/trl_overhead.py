"""CPU time that KLAudit adds to TRL's GRPO, as a share of the steps it watches.

    python benchmarks/trl_overhead.py [--every 10 1]

The stories model as in `benchmarks/trl_budget.py`; needs the optional real inputs. What the audit
takes is timed inside the very run, so that another load on the machine falls on both alike.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from trl_budget import REAL, trainer_of


def share(args: argparse.Namespace, every: int) -> str:
    """Seconds of CPU of the audit and of all the rest, of whole steps after the first."""
    from kleash.integrations.trl import KLAudit

    output = args.output / f"every-{every}"
    trainer = trainer_of(output, args, 0, max_steps=args.steps)
    # The budget of `trainer_of` measures every step; here the audit is to be alone.
    watcher = trainer._kleash_watcher
    for callback in list(watcher.subscribers):
        trainer.remove_callback(callback)
    watcher.subscribers.clear()
    KLAudit(every=every, output=output / "alone").attach(trainer)
    spent: list[float] = []
    measure = watcher._measure

    def timed(batch: Any) -> None:
        start = time.process_time()
        measure(batch)
        spent.append(time.process_time() - start)

    watcher._measure = timed
    start = time.process_time()
    trainer.train()
    total = time.process_time() - start
    audit = sum(spent)
    return (
        f"every={every}: {audit:.2f} s of {total - audit:.2f} s of {args.steps} steps, "
        f"{audit / (total - audit):.2%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--real", type=Path, default=REAL)
    parser.add_argument("--output", type=Path, default=Path("runs/trl-overhead"))
    parser.add_argument("--every", type=int, nargs="+", default=[10, 1])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--responses", type=int, default=128)
    args = parser.parse_args()
    for name, value in (("group", 8), ("lr", 1e-4), ("beta", 0.1), ("target", 2.0)):
        setattr(args, name, value)
    args.exact = False
    for every in args.every:
        print(share(args, every), flush=True)


if __name__ == "__main__":
    main()
