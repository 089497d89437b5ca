"""Figures and tables, and the report of a demo.

    python -m favae.eval.report runs/demo

reads what the chain of `make demo` left in a folder (see `collect`) and writes metrics.json and report.html, one page
with everything inside.
"""

import argparse
import base64
import html
import io
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from torch import Tensor

from favae.data.images import to_uint8
from favae.eval.features import metric_name

INK, MUTED, BASELINE, OURS = "#1a1a1a", "#777777", "#b5651d", "#1f5fa8"


def tokenizer_columns(result: dict, features: str) -> dict[str, str]:
    """The numbers of one tokenizer as they are shown, by heading."""
    return {
        "Recon": f"{result['recon']:.5f}",
        "Low": f"{result['low']:.5f}",
        "High": f"{result['high']:.5f}",
        "LPIPS": "-" if result["lpips"] is None else f"{result['lpips']:.4f}",
        metric_name("rFID", features): f"{result['rfd']:.3f}",
        "PSNR": f"{result['psnr']:.2f}",
        "SSIM": f"{result['ssim']:.4f}",
        "floats/image": f"{result['floats_per_image']:,}"
        if "floats_per_image" in result
        else f"{result['tokens_per_image']:,} tokens",
        "parameters": f"{result['params'] / 1e6:.2f}M",
        "GFLOP": f"{result['flops'] / 1e9:.2f}",
    }


def format_table(results: dict[str, dict], features: str) -> str:
    """One line per model for people; the numbers are those of results.json."""
    rows = {name: tokenizer_columns(result, features) for name, result in results.items()}
    name_width = max(map(len, ("model", *rows))) + 2
    widths = {column: max(len(column), 8) for column in next(iter(rows.values()))}
    lines = ["model".ljust(name_width) + "  ".join(column.rjust(width) for column, width in widths.items())]
    for name, row in rows.items():
        lines.append(name.ljust(name_width) + "  ".join(row[c].rjust(width) for c, width in widths.items()))
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# Figures


def _pixels(image: Tensor):
    return to_uint8(image).permute(1, 2, 0).numpy()


def save_comparison(path: Path, originals: Tensor, reconstructions: dict[str, Tensor]) -> None:
    """Rows: images. Columns: original, each reconstruction, each absolute error (mean over colours, common scale).

    Args:
        originals, reconstructions: (N, 3, H, W) in [-1, 1].
    """
    errors = {name: (r.clamp(-1, 1) - originals).abs().mean(dim=1) for name, r in reconstructions.items()}
    top = max(float(e.quantile(0.995)) for e in errors.values())
    titles = ["original", *reconstructions, *(f"|error| {name}" for name in errors)]
    figure, axes = plt.subplots(
        len(originals), len(titles), figsize=(1.7 * len(titles), 1.7 * len(originals) + 0.4), squeeze=False
    )
    for row, original in enumerate(originals):
        cells = [_pixels(original), *(_pixels(r[row]) for r in reconstructions.values())]
        for axis, cell in zip(axes[row], cells):
            axis.imshow(cell, interpolation="nearest")
        for axis, error in zip(axes[row][len(cells) :], errors.values()):
            axis.imshow(error[row].numpy(), cmap="magma", vmin=0, vmax=top, interpolation="nearest")
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=10, color=INK)
    _finish(figure, axes, path)


def save_samples(path: Path, images: Tensor, classes: list[str]) -> None:
    """One row per class. Args: images: uint8 (n * classes, 3, H, W), the classes in turn."""
    columns = len(images) // len(classes)
    figure, axes = plt.subplots(
        len(classes), max(1, columns), figsize=(1.1 * max(1, columns) + 1, 1.1 * len(classes)), squeeze=False
    )
    for row, name in enumerate(classes):
        for column in range(columns):
            axes[row][column].imshow(images[column * len(classes) + row].permute(1, 2, 0).numpy())
        axes[row][0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9, color=INK)
    _finish(figure, axes, path)


def _finish(figure, axes, path: Path) -> None:
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        for spine in axis.spines.values():
            spine.set_visible(False)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _curves(logs: dict[str, tuple[list[dict], str]], terms: list[str]) -> str:
    """Loss terms against steps, one panel per term, one line per run; as an <img>."""
    figure, axes = plt.subplots(1, len(terms), figsize=(3.2 * len(terms), 2.6), squeeze=False)
    for axis, term in zip(axes[0], terms):
        for name, (records, colour) in logs.items():
            points = [(r["step"], r[term]) for r in records if term in r]
            if points:
                axis.plot(*zip(*points), label=name, color=colour, linewidth=1.3)
        axis.set_title(term, fontsize=10, color=INK)
        axis.set_xlabel("step", fontsize=8, color=MUTED)
        axis.tick_params(labelsize=8, colors=MUTED)
        axis.spines[["top", "right"]].set_visible(False)
    if len(logs) > 1:
        axes[0][0].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return _image(buffer.getvalue(), "loss curves")


def _image(data: bytes, alternative: str) -> str:
    encoded = base64.b64encode(data).decode()
    return f'<img src="data:image/png;base64,{encoded}" alt="{html.escape(alternative)}">'


# ----------------------------------------------------------------------------------------------------------------------
# The report of `make demo`


def read_log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def collect(folder: Path) -> dict:
    """Everything `make demo` measured: {"tokenizers": {"favae": {...}, "vavae": {...}}, "generator": {...}}.

    A tokenizer's numbers are those on photographs never trained on, with those on unseen regions of the trained
    photographs under "validation"; `seconds` is the time its training took.
    """
    heldout = json.loads((folder / "reconstruction/results.json").read_text())
    validation = json.loads((folder / "reconstruction_validation/results.json").read_text())
    metrics = {"settings": heldout["settings"], "tokenizers": {}}
    for name, values in heldout["models"].items():
        last = read_log(folder / name)[-1]
        metrics["tokenizers"][name] = {
            **values,
            "steps": last["step"],
            "seconds": last["seconds"],
            "validation": validation["models"][name],
        }
    last = read_log(folder / "generator")[-1]
    generation = json.loads((folder / "generation/results.json").read_text())
    metrics["generator"] = {**generation, "steps": last["step"], "seconds": last["seconds"]}
    return metrics


def verdict(ours: dict, baseline: dict) -> str:
    """One sentence on Recon and High, whichever way they came out."""
    parts = []
    for key, name in (("recon", "Recon"), ("high", "High")):
        ratio = ours[key] / baseline[key]
        parts.append(f"{name} is {ratio:.2f} times the baseline's ({'lower' if ratio < 1 else 'NOT lower'})")
    flops = ours["flops"] / baseline["flops"] - 1
    return (
        f"FA-VAE's {' and its '.join(parts)}, at {ours['floats_per_image']:,} floats per image against "
        f"{baseline['floats_per_image']:,}, {ours['steps']:,} steps against {baseline['steps']:,}, "
        f"and {flops:+.1%} FLOPs."
    )


STYLE = f"""
body {{ font: 15px/1.5 system-ui, sans-serif; color: {INK}; max-width: 1240px; margin: 2em auto; padding: 0 1em; }}
h1 {{ font-size: 1.5em }} h2 {{ font-size: 1.15em; margin-top: 2em }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto }}
th, td {{ padding: .3em .6em; font-size: 14px; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }}
th:first-child, td:first-child {{ text-align: left }}
img {{ max-width: 100%; }} p.note {{ color: {MUTED}; }}
"""


def _table(headings: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _tokenizer_table(tokenizers: dict[str, dict], features: str, part: str | None = None) -> str:
    rows, headings = [], []
    for name, entry in tokenizers.items():
        columns = {"tokenizer": html.escape(name), **tokenizer_columns(entry[part] if part else entry, features)}
        columns["training s"] = f"{entry['seconds']:.0f}"
        headings = list(columns)
        rows.append(list(columns.values()))
    return _table(headings, rows)


def _generator_table(generator: dict) -> str:
    values = {"FID": f"{generator['fd']:.2f}", "IS": "-" if generator["is"] is None else f"{generator['is']:.2f}"}
    values |= {name: f"{generator[name]:.3f}" for name in ("precision", "recall")}
    columns = {"generator": "LightningDiT on favae", "images": f"{generator['num_images']:,}"}
    columns |= {metric_name(name, generator["features"]): value for name, value in values.items()}
    columns |= {"guidance": f"{generator['guidance_scale']}", "Euler steps": str(generator["num_inference_steps"])}
    columns["training s"] = f"{generator['seconds']:.0f}"
    return _table(list(columns), [list(columns.values())])


def write_report(folder: Path) -> Path:
    """Writes metrics.json and report.html into the folder of a demo; returns the page's path.

    Raises:
        FileNotFoundError: if a step of the chain has not been run.
    """
    metrics = collect(folder)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1))
    tokenizers, generator, features = metrics["tokenizers"], metrics["generator"], metrics["settings"]["features"]
    logs = {
        "favae": (read_log(folder / "favae"), OURS),
        "vavae": (read_log(folder / "vavae"), BASELINE),
    }
    shown = ("reconstruction", "alignment", "kl", "adversarial", "discriminator")
    terms = [term for term in shown if term in logs["favae"][0][-1]]
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>favae demo</title><style>{STYLE}</style></head><body>
<h1>favae demo: two tokenizers at equal latent size, and a generator on one of them</h1>
<p>{verdict(tokenizers["favae"], tokenizers["vavae"])}</p>
<h2>Reconstruction of photographs never trained on</h2>
{_tokenizer_table(tokenizers, features)}
<p class="note">{tokenizers["favae"]["num_images"]} crops of two photographs at {metrics["settings"]["resolution"]} px,
posterior {metrics["settings"]["posterior"]}. Recon, Low, High: mean squared error in [-1, 1] of the image, its LL band,
and the mean of LH, HL and HH; Recon = (Low + 3 High) / 4. LPIPS needs weights that may not be at hand.
vavae is a stock AutoencoderKL.</p>
<h2>Reconstruction of unseen regions of the trained photographs</h2>
{_tokenizer_table(tokenizers, features, "validation")}
<h2>Originals, baseline, FA-VAE, errors</h2>
{_image((folder / "reconstruction/comparison.png").read_bytes(), "originals, reconstructions and their errors")}
<h2>Training of the tokenizers</h2>
{_curves(logs, terms)}
<h2>Generated images, one row per class</h2>
{_generator_table(generator)}
<p class="note">Against {generator["num_reference"]:,} training crops; few images and a small network: these numbers
compare runs of this demo, nothing else.</p>
{_image((folder / "generation/samples.png").read_bytes(), "generated images by class")}
<h2>Training of the generator</h2>
{_curves({"generator": (read_log(folder / "generator"), OURS)}, ["velocity", "cosine"])}
</body></html>
"""
    path = folder / "report.html"
    path.write_text(page)
    return path


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    try:
        path = write_report(folder)
    except FileNotFoundError as error:
        sys.exit(f"error: {error.filename} is missing; run make demo, or the step that writes it")
    metrics = json.loads((folder / "metrics.json").read_text())
    print(verdict(metrics["tokenizers"]["favae"], metrics["tokenizers"]["vavae"]))
    print(f"report: {path}")


if __name__ == "__main__":
    main()
