"""results.json of an evaluation: its protocol, and one row per model, guidance scale and seed."""

import importlib.metadata
import itertools
import json
import math
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from favae.distributed import process_state
from favae.errors import DataError
from favae.files import read_json, write_text
from favae.ranges import describe

UINT8 = "round((x + 1) * 127.5)"
PACKAGES = ("torch", "diffusers", "timm", "torch-fidelity", "torchmetrics", "favae")

HIGHER_IS_BETTER = ("PSNR", "SSIM", "MS-SSIM", "IS", "precision", "recall", "LNC")
BEST_AT_ONE = ("seams", "power kept")
WITHOUT_VERDICT = ("MIND_floor",)
DIGITS = {"Recon": 5, "Low": 5, "High": 5, "PSNR": 2, "IS": 2, "KID": 5, "KD": 5}


Task = Literal["reconstruction", "generation", "latents", "compression"]


def write_results(folder: Path, task: Task, protocol: dict, rows: list[dict]) -> None:
    """Writes results.json.

    Args:
        protocol: what two results must share to be compared.
        rows: {"model": name, "metrics": {name: number or None}, ...}; seeds of a model are rows with the same name.
    """
    result = {
        "task": task,
        "command": shlex.join(["favae", *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}},
        "num_processes": process_state().num_processes,  # no number depends on it
        "protocol": protocol,
        "rows": rows,
    }
    write_text(folder / "results.json", json.dumps(without_non_finite(result), indent=1, allow_nan=False))


class Row(BaseModel):
    model: str
    metrics: dict[str, float | None]


class Results(BaseModel):
    """What all results.json have in common."""

    task: Task
    protocol: dict[str, Any]
    rows: list[Row]


def read_results(file: Path) -> dict[str, Any]:
    """What `write_results` has written.

    Raises:
        DataError: if the file is damaged, or another one.
    """
    found = read_json(file)
    try:
        Results.model_validate(found)
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        raise DataError(
            f"{file} is not a results.json of favae evaluate: {key}{describe(error.errors()[0])}"
        ) from error
    return found


def without_non_finite(value):
    """The same with None for numbers that JSON does not know: NaN and infinities."""
    if isinstance(value, dict):
        return {key: without_non_finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_non_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ----------------------------------------------------------------------------------------------------------------------
# Metrics as people read them


def plain_name(metric: str) -> str:
    """A metric's name without the features it is computed on: "FD(dino)" and "FD-DINOv2" are FD."""
    return metric.partition("(")[0].removesuffix("-DINOv2")


def higher_is_better(metric: str) -> bool:
    return plain_name(metric) in HIGHER_IS_BETTER


def shown_metrics(row: dict) -> dict[str, str]:
    """The metrics of a row as text, without standard deviations."""
    metrics = {name: value for name, value in row["metrics"].items() if not plain_name(name).endswith("_std")}
    return {name: format_metric(name, value) for name, value in metrics.items()}


def number_duplicates(names: Sequence[str]) -> list[str]:
    """["a", "b", "a"] -> ["a", "b", "a (2)"]."""
    found: list[str] = []
    for name in names:
        others = (f"{name} ({number})" for number in itertools.count(2))
        found.append(next(each for each in itertools.chain([name], others) if each not in found))
    return found


def format_metric(name: str, value: float | None) -> str:
    """A metric with the digits it is usually given with; "-" for None."""
    if value is None:
        return "-"
    plain = plain_name(name)
    return f"{value:.{DIGITS.get(plain, 3 if 'F' in plain else 4)}f}"


def format_table(rows: list[dict[str, str]]) -> str:
    """Cells in columns, for a terminal. The first column is the name; all rows have the same headings."""
    headings = list(rows[0])
    lines = [headings, *([row[heading] for heading in headings] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
        for line in lines
    )
