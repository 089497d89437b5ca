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

INK, MUTED, BASELINE, OURS = "#1a1a1a", "#777777", "#b5651d", "#1f5fa8"


def format_table(results: dict[str, dict], rfid: str) -> str:
    """One line per model for people; the numbers are those of results.json."""
    width = max(map(len, results), default=5) + 2
    columns = ["Recon", "Low", "High", "LPIPS", rfid, "PSNR", "SSIM", "floats", "params", "GFLOP"]
    lines = ["model".ljust(width) + "  ".join(name.rjust(8) for name in columns)]
    for name, r in results.items():
        lpips = "-" if r["lpips"] is None else f"{r['lpips']:.4f}"
        values = [f"{r['recon']:.5f}", f"{r['low']:.5f}", f"{r['high']:.5f}", lpips, f"{r['rfd']:.3f}"]
        values += [f"{r['psnr']:.2f}", f"{r['ssim']:.4f}", f"{r['floats_per_image']:,}"]
        values += [f"{r['params'] / 1e6:.2f}M", f"{r['flops'] / 1e9:.2f}"]
        lines.append(name.ljust(width) + "  ".join(v.rjust(max(8, len(c))) for v, c in zip(values, columns)))
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
body {{ font: 15px/1.5 system-ui, sans-serif; color: {INK}; max-width: 1000px; margin: 2em auto; padding: 0 1em; }}
h1 {{ font-size: 1.5em }} h2 {{ font-size: 1.15em; margin-top: 2em }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto }}
th, td {{ padding: .3em .8em; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }}
th:first-child, td:first-child {{ text-align: left }}
img {{ max-width: 100%; }} p.note {{ color: {MUTED}; }}
"""


def _tokenizer_rows(tokenizers: dict[str, dict], part: str | None) -> str:
    rows = []
    for name, entry in tokenizers.items():
        r = entry[part] if part else entry
        lpips = "&ndash;" if r["lpips"] is None else f"{r['lpips']:.4f}"
        cells = [f"{r['recon']:.5f}", f"{r['low']:.5f}", f"{r['high']:.5f}", lpips, f"{r['rfd']:.2f}"]
        cells += [f"{r['psnr']:.2f}", f"{r['ssim']:.4f}", f"{r['floats_per_image']:,}", f"{r['params'] / 1e6:.2f} M"]
        cells += [f"{r['flops'] / 1e9:.2f}", f"{entry['seconds']:.0f}"]
        rows.append(f"<tr><td>{html.escape(name)}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return "\n".join(rows)


def _table(headings: list[str], rows: str) -> str:
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def write_report(folder: Path) -> Path:
    """Writes metrics.json and report.html into the folder of a demo; returns the page's path.

    Raises:
        FileNotFoundError: if a step of the chain has not been run.
    """
    metrics = collect(folder)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1))
    tokenizers, generator, features = metrics["tokenizers"], metrics["generator"], metrics["settings"]["features"]
    named = (
        (lambda name: name) if features == "inception" else (lambda name: f"{name.replace('FID', 'FD')}({features})")
    )
    headings = ["tokenizer", "Recon", "Low", "High", "LPIPS", named("rFID"), "PSNR", "SSIM"]
    headings += ["floats/image", "parameters", "GFLOP", "training s"]
    logs = {
        "favae": (read_log(folder / "favae"), OURS),
        "vavae": (read_log(folder / "vavae"), BASELINE),
    }
    terms = [
        t for t in ("reconstruction", "alignment", "kl", "adversarial", "discriminator") if t in logs["favae"][0][-1]
    ]
    score = "&ndash;" if generator["is"] is None else f"{generator['is']:.2f}"
    generator_cells = [f"{generator['num_images']:,}", f"{generator['fd']:.2f}", score]
    generator_cells += [f"{generator['precision']:.3f}", f"{generator['recall']:.3f}", f"{generator['guidance_scale']}"]
    generator_cells += [str(generator["num_inference_steps"]), f"{generator['seconds']:.0f}"]
    generator_headings = ["generator", "images", *map(named, ("FID", "IS", "precision", "recall"))]
    generator_headings += ["guidance", "Euler steps", "training s"]
    generator_row = "<tr><td>LightningDiT on favae</td>" + "".join(f"<td>{c}</td>" for c in generator_cells) + "</tr>"
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>favae demo</title><style>{STYLE}</style></head><body>
<h1>favae demo: two tokenizers at equal latent size, and a generator on one of them</h1>
<p>{verdict(tokenizers["favae"], tokenizers["vavae"])}</p>
<h2>Reconstruction of photographs never trained on</h2>
{_table(headings, _tokenizer_rows(tokenizers, None))}
<p class="note">{tokenizers["favae"]["num_images"]} crops of two photographs at {metrics["settings"]["resolution"]} px,
posterior {metrics["settings"]["posterior"]}. Recon, Low, High: mean squared error in [-1, 1] of the image, its LL band,
and the mean of LH, HL and HH; Recon = (Low + 3 High) / 4. LPIPS needs weights that may not be at hand.
vavae is a stock AutoencoderKL.</p>
<h2>Reconstruction of unseen regions of the trained photographs</h2>
{_table(headings, _tokenizer_rows(tokenizers, "validation"))}
<h2>Originals, baseline, FA-VAE, errors</h2>
{_image((folder / "reconstruction/comparison.png").read_bytes(), "originals, reconstructions and their errors")}
<h2>Training of the tokenizers</h2>
{_curves(logs, terms)}
<h2>Generated images, one row per class</h2>
{_table(generator_headings, generator_row)}
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
