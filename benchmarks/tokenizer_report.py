"""Tables and figures from the rows of a tokenizer benchmark, and their place in docs/results.md."""

import re
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

DOCUMENT = Path(__file__).resolve().parent.parent / "docs/results.md"
MEASURES = ("recon", "low", "high")


def by_model(report: dict) -> dict[str, list[dict]]:
    rows: dict[str, list[dict]] = {}
    for row in report["rows"]:
        rows.setdefault(row["model"], []).append(row)
    return rows


def mean(rows: list[dict], key: str) -> float:
    return statistics.mean(row[key] for row in rows)


def with_spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation over seeds, the latter if there are several."""
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def table(report: dict, order: list[str], reference: str) -> str:
    """Markdown; errors with their ratio to the reference's mean in brackets."""
    rows = by_model(report)
    columns = ["model", "seeds", "floats", "parameters", "GFLOP", "speed", "Recon", "Low", "High", "PSNR", "SSIM"]
    columns += ["rFD(efficientnet-lite0)", "Recon, validation", "Recon, Low, High, test", "training, s"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for name in order:
        if name not in rows:
            continue
        own, base = rows[name], rows.get(reference, rows[name])
        size = own[0].get("floats_per_image") or f"{own[0]['tokens_per_image']} tokens"
        cells = [f"`{name}`", str(len(own)), f"{size:,}" if isinstance(size, int) else size]
        cells += [f"{own[0]['params'] / 1e6:.1f} M", f"{own[0]['flops'] / 1e9:.2f}"]
        cells.append(f"{report['throughput'][name]['ratio']:.2f}" if name in report.get("throughput", {}) else "")
        for key, digits in zip(MEASURES, (4, 4, 5)):
            values = [row[key] for row in own]
            cells.append(f"{with_spread(values, digits)} ({statistics.mean(values) / mean(base, key):.2f})")
        cells += [with_spread([row["psnr"] for row in own], 2), with_spread([row["ssim"] for row in own], 3)]
        cells.append(with_spread([row["rfd"] for row in own], 0) if "rfd" in own[0] else "")
        validation = [row["validation"]["recon"] for row in own]
        ratio = statistics.mean(validation) / statistics.mean(row["validation"]["recon"] for row in base)
        cells += [f"{with_spread(validation, 4)} ({ratio:.2f})", ratios_on_test(own, base)]
        cells.append(f"{mean(own, 'seconds'):.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ratios_on_test(own: list[dict], base: list[dict]) -> str:
    """Recon, Low and High on the test photographs, relative to the reference's, of the seeds that measured both."""
    seeds = {row["seed"] for row in own if "test" in row} & {row["seed"] for row in base if "test" in row}

    def average(rows: list[dict], key: str) -> float:
        return statistics.mean(row["test"][key] for row in rows if row["seed"] in seeds)

    return ", ".join(f"{average(own, key) / average(base, key):.2f}" for key in MEASURES) if seeds else ""


def write_section(name: str, text: str, document: Path = DOCUMENT) -> None:
    """Replaces what stands between `<!-- name -->` and `<!-- end of name -->`.

    Raises:
        ValueError: if the document has no such place.
    """
    whole = document.read_text()
    place = re.compile(f"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
    if not place.search(whole):
        raise ValueError(f"{document} has no place for '{name}'")
    document.write_text(place.sub(lambda match: f"{match[1]}{text}\n{match[2]}", whole))


def save_curves(report: dict, models: list[str], file: Path) -> None:
    """Recon, Low and High over steps, every seed a line."""
    rows = by_model(report)
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    colours = plt.get_cmap("tab10").colors
    for axis, key in zip(axes, MEASURES):
        for model, colour in zip([m for m in models if m in rows], colours):
            for i, row in enumerate(rows[model]):
                steps, values = zip(*[(point["steps"], point[key]) for point in row["curve"]])
                axis.plot(steps, values, color=colour, marker=".", label=None if i else model, alpha=0.8)
        axis.set(title=f"{key.capitalize()}, held-out photographs", xlabel="steps", yscale="log")
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def save_spectra(report: dict, models: list[str], file: Path) -> None:
    """The error's share of the image's power at each spatial frequency, mean over seeds."""
    rows = by_model(report)
    figure, axis = plt.subplots(figsize=(6.4, 4), constrained_layout=True)
    for model in (m for m in models if m in rows):
        spectrum = np.mean([row["error_spectrum"] for row in rows[model]], axis=0)
        axis.plot(np.linspace(0, 0.5, len(spectrum)), spectrum, label=model)
    axis.set(xlabel="spatial frequency, cycles per pixel", ylabel="error power / image power", yscale="log")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def save_strips(folder: Path, models: list[str], file: Path) -> None:
    """Held-out images, each model's reconstructions below the originals, first seed."""
    names = ["original", *models]
    strips = {name: Image.open(folder / f"{name}.png") for name in names if (folder / f"{name}.png").exists()}
    if not strips:  # only the first seed leaves any
        return
    figure, axes = plt.subplots(len(strips), 1, figsize=(9, 1.3 * len(strips)), constrained_layout=True, squeeze=False)
    for axis, (name, strip) in zip(axes[:, 0], strips.items()):
        axis.imshow(strip, interpolation="nearest")
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        axis.set(xticks=[], yticks=[])
        for side in axis.spines.values():
            side.set_visible(False)
    figure.savefig(file, dpi=110)
    plt.close(figure)
