"""The report of a demo.

    favae report runs/demo

reads what the chain of `make demo` left in a folder (see `collect`) and writes metrics.json and report.html, one page
with everything inside.
"""

import base64
import html
import io
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from favae.eval.figures import BASELINE, INK, MUTED, OURS
from favae.eval.reconstruction import table_row
from favae.eval.results import shown_metrics


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


def read_log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def collect(folder: Path) -> dict:
    """Everything `make demo` measured: {"protocol": ..., "tokenizers": {"favae": ..., "vavae": ...}, "generator": ...}.

    A tokenizer's numbers are those on photographs never trained on, with those on unseen regions of the trained
    photographs under "validation"; `seconds` is the time its training took.
    """
    heldout = json.loads((folder / "reconstruction/results.json").read_text())
    validation = json.loads((folder / "reconstruction_validation/results.json").read_text())
    elsewhere = {row["model"]: row for row in validation["rows"]}
    metrics = {"protocol": heldout["protocol"], "tokenizers": {}}
    for row in heldout["rows"]:
        last = read_log(folder / row["model"])[-1]
        metrics["tokenizers"][row["model"]] = {
            **row,
            "steps": last["step"],
            "seconds": last["seconds"],
            "validation": elsewhere[row["model"]],
        }
    last = read_log(folder / "generator")[-1]
    generation = json.loads((folder / "generation/results.json").read_text())
    training = {"steps": last["step"], "seconds": last["seconds"]}
    metrics["generator"] = {**generation["rows"][0], **training, "protocol": generation["protocol"]}
    return metrics


def verdict(ours: dict, baseline: dict) -> str:
    """One sentence on Recon and High, whichever way they came out."""
    parts = []
    for name in ("Recon", "High"):
        ratio = ours["metrics"][name] / baseline["metrics"][name]
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
    """Without the columns that nothing was measured for."""
    measured = [i for i in range(len(headings)) if any(row[i] != "-" for row in rows)]
    headings, rows = [headings[i] for i in measured], [[row[i] for i in measured] for row in rows]
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _tokenizer_table(tokenizers: dict[str, dict], part: str | None = None) -> str:
    rows = []
    for entry in tokenizers.values():
        columns = {name: html.escape(cell) for name, cell in table_row(entry[part] if part else entry).items()}
        rows.append(columns | {"training s": f"{entry['seconds']:.0f}"})
    return _table(list(rows[0]), [list(row.values()) for row in rows])


def _generator_table(generator: dict) -> str:
    protocol = generator["protocol"]
    columns = {"generator": "LightningDiT on favae", "images": f"{protocol['num_images']:,}"}
    columns |= shown_metrics(generator)
    columns |= {"guidance": f"{generator['guidance_scale']}", "Euler steps": str(protocol["num_inference_steps"])}
    columns["training s"] = f"{generator['seconds']:.0f}"
    return _table(list(columns), [list(columns.values())])


def write_report(folder: Path) -> Path:
    """Writes metrics.json and report.html into the folder of a demo; returns the page's path.

    Raises:
        FileNotFoundError: if a step of the chain has not been run.
    """
    metrics = collect(folder)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1))
    tokenizers, generator, protocol = metrics["tokenizers"], metrics["generator"], metrics["protocol"]
    (real,) = generator["protocol"]["reference"].values()
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
{_tokenizer_table(tokenizers)}
<p class="note">{protocol["num_images"]} crops of two photographs at {protocol["resolution"]} px,
posterior {protocol["posterior"]}. Recon, Low, High: mean squared error in [-1, 1] of the image, its LL band,
and the mean of LH, HL and HH; Recon = (Low + 3 High) / 4. LPIPS needs weights from a download, MS-SSIM larger
images. vavae is a stock AutoencoderKL.</p>
<h2>Reconstruction of unseen regions of the trained photographs</h2>
{_tokenizer_table(tokenizers, "validation")}
<h2>The worst images: originals, baseline, FA-VAE, where their high frequencies differ most, errors</h2>
{_image((folder / "reconstruction/comparison.png").read_bytes(), "originals, reconstructions and their errors")}
{_image((folder / "reconstruction/spectra.png").read_bytes(), "power and error per frequency")}
{_image((folder / "reconstruction/latents.png").read_bytes(), "latents' spectra and channel statistics")}
<h2>Training of the tokenizers</h2>
{_curves(logs, terms)}
<h2>Generated images, one row per class</h2>
{_generator_table(generator)}
<p class="note">Against {real["num_images"]:,} training crops; few images and a small network: these numbers
compare runs of this demo, nothing else.</p>
{_image((folder / "generation/samples.png").read_bytes(), "generated images by class")}
<h2>Training of the generator</h2>
{_curves({"generator": (read_log(folder / "generator"), OURS)}, ["velocity", "cosine"])}
</body></html>
"""
    path = folder / "report.html"
    path.write_text(page)
    return path
