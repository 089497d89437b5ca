"""The figures of an evaluation."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullFormatter
from torch import Tensor
from torch.utils.data import Dataset

from favae.channels import in_color
from favae.data.images import to_uint8
from favae.eval.spectra import high_frequency_error, worst_windows
from favae.files import atomic_path

INK, MUTED = "#1a1a1a", "#777777"
SAMPLE_ROWS, SAMPLE_COLUMNS = 16, 8  # at most, in save_samples


def save_comparison(path: Path, originals: Tensor, reconstructions: dict[str, Tensor], errors: Sequence[float]) -> None:
    """A row per image: the original and each reconstruction, the same enlarged, and each absolute error.

    What is enlarged is the window where the reconstructions together miss most of the high frequencies. A frame shows
    it in the original.

    Args:
        originals, reconstructions: (N, C, H, W) in [-1, 1], shown `in_color`; errors are means over all channels.
        errors: (N,), written beside the rows.
    """
    difference = {name: images.clamp(-1, 1) - originals for name, images in reconstructions.items()}
    absolute = {name: values.abs().mean(dim=1) for name, values in difference.items()}
    brightest = max(float(np.quantile(values.numpy(), 0.995)) for values in absolute.values())
    windows = worst_windows(sum(high_frequency_error(values) for values in difference.values()))

    shown = {"original": originals, **reconstructions}
    titles = [*shown, *(f"{name}, zoom" for name in shown), *(f"|error| {name}" for name in absolute)]
    size = (1.7 * len(titles) + 0.4, 1.7 * len(originals) + 0.4)
    figure = Figure(figsize=size)
    axes = figure.subplots(len(originals), len(titles), squeeze=False)
    for i, (row, window) in enumerate(zip(axes, windows.tolist())):
        top, left, height, width = window
        cells = [_pixels(images[i]) for images in shown.values()]
        cells += [_pixels(images[i, :, top : top + height, left : left + width]) for images in shown.values()]
        for axis, cell in zip(row, cells):
            axis.imshow(cell, interpolation="nearest")
        frame = Rectangle((left - 0.5, top - 0.5), width, height, fill=False, edgecolor="#e33", linewidth=1)
        row[0].add_patch(frame)
        for axis, values in zip(row[len(cells) :], absolute.values()):
            axis.imshow(values[i].numpy(), cmap="magma", vmin=0, vmax=brightest, interpolation="nearest")
        row[0].set_ylabel(f"{errors[i]:.4f}", fontsize=8, color=MUTED)
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=9, color=INK)
    _save_images(figure, axes, path)


def save_latent_spectra(path: Path, spectra: dict[str, np.ndarray]) -> None:
    """Energy of each channel at each frequency, one panel per model; the mean of all channels in ink.

    Args:
        spectra: (C, h, w) of each model, as `favae.eval.latent_meters.power_spectrum` gives them.
    """
    size = (4 * len(spectra), 3.6)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(spectra), sharey=True, squeeze=False)
    for axis, (name, energy) in zip(axes[0], spectra.items()):
        diagonal = np.add(*np.indices(energy.shape[1:])).ravel()
        count = np.bincount(diagonal)
        lines = np.stack([np.bincount(diagonal, channel.ravel()) / count for channel in energy])
        frequency = np.arange(len(count)) / (len(count) - 1)
        axis.plot(frequency, lines.T, color=MUTED, linewidth=0.5, alpha=0.5)
        axis.plot(frequency, lines.mean(axis=0), color=INK, linewidth=2)
        axis.axhline(1, color=MUTED, linewidth=0.8, linestyle=":")
        axis.set(title=f"{name}: energy of each channel", xlabel="u + v, share of the highest", yscale="log")
        _tidy(axis)
    _save(figure, path)


def save_rate_distortion(path: Path, rows: Sequence[dict]) -> None:
    """Each metric over the bits per pixel, one curve for each name; models in ink, other formats muted.

    Args:
        rows: {"model": name, "metrics": {"bpp": ...}} of `favae.eval.compression`; those with "quality" are formats.
    """
    first = rows[0]["metrics"]
    names = [name for name in ("PSNR", "MS-SSIM", "SSIM", "LPIPS", "High", "power kept") if first.get(name) is not None]
    names += [name for name in first if name.startswith(("rFID", "rFD"))]
    size = (3.4 * len(names), 3.2)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)
    curves: dict[str, list[dict]] = {}
    for row in rows:
        curves.setdefault(row["model"], []).append(row)
    for axis, metric in zip(axes[0], names):
        for name, points in curves.items():
            points = sorted(points, key=lambda row: row["metrics"]["bpp"])
            x, y = ([row["metrics"][key] for row in points] for key in ("bpp", metric))
            style = {"alpha": 0.5, "linestyle": "--", "marker": "."} if "quality" in points[0] else {"marker": "o"}
            axis.plot(x, y, label=name, linewidth=1.5, markersize=4, **style)
        axis.set(title=metric, xlabel="bits per pixel", xscale="log", yscale="log" if metric == "High" else "linear")
        axis.xaxis.set_minor_formatter(NullFormatter())
        _tidy(axis)
    axes[0, 0].legend(fontsize=7, frameon=False)
    _save(figure, path)


def save_spectra(path: Path, original: Tensor, reconstructions: dict[str, Tensor], errors: dict[str, Tensor]) -> None:
    """Left: power of originals and reconstructions; right: the errors' share of the original's power, per frequency.

    Args:
        original and the values of both: (R,), of `radial_spectrum`.
    """
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    frequency = np.linspace(0, 0.5, len(original))[1:]
    left.plot(frequency, original[1:], color=INK, linewidth=2, label="original")
    for name in reconstructions:
        left.plot(frequency, reconstructions[name][1:], label=name)
        right.plot(frequency, errors[name][1:] / original[1:], label=name)
    right.axhline(1, color=MUTED, linewidth=0.8, linestyle=":")
    left.set(title="power", xlabel="cycles per pixel", yscale="log", xscale="log")
    right.set(title="error power / original power", xlabel="cycles per pixel", yscale="log")
    left.xaxis.set_minor_formatter(NullFormatter())
    _tidy(left)
    _tidy(right)
    left.legend(fontsize=8, frameon=False)
    _save(figure, path)


def save_latents(path: Path, spectra: dict[str, Tensor], means: dict[str, Tensor], stds: dict[str, Tensor]) -> None:
    """Latents of each model: power per frequency relative to its mean, and each channel's mean and std.

    Args:
        spectra: (R,) per model. means, stds: (C,) per model.
    """
    figure = Figure(figsize=(4.6 * (1 + len(spectra)), 3.8), layout="constrained")
    axes = figure.subplots(1, 1 + len(spectra))
    for name, spectrum in spectra.items():
        axes[0].plot(np.linspace(0, 0.5, len(spectrum)), spectrum / spectrum.mean(), marker=".", label=name)
    axes[0].set(title="power of the latents / its mean", xlabel="cycles per position", yscale="log")
    axes[0].legend(fontsize=8, frameon=False)
    for axis, name in zip(axes[1:], spectra):
        axis.errorbar(np.arange(len(means[name])), means[name], stds[name], fmt="o", markersize=3, linewidth=1)
        axis.set(title=f"{name}: mean and std", xlabel="latent channel")
    for axis in axes:
        _tidy(axis)
    _save(figure, path)


def save_samples(path: Path, images: Dataset, classes: Sequence[str] | None) -> None:
    """A row of up to 8 images for each of the first 16 classes; without classes, the first 64 images.

    Args:
        images: items {"image": uint8 (3, H, W)}; if `classes` is given, image i is of class i modulo their number.
    """
    if classes:
        rows, columns = min(SAMPLE_ROWS, len(classes)), max(1, min(SAMPLE_COLUMNS, len(images) // len(classes)))
    else:
        rows, columns = min(SAMPLE_COLUMNS, -(-len(images) // SAMPLE_COLUMNS)), SAMPLE_COLUMNS
    figure = Figure(figsize=(1.1 * columns + 1, 1.1 * rows))
    axes = figure.subplots(rows, columns, squeeze=False)
    for row in range(rows):
        for column in range(columns):
            index = column * len(classes) + row if classes else row * columns + column
            item = images[index] if index < len(images) else None
            if item is not None:
                axes[row][column].imshow(item["image"].permute(1, 2, 0).numpy())
        if classes:
            name = classes[row] if len(classes[row]) <= 24 else classes[row][:23] + "…"
            axes[row][0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9, color=INK)
    _save_images(figure, axes, path)


def _pixels(image: Tensor) -> np.ndarray:
    return to_uint8(in_color(image)).permute(1, 2, 0).numpy()


def _tidy(axis) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8, colors=MUTED)
    axis.grid(alpha=0.25, which="both")


def _save_images(figure, axes, path: Path) -> None:
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        for spine in axis.spines.values():
            spine.set_visible(False)
    figure.tight_layout(pad=0.3)
    _save(figure, path)


def _save(figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
