"""Tables and figures of tokenizers, from the rows of a report."""

import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.utils import save_image

ERRORS = {"recon": 4, "low": 4, "high": 5}  # and the digits that tables give of each


def rows_by_model(report: dict) -> dict[str, list[dict]]:
    rows: dict[str, list[dict]] = {}
    for row in report["rows"]:
        rows.setdefault(row["model"], []).append(row)
    return rows


def format_line(*cells) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def format_table(columns: list[str], lines: list[list]) -> str:
    return "\n".join([format_line(*columns), "|" + "---|" * len(columns), *(format_line(*line) for line in lines)])


def with_std(values: list[float], digits: int) -> str:
    """Mean and standard deviation over seeds; the mean alone of a single seed, or of equal values."""
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(set(values)) == 1 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def means(rows: list[dict], digits: dict[str, int]) -> list[str]:
    """`with_std` of each of these values."""
    return [with_std([row[key] for row in rows], count) for key, count in digits.items()]


def mean_ratio(own: list[dict], reference: list[dict], *keys: str) -> float:
    """The mean of a value over rows, relative to that of the reference's rows."""
    means = []
    for rows in (own, reference):
        values = rows
        for key in keys:
            values = [value[key] for value in values]
        means.append(statistics.mean(values))
    return means[0] / means[1]


def short_table(report: dict, order: list[str], reference: str) -> str:
    """The columns that docs/results.md shows: costs, and errors relative to the reference's in brackets."""
    rows = rows_by_model(report)
    lines = []
    for name in (name for name in order if name in rows):
        own, base = rows[name], rows.get(reference, rows[name])
        cells = [f"`{name}`", len(own), f"{own[0]['params'] / 1e6:.1f} M", f"{own[0]['flops'] / 1e9:.2f}"]
        cells.append(_speed(report, name))
        for key in ERRORS:
            mean = statistics.mean(row[key] for row in own)
            cells.append(f"{mean:.{ERRORS[key]}f} ({mean_ratio(own, base, key):.2f})")
        cells += [with_std([row["psnr"] for row in own], 2), _rfd(own)]
        lines.append(cells)
    columns = ["model", "seeds", "parameters", "GFLOP", "speed", "Recon", "Low", "High", "PSNR", "rFD"]
    return format_table(columns, lines)


def full_table(report: dict, order: list[str], reference: str) -> str:
    """All that was measured, with standard deviations; errors relative to the reference's in brackets."""
    rows = rows_by_model(report)
    lines = []
    for name in (name for name in order if name in rows):
        own, base = rows[name], rows.get(reference, rows[name])
        size = own[0].get("floats_per_image")
        cells = [f"`{name}`", len(own), f"{size:,}" if size else f"{own[0]['tokens_per_image']} tokens"]
        cells += [f"{own[0]['params'] / 1e6:.1f} M", f"{own[0]['flops'] / 1e9:.2f}", _speed(report, name)]
        for key, digits in ERRORS.items():
            cells.append(f"{with_std([row[key] for row in own], digits)} ({mean_ratio(own, base, key):.2f})")
        cells += [with_std([row["psnr"] for row in own], 2), with_std([row["ssim"] for row in own], 3), _rfd(own)]
        ratio = mean_ratio(own, base, "validation", "recon")
        cells.append(f"{with_std([row['validation']['recon'] for row in own], 4)} ({ratio:.2f})")
        cells += [ratios_on_test(own, base), f"{statistics.mean(row['seconds'] for row in own):.0f}"]
        lines.append(cells)
    columns = ["model", "seeds", "floats", "parameters", "GFLOP", "speed", "Recon", "Low", "High", "PSNR", "SSIM"]
    columns += ["rFD", "Recon, validation", "Recon, Low, High, test", "training, s"]
    return format_table(columns, lines)


def _speed(report: dict, name: str) -> str:
    return f"{report['speed'][name]['speedup']:.2f}" if name in report.get("speed", {}) else ""


def _rfd(rows: list[dict]) -> str:
    return with_std([row["rfd"] for row in rows], 0) if "rfd" in rows[0] else ""


def ratios_on_test(own: list[dict], reference: list[dict]) -> str:
    """Recon, Low and High on the test photographs relative to the reference's, over the seeds that measured both."""
    seeds = {row["seed"] for row in own if "test" in row} & {row["seed"] for row in reference if "test" in row}
    if not seeds:
        return ""
    both = [[row for row in rows if row["seed"] in seeds] for rows in (own, reference)]
    return ", ".join(f"{mean_ratio(*both, 'test', key):.2f}" for key in ERRORS)


def save_curves(report: dict, models: list[str], file: Path) -> None:
    """Recon, Low and High on the held-out photographs over steps, a line for each seed."""
    rows = rows_by_model(report)
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    colors = plt.get_cmap("tab10").colors
    for axis, key in zip(axes, ERRORS):
        for model, color in zip([m for m in models if m in rows], colors):
            for i, row in enumerate(rows[model]):
                steps, values = zip(*[(point["steps"], point[key]) for point in row["curve"]])
                axis.plot(steps, values, color=color, marker=".", label=None if i else model, alpha=0.8)
        axis.set(title=f"{key.capitalize()}, held-out photographs", xlabel="steps", yscale="log")
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def save_spectra(report: dict, models: list[str], file: Path) -> None:
    """The error's share of the images' power at each spatial frequency, mean over seeds."""
    rows = rows_by_model(report)
    figure, axis = plt.subplots(figsize=(6.4, 4), constrained_layout=True)
    for model in (m for m in models if m in rows):
        spectrum = np.mean([row["error_spectrum"] for row in rows[model]], axis=0)
        axis.plot(np.linspace(0, 0.5, len(spectrum)), spectrum, label=model)
    axis.set(xlabel="spatial frequency, cycles per pixel", ylabel="error power / image power", yscale="log")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def save_strip(images: Tensor, file: Path) -> None:
    """Images (N, C, H, W) in [-1, 1] side by side, as `save_strips` reads them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_image(images.cpu(), file, nrow=len(images), padding=0, normalize=True, value_range=(-1, 1))


def save_strips(folder: Path, models: list[str], file: Path) -> None:
    """Held-out images and each model's reconstructions below them, from the pictures that the first seed left."""
    names = ["original", *models]
    strips = {name: Image.open(folder / f"{name}.png") for name in names if (folder / f"{name}.png").exists()}
    if not strips:
        return
    first = next(iter(strips.values()))
    height = 0.1 + 6 * first.height / first.width  # inches of each
    figure, axes = plt.subplots(
        len(strips), 1, figsize=(6, height * len(strips)), constrained_layout=True, squeeze=False
    )
    for axis, (name, strip) in zip(axes[:, 0], strips.items()):
        axis.imshow(strip, interpolation="nearest")
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def save_kept_power(panels: dict[str, dict[str, list[float]]], file: Path) -> None:
    """The power of reconstructions by that of the originals, from frequency 0 to the Nyquist frequency.

    Args:
        panels: title -> name -> the ratio at each frequency.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.6), sharey=True, constrained_layout=True)
    for axis, (title, curves) in zip(np.atleast_1d(axes), panels.items()):
        for name, ratios in curves.items():
            axis.plot(np.linspace(0, 0.5, len(ratios)), ratios, label=name, linewidth=1)
        axis.axhline(1, color="black", linewidth=0.5)
        axis.set(title=title, xlabel="cycles per pixel", ylabel="power kept", ylim=(0, 1.5))
        axis.label_outer()
        if curves:
            axis.legend(fontsize=7)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def save_samples(folder: Path, names: list[str], size: int, file: Path) -> None:
    """The first samples of each NAME.png in a folder that is there, one name below the other, at twice their size.

    Args:
        size: of one sample; in NAME.png they are a pixel apart.
    """
    strips = [Image.open(folder / f"{name}.png") for name in names if (folder / f"{name}.png").exists()]
    if not strips:
        return
    columns = 768 // size
    width, height = columns * (size + 1) + 1, columns // 6 * (size + 1) + 1
    sheet = Image.new("RGB", (width, len(strips) * (height + 8) - 8), "white")
    for number, strip in enumerate(strips):
        sheet.paste(strip.crop((0, 0, width, height)), (0, number * (height + 8)))
    sheet.resize((2 * width, 2 * sheet.height), Image.Resampling.NEAREST).save(file)
