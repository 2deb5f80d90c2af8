"""What does the exact KL cost beside the one-token estimate, in time and memory?

    python benchmarks/exact_kl.py forward
    python benchmarks/exact_kl.py memory
    python benchmarks/exact_kl.py backward
    python benchmarks/exact_kl.py growth
    python benchmarks/exact_kl.py figure --output docs/exact-kl.svg
    python benchmarks/exact_kl.py others          (needs a CUDA device and the peers' packages)

float32 on the CPU, 1,024 tokens, width 896, vocabulary 151,936 unless told otherwise; `--quick`
takes an eighth of the vocabulary. Times are medians of rounds in which the ways take turns, after
one warm-up each, which compiles; ratios are medians of the ratios within a round, so that a machine
that slows down slows down both. Extra memory is the peak of a process of its own above what it held
once its inputs and a warm-up on a few tokens were there (Linux: VmHWM, reset before the run).
"""

import argparse
import ctypes
import gc
import importlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _scoring import (
    Case,
    backward_of,
    bare_products,
    k1_materialised,
    kl_materialised,
    kl_streamed,
    make_case,
    streamed,
)
from _svg import WIDTH, Series, chart, page

from kleash.scoring.tiles import Tiles, compiler_works

Way = Callable[[Case], object]
PLAIN, COMPILED = Tiles(body="plain"), Tiles(body="compiled")
ENOUGH = 1 << 40


def two_products(case: Case) -> None:
    bare_products(case)


def six_products(case: Case) -> None:
    bare_products(case, products=6)


FORWARD: dict[str, Way] = {
    "two bare products": two_products,
    "k1 materialised": k1_materialised,
    "exact KL materialised": kl_materialised,
    "everything streamed, plain": streamed(PLAIN),
    "everything streamed, compiled": streamed(COMPILED),
    "k1 streamed, plain": streamed(PLAIN, ("logprobs", "ref_logprobs")),
    "KL streamed, plain": streamed(PLAIN, ("kl",)),
    "KL and k1 streamed, plain": streamed(PLAIN, ("kl", "logprobs", "ref_logprobs")),
    "k1 streamed, compiled": streamed(COMPILED, ("logprobs", "ref_logprobs")),
}
BACKWARD: dict[str, Way] = {
    "six bare products": six_products,
    "KL materialised": backward_of(kl_materialised),
    "KL streamed, plain": backward_of(kl_streamed(PLAIN)),
    "KL streamed, compiled": backward_of(kl_streamed(COMPILED)),
    "KL streamed, tiles kept": backward_of(kl_streamed(Tiles(keep_bytes=ENOUGH, body="compiled"))),
}


def machine() -> str:
    """CPU, cores, threads and torch, in words."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    threads = torch.get_num_threads()
    return (
        f"{os.cpu_count()} cores of an {name}, {threads} threads, {gpu}; torch {torch.__version__}"
    )


def time_in_turns(
    ways: dict[str, Way], case: Case, rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each way, one list entry per round."""
    for way in ways.values():
        way(case)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            gc.collect()
            start = clock()
            way(case)
            seconds[name].append(clock() - start)
    return seconds


def print_times(seconds: dict[str, list[float]], against: list[str]) -> None:
    print("| way | median s | " + " | ".join(f"× {name}" for name in against) + " |")
    print("|---|---|" + "---|" * len(against))
    for name, own in seconds.items():
        ratios = [
            statistics.median(a / b for a, b in zip(own, seconds[other], strict=True))
            for other in against
        ]
        cells = " | ".join(f"{ratio:.3f}" for ratio in ratios)
        print(f"| {name} | {statistics.median(own):.2f} | {cells} |")


def extra_memory(way: str, table: str, tokens: int, width: int, words: int) -> float:
    """MiB above the inputs at the peak of a process of its own."""
    command = [sys.executable, __file__, "peak", "--way", way, "--table", table]
    command += ["--tokens", str(tokens), "--width", str(width), "--words", str(words)]
    command += ["--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def peak(arguments: argparse.Namespace) -> None:
    """The process that `extra_memory` starts: inputs, warm-up, peak of one run."""
    way = (FORWARD if arguments.table == "forward" else BACKWARD)[arguments.way]
    with torch.set_grad_enabled(arguments.table == "backward"):
        case = make_case(arguments.tokens, arguments.width, arguments.words)
        # Whole tiles, so that what is compiled here is what will run.
        few = make_case(min(arguments.tokens, 1024), arguments.width, 2048)
        way(few)
        del few
        gc.collect()
        # What the warm-up freed must not pass for memory that the run did not need.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        way(case)
    print(json.dumps((_status("VmHWM") - before) / 1024))


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def forward(arguments: argparse.Namespace) -> None:
    case = make_case(arguments.tokens, arguments.width, arguments.words)
    ways = _chosen(FORWARD, arguments.only)
    with torch.no_grad():
        seconds = time_in_turns(ways, case, arguments.rounds, arguments.clock)
    print_times(
        seconds, [name for name in ("two bare products", "k1 materialised") if name in ways]
    )


def backward(arguments: argparse.Namespace) -> None:
    case = make_case(arguments.tokens, arguments.width, arguments.words)
    ways = _chosen(BACKWARD, arguments.only)
    seconds = time_in_turns(ways, case, arguments.rounds, arguments.clock)
    print_times(
        seconds, [name for name in ("six bare products", "KL materialised") if name in ways]
    )
    if arguments.only:
        return
    gradients = (case.hidden.nbytes + case.weight.nbytes) / 2**20
    print(f"\nExtra peak less the gradients themselves ({gradients:.0f} MiB):\n")
    print("| way | MiB |\n|---|---|")
    for name in _possible(BACKWARD):
        extra = extra_memory(name, "backward", arguments.tokens, arguments.width, arguments.words)
        print(f"| {name} | {extra - gradients:.0f} |")


def memory(arguments: argparse.Namespace) -> None:
    print("| way | tokens | extra peak MiB |\n|---|---|---|")
    ways = [name for name in _possible(FORWARD) if "streamed" in name or "materialised" in name]
    for name in ways:
        for tokens in (512, 1024, 8192) if "everything" in name else (arguments.tokens,):
            extra = extra_memory(name, "forward", tokens, arguments.width, arguments.words)
            print(f"| {name} | {tokens:,} | {extra:.0f} |", flush=True)


def growth(arguments: argparse.Namespace) -> None:
    """Time over 16 × as many words, and over 16 × as many tokens; slopes on log-log paper."""
    way: dict[str, Way] = {"everything streamed": streamed(PLAIN)}
    with torch.no_grad():
        for axis, sizes in (
            ("words", [arguments.words // part for part in (16, 8, 4, 2, 1)]),
            ("tokens", [arguments.tokens // 2 * factor for factor in (1, 2, 4, 8, 16)]),
        ):
            medians: list[float] = []
            for size in sizes:
                tokens = size if axis == "tokens" else arguments.tokens
                words = size if axis == "words" else arguments.words // 16
                case = make_case(tokens, arguments.width, words)
                seconds = time_in_turns(way, case, arguments.rounds, arguments.clock)
                medians.append(statistics.median(seconds["everything streamed"]))
            pairs = zip(sizes, medians, strict=True)
            print(f"{axis}: " + ", ".join(f"{size:,} {took:.2f} s" for size, took in pairs))
            print(f"    exponent {_slope(sizes, medians):.3f}", flush=True)


def _slope(sizes: list[int], seconds: list[float]) -> float:
    fit = statistics.linear_regression(
        [math.log(size) for size in sizes], [math.log(second) for second in seconds]
    )
    return fit.slope


def figure(arguments: argparse.Namespace) -> None:
    """Time and extra memory against vocabulary size."""
    names = {
        "k1 materialised": "#c0392b",
        "exact KL materialised": "#8e44ad",
        "everything streamed, " + ("compiled" if compiler_works() else "plain"): "#16803c",
        "two bare products": "#888888",
    }
    sizes = [arguments.words // part for part in (16, 8, 4, 2, 1)]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    peaks: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for words in sizes:
        case = make_case(arguments.tokens, arguments.width, words)
        with torch.no_grad():
            ways = {name: FORWARD[name] for name in names}
            seconds = time_in_turns(ways, case, arguments.rounds, arguments.clock)
        del case
        for name in names:
            times[name].append((words, statistics.median(seconds[name])))
            shape = (arguments.tokens, arguments.width, words)
            if name != "two bare products":
                peaks[name].append((words, extra_memory(name, "forward", *shape)))
    charts = [
        chart(title, "vocabulary", unit, _series(values, names), offset)
        for title, unit, values, offset in (
            (f"Time, {arguments.tokens:,} tokens", "s", times, 0.0),
            ("Memory above the inputs", "MiB", peaks, float(WIDTH)),
        )
    ]
    Path(arguments.output).write_text(page(charts), encoding="utf-8")
    print(json.dumps({"seconds": times, "MiB": peaks}, indent=1))


def _series(values: dict[str, list[tuple[float, float]]], names: dict[str, str]) -> list[Series]:
    return [
        Series(name, colour, tuple(values[name])) for name, colour in names.items() if values[name]
    ]


def others(arguments: argparse.Namespace) -> None:
    """kleash beside liger-kernel and flash-linear-attention on a GPU, bfloat16."""
    if not torch.cuda.is_available():
        print("No CUDA device: the peers' kernels do not run here, and nothing is measured.")
        return
    tokens, width, words = (8192, 4096, 128_256) if not arguments.quick else (1024, 1024, 32_000)
    cpu = make_case(tokens, width, words)
    case = Case(
        **{
            name: tensor.cuda() if name == "targets" else tensor.bfloat16().cuda()
            for name, tensor in vars(cpu).items()
        }
    )
    ways = {
        "two cuBLAS products": _two_whole_products,
        "kleash": backward_of(kl_streamed(Tiles())),
        "liger-kernel fused_linear_jsd β=1": _liger,
        "flash-linear-attention fused_kl_div": _fla,
        "kleash, reverse_kl": backward_of(_reverse_kl),
        "kleash, everything, forward": streamed(Tiles()),
    }
    print("| way | median s | extra peak MiB | loss |\n|---|---|---|---|")
    for name, way in ways.items():
        try:
            print(f"| {name} | {' | '.join(_on_gpu(way, case, arguments.rounds))} |")
        except ImportError as error:
            print(f"| {name} | not installed ({error.name}) | | |")


def _two_whole_products(case: Case) -> None:
    torch.mm(case.hidden, case.weight.T)
    torch.mm(case.ref_hidden, case.ref_weight.T)


def _on_gpu(way: Way, case: Case, rounds: int) -> list[str]:
    way(case)
    seconds: list[float] = []
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result: object = None
    for _ in range(rounds):
        start = time.perf_counter()
        result = way(case)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    extra = (torch.cuda.max_memory_allocated() - before) / 2**20
    loss = result.item() if isinstance(result, torch.Tensor) and result.ndim == 0 else math.nan
    return [f"{statistics.median(seconds):.4f}", f"{extra:.0f}", f"{loss:.6f}"]


def _reverse_kl(case: Case) -> torch.Tensor:
    scores = streamed(Tiles(), ("reverse_kl",))(case)
    return scores.reverse_kl  # pyright: ignore[reportAttributeAccessIssue]


def _liger(case: Case) -> object:
    """KL(policy‖reference), its mean, and the gradients that it computes on the way forward."""
    module = importlib.import_module("liger_kernel.ops.fused_linear_jsd")
    case = case.differentiable()
    inputs = (case.hidden, case.weight, case.ref_hidden, case.ref_weight)
    loss = module.LigerFusedLinearJSDFunction.apply(*inputs, None, 1.0, -100, 1.0)
    loss.backward()
    return loss.detach()


def _fla(case: Case) -> object:
    """KL(reference‖policy), its mean, and the gradients that it computes on the way forward."""
    module = importlib.import_module("fla.modules.fused_kl_div")
    case = case.differentiable()
    loss = module.fused_kl_div_loss(case.hidden, case.ref_hidden, case.weight, case.ref_weight)
    loss.backward()
    return loss.detach()


def _possible(ways: dict[str, Way]) -> dict[str, Way]:
    """Without a compiler, the ways that need none."""
    if compiler_works():
        return ways
    return {
        name: way for name, way in ways.items() if "compiled" not in name and "kept" not in name
    }


def _chosen(ways: dict[str, Way], only: list[str] | None) -> dict[str, Way]:
    return {name: way for name, way in _possible(ways).items() if not only or name in only}


COMMANDS = {
    "forward": forward,
    "memory": memory,
    "backward": backward,
    "growth": growth,
    "figure": figure,
    "others": others,
    "peak": peak,
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--words", type=int, default=151_936)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: seconds of all threads"
    )
    parser.add_argument("--quick", action="store_true", help="an eighth of the vocabulary")
    parser.add_argument("--output", default="exact-kl.svg", help="where `figure` writes")
    parser.add_argument("--way", help="of `peak`")
    parser.add_argument("--only", nargs="+", help="ways of `forward` and `backward`")
    parser.add_argument("--table", choices=("forward", "backward"), help="of `peak`")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.quick:
        arguments.words //= 8
    if arguments.command != "peak":
        clock = arguments.clock
        print(
            f"{machine()}\n{arguments.tokens:,} tokens, width {arguments.width}, vocabulary "
            f"{arguments.words:,}, float32, {arguments.rounds} rounds, {clock} clock\n"
        )
    arguments.clock = CLOCKS[arguments.clock]
    COMMANDS[arguments.command](arguments)


if __name__ == "__main__":
    main()
