"""results.json of an evaluation: under which protocol, and one row per model, guidance scale and seed."""

import importlib.metadata
import json
import math
import platform
import sys
from pathlib import Path

from favae.distributed import process_state
from favae.files import write_text

UINT8 = "round((x + 1) * 127.5)"
PACKAGES = ("torch", "diffusers", "timm", "torch-fidelity", "favae")

HIGHER_IS_BETTER = ("PSNR", "SSIM", "MS-SSIM", "IS", "precision", "recall")


def higher_is_better(metric: str) -> bool:
    return metric.partition("(")[0].removesuffix("-DINOv2") in HIGHER_IS_BETTER


def write_results(folder: Path, kind: str, protocol: dict, rows: list[dict]) -> None:
    """
    Args:
        kind: "reconstruction" or "generation".
        protocol: what two results must share to be compared.
        rows: {"model": name, "metrics": {name: number or None}, ...}; a model's seeds are rows of the same name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    result = {
        "kind": kind,
        "command": " ".join([f"python -m favae.eval.{kind}", *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}},
        "num_processes": process_state().num_processes,  # which no number depends on
        "protocol": protocol,
        "rows": rows,
    }
    write_text(folder / "results.json", json.dumps(finite(result), indent=1, allow_nan=False))


def shown_metrics(row: dict) -> dict[str, str]:
    """A row's measures as people read them, without the deviations."""
    return {
        name: format_metric(name, value)
        for name, value in row["metrics"].items()
        if not name.partition("(")[0].endswith("_std")
    }


def finite(value):
    """The same with None for numbers that JSON does not know: NaN and infinities."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def one_line(error: Exception) -> str:
    """What a command prints of an error; a worker of a DataLoader puts its own lines before the message."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines and lines[0].startswith("Caught ") else lines[0]) if lines else type(error).__name__


def format_table(rows: list[dict[str, str]]) -> str:
    """Cells in columns, for a terminal; the first is the name. All rows have the first one's headings."""
    headings = list(rows[0])
    widths = [max(len(heading), *(len(row[heading]) for row in rows)) for heading in headings]
    lines = [[heading for heading in headings], *([row[heading] for heading in headings] for row in rows)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
        for line in lines
    )


def format_metric(name: str, value: float | None) -> str:
    """A number of `metrics` with the digits it is usually given with; "-" for None."""
    if value is None:
        return "-"
    digits = {"Recon": 5, "Low": 5, "High": 5, "PSNR": 2, "IS": 2, "KID": 5, "KD": 5, "FID": 3, "sFID": 3}
    plain = name.partition("(")[0].removesuffix("-DINOv2")
    return f"{value:.{digits.get(plain, 3 if 'F' in plain else 4)}f}"
