"""Memory and time of a divergence and its gradient at a large vocabulary: docs/distillation.md.

    python benchmarks/distill_memory.py [--tokens 2048] [--width 896] [--only NAME…]
        [--repeats 1] [--accumulate]

`streamed` is `kleash.scoring.divergences`, `all logits` what a trainer does that has them: log-
softmaxes of student and teacher, the divergence from those, autograd. Each way runs in a process of
its own, one thread. Memory is how far the process's peak rises above the weights of both heads and
the gradients (the kernel's count, which knows every buffer); time is CPU time of the fastest call,
page faults included. As in the first microbatch of an optimiser step, there is no gradient before a
call: the size of the one that it makes is taken off both ways' peaks. With `--accumulate` there is
one, as in the microbatches that follow, and what is made to be added to it counts.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from kleash.scoring.divergences import Divergence, Frozen, token_divergences
from kleash.types import Head

WORDS = 151_936
NAMES: tuple[Divergence, ...] = ("reverse_kl", "forward_kl", "jensen_shannon")


def streamed(name: Divergence, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    targets = torch.zeros(len(student[0]), dtype=torch.long)
    frozen = [Frozen(teacher[0], Head(teacher[1]), name)]
    found = token_divergences(student[0], Head(student[1]), targets, frozen, gradient="forward")
    return found.divergences[0].mean()


def materialised(name: Divergence, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    log_p = (student[0] @ student[1].T).log_softmax(-1)
    with torch.no_grad():
        log_q = (teacher[0] @ teacher[1].T).log_softmax(-1)
    kl = torch.nn.functional.kl_div
    match name:
        case "reverse_kl":
            total = kl(log_q, log_p, reduction="sum", log_target=True)
        case "forward_kl":
            total = kl(log_p, log_q, reduction="sum", log_target=True)
        case "jensen_shannon":
            half = torch.tensor(0.5)
            log_m = torch.logsumexp(torch.stack([log_p, log_q]) + half.log(), dim=0)
            total = half * kl(log_m, log_q, reduction="sum", log_target=True)
            total = total + half * kl(log_m, log_p, reduction="sum", log_target=True)
    return total / len(student[0])


def streamed_backward(name: Divergence, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    targets = torch.zeros(len(student[0]), dtype=torch.long)
    frozen = [Frozen(teacher[0], Head(teacher[1]), name)]
    found = token_divergences(student[0], Head(student[1]), targets, frozen)
    return found.divergences[0].mean()


WAYS: dict[str, Callable[[Divergence, list[Tensor], list[Tensor]], Tensor]] = {
    "streamed": streamed,
    "streamed, gradient backward": streamed_backward,
    "all logits": materialised,
}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(way: str, name: Divergence, args: argparse.Namespace) -> None:
    tokens, width = args.tokens, args.width
    torch.set_num_threads(1)
    make = torch.Generator().manual_seed(0)
    sizes = ((tokens, width), (WORDS, width)) * 2
    hidden, weight, *teacher = (torch.randn(*size, generator=make) for size in sizes)
    student = [hidden.requires_grad_(), weight.mul_(3 / width**0.5).requires_grad_()]
    teacher[1].mul_(3 / width**0.5)
    gradients = sum(each.nbytes for each in student) / 2**20
    if args.accumulate:
        gradients = 0.0
        for each in student:
            each.grad = torch.zeros_like(each)
    before, seconds, value = peak_mib(), [], 0.0
    for _ in range(args.repeats):
        if not args.accumulate:
            for each in student:
                each.grad = None
        began = time.process_time()
        loss = WAYS[way](name, student, teacher)
        loss.backward()
        seconds.append(time.process_time() - began)
        value = float(loss.detach())
        del loss
    mib = peak_mib() - before - gradients
    print(json.dumps({"mib": mib, "seconds": min(seconds), "value": value}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--backward", action="store_true", help="make the gradient backward")
    parser.add_argument("--accumulate", action="store_true")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        way, name = args.one
        measure(way, name, args)
        return
    for name in args.only:
        found: dict[str, dict[str, float]] = {}
        ways = [way for way in WAYS if args.backward or way != "streamed, gradient backward"]
        for way in ways:
            sizes = [f"--{key}={vars(args)[key]}" for key in ("tokens", "width", "repeats")]
            command = [sys.executable, __file__, *sizes, "--one", way, name]
            command += ["--accumulate"] * args.accumulate
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[way] = json.loads(done.stdout.splitlines()[-1])
        theirs = found["all logits"]
        for way in ways[:-1]:
            ours = found[way]
            assert abs(ours["value"] / theirs["value"] - 1) < 1e-4, found
            print(
                f"{name:15s} {way:28s} memory {ours['mib']:7.0f} of {theirs['mib']:7.0f} MiB "
                f"({ours['mib'] / theirs['mib']:.3f})   time {ours['seconds']:6.2f} of "
                f"{theirs['seconds']:6.2f} s ({ours['seconds'] / theirs['seconds']:.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
