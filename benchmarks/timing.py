"""What the benchmarks share: calls timed in turn, the ratios of paired rounds, the environment, and the result file.

A machine that does other work beside a benchmark slows down for seconds at a time. So the calls that are compared run
in turn in every round, each round gives one ratio, and the median of the ratios is what counts.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch

from favae.files import write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs/results"


@dataclass
class Timing:
    """What one call took.

    Attributes:
        seconds: wall-clock time, one entry per round.
        cpu_seconds: of this process, all threads together; other programs on the machine change it less.
        peak_bytes: the most that CUDA's allocator held during a call, everything else on the GPU included; 0 on a CPU.
        result: what the last call returned.
    """

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    result: object = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def time_paired(calls: dict[str, Callable[[], object]], *, rounds: int, warmup: int = 1) -> dict[str, Timing]:
    """Runs all calls in turn, `warmup + rounds` times, and keeps the times of the last `rounds`.

    Args:
        calls: what is compared, by name.
        rounds: how many rounds are kept.
        warmup: how many rounds come before and are not kept.
    """
    timings = {name: Timing() for name in calls}
    for number in range(warmup + rounds):
        for name, call in calls.items():
            synchronize()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            started, cpu_started = time.perf_counter(), time.process_time()
            timings[name].result = call()
            synchronize()
            seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
            if torch.cuda.is_available():
                timings[name].peak_bytes = torch.cuda.max_memory_allocated()
            if number >= warmup:
                timings[name].seconds.append(seconds)
                timings[name].cpu_seconds.append(cpu_seconds)
    return timings


def synchronize() -> None:
    """Waits until the GPU has done its work, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def speedup(own: list[float], reference: list[float]) -> dict:
    """How many times as fast as the reference something is, by the times of the same rounds.

    Returns:
        {"speedup": median of reference / own over the rounds, "speedup_range": [lowest, highest]}
    """
    ratios = [theirs / ours for ours, theirs in zip(own, reference, strict=True)]
    return {"speedup": statistics.median(ratios), "speedup_range": [min(ratios), max(ratios)]}


def with_range(result: dict, digits: int = 2) -> str:
    """The result of `speedup` for people: "1.69 times (1.64 to 2.13)"."""
    lowest, highest = result["speedup_range"]
    return f"{result['speedup']:.{digits}f} times ({lowest:.{digits}f} to {highest:.{digits}f})"


def parse_arguments(
    parser: argparse.ArgumentParser, output: str, argv: list[str] | None, rounds: int | None = None
) -> argparse.Namespace:
    """Adds the options that benchmarks share, and parses.

    Args:
        output: name of the result file in docs/results.
        argv: the command line's words; None for those of this process.
        rounds: the default of --rounds; None for a benchmark without rounds.
    """
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help=f"paired rounds (default: {rounds})")
    parser.add_argument("--output", type=Path, default=RESULTS / output, help=f"default: docs/results/{output}")
    return parser.parse_args(argv)


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose --help shows the module's docstring as it is written."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def environment() -> dict:
    """The command, the commit, the hardware and the versions that a result is measured with."""
    script = Path(sys.argv[0])
    packages = ("torch", "diffusers", "accelerate", "favae")
    return {
        "command": " ".join(["python", "-m", f"{script.parent.name}.{script.stem}", *sys.argv[1:]]),
        "commit": _commit(),
        "hardware": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def _commit() -> str | None:
    """What git calls the checkout, "-dirty" if its files are not those of the commit; None where there is no git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(": ")[2] if names else platform.processor()


def write_result(file: Path, result: dict) -> None:
    """Writes the result as JSON."""
    write_text(file, json.dumps(result, indent=1) + "\n")
