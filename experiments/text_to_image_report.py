"""Tables and figures of experiments/text_to_image.py."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments.emoji import FEATURES, TOP
from experiments.report import format_table, means, rows_by_model, with_std

TABLE_SCALE = 3.0  # the guidance scale of the tables and the pictures
SPLITS = {
    "held-out names": ("heldout", {"among_heldout": "among the 20", "name": "name", "category": "category"}),
    "names of training": ("training", {"name": "name", "category": "category"}),
}


def tables(report: dict) -> str:
    """Three tables: the tokens, held-out names, names of training."""
    rows = rows_by_model(report)
    tokenizers = {own[0]["tokenizer"]["tokens"]: own[0]["tokenizer"] for own in rows.values()}
    sections = [tokenizer_table(tokenizers)]
    sections += [
        samples_table(rows, tokenizers, title, split, galleries) for title, (split, galleries) in SPLITS.items()
    ]
    return "\n\n".join(sections)


def tokenizer_table(tokenizers: dict[str, dict]) -> str:
    lines = []
    for tokens, found in tokenizers.items():
        used, bits = "", f"{found['bits']:,.0f} (KL to a normal distribution)"
        if "perplexity" in found:
            used, bits = f"{found['codes_used']:.0f}, {found['perplexity']:.0f}", f"{found['bits']:,.0f}"
        training, heldout = found["errors_training"], found["errors_heldout"]
        errors = [f"{training['recon']:.4f}", f"{heldout['recon']:.4f}, {heldout['psnr']:.1f}"]
        lines.append([f"`{tokens}`", found["floats"], bits, used, *errors])
    columns = ["tokens", "floats", "bits", "codes used, perplexity", "Recon, training", "Recon, PSNR, held out"]
    return format_table(columns, lines)


def samples_table(rows: dict, tokenizers: dict, title: str, split: str, galleries: dict[str, str]) -> str:
    # 20 images are too few for recall, and with 16 copies of each, as their reconstructions are measured, it is 0.
    shares = ("precision",) if split == "heldout" else ("precision", "recall")
    lines = []
    for name, own in rows.items():
        points = [at_scale(row, TABLE_SCALE) if split == "heldout" else row[split] for row in own]
        size = [len(own), f"{own[0]['params'] / 1e6:.1f} M"]
        rates = [_rates(points, gallery) for gallery in galleries]
        lines.append([f"`{name}`", *size, *_quality(points, shares), *rates])
    real = next(iter(tokenizers.values()))["real"]
    controls = {f"reconstructions, `{tokens}`": found[split] for tokens, found in tokenizers.items()}
    for name, point in {**controls, "the real images": real[split]}.items():
        lines.append([name, "", "", *_quality([point], shares), *(_rates([point], gallery) for gallery in galleries)])
    lines.append(["chance", *[""] * 5, *(_rates([real[split]["chance"]], gallery) for gallery in galleries)])
    return format_table([title, "seeds", "parameters", "FD", "IS", ", ".join(shares), *galleries.values()], lines)


def at_scale(row: dict, scale: float) -> dict:
    """The metrics of the samples for held-out names at one guidance scale."""
    (found,) = (point for point in row["heldout"] if point["guidance_scale"] == scale)
    return found


def _rates(points: list[dict], gallery: str) -> str:
    """The rates of the nearest and of the five nearest in percent, mean and standard deviation over seeds."""
    return ", ".join(with_std([100 * point[gallery][f"top{k}"] for point in points], 0) for k in TOP)


def _quality(points: list[dict], shares: tuple[str, ...]) -> list[str]:
    return [*means(points, {"fid": 0, "is": 2}), ", ".join(means(points, dict.fromkeys(shares, 2)))]


def figures(report: dict, stem: Path) -> None:
    save_sweep(report, Path(f"{stem}_guidance.png"))
    save_grid(report, stem, Path(f"{stem}_samples.png"))


def save_sweep(report: dict, file: Path) -> None:
    """FD and retrieval over the guidance scale for held-out names, a line for each seed."""
    panels = {
        f"FD({FEATURES}) to the 20": lambda point: point["fid"],
        "nearest of the 20 is the one asked for": lambda point: point["among_heldout"]["top1"],
        "nearest of all is of its category": lambda point: point["category"]["top1"],
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 4), constrained_layout=True)
    models = rows_by_model(report)
    for axis, (title, value) in zip(axes, panels.items()):
        for number, (name, rows) in enumerate(models.items()):
            for i, row in enumerate(rows):
                points = [(point["guidance_scale"], value(point)) for point in row["heldout"]]
                axis.plot(*zip(*points), color=f"C{number}", marker=".", label=None if i else name, alpha=0.8)
        axis.set(title=title, xlabel="guidance scale")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(models), fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def save_grid(report: dict, folder: Path, file: Path) -> None:
    """Real images, reconstructions and samples of every model, one held-out name per column."""
    models = rows_by_model(report)
    tokens = dict.fromkeys(own[0]["tokenizer"]["tokens"] for own in models.values())
    labels = ["real", *(f"{name}-reconstructions" for name in tokens), *models]
    pictures = {label: plt.imread(folder / f"{label}.png") for label in labels if (folder / f"{label}.png").exists()}
    if not pictures:  # only the first seed leaves any
        return
    names = report["rows"][0]["heldout_names"]
    heights = [picture.shape[0] for picture in pictures.values()]
    size = {"figsize": (17, 1.5 + 0.013 * sum(heights)), "constrained_layout": True, "squeeze": False}
    figure, axes = plt.subplots(len(pictures), 1, height_ratios=heights, **size)
    for axis, (label, picture) in zip(axes[:, 0], pictures.items()):
        axis.imshow(picture, interpolation="nearest")
        axis.set(yticks=[], xticks=[])
        axis.set_ylabel(label.replace("-", "\n").replace("_", "\n"), rotation=0, ha="right", va="center")
    step, top = picture.shape[1] / len(names), axes[0, 0]
    top.set_xticks([step * (k + 0.5) for k in range(len(names))], names, rotation=35, ha="left", fontsize=8)
    top.xaxis.tick_top()
    figure.savefig(file, dpi=100, bbox_inches="tight")
    plt.close(figure)
