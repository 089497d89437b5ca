"""The page of a demo, for `favae report`: pictures first, then tables, then how training went.

Whatever is in the folder already is shown: training runs (subfolders with a metrics.jsonl) and evaluations (subfolders
with a results.json).
"""

import base64
import html
import io
import itertools
import json
from pathlib import Path

from matplotlib.figure import Figure

from favae.errors import DataError
from favae.eval.autoencoder_evaluation import table_row
from favae.eval.figures import INK, MUTED
from favae.eval.results import read_results, shown_metrics
from favae.files import read_json_lines, write_text

COLORS = ("#1f5fa8", "#b5651d", "#3a7d44", "#7a4b94")  # of runs in a figure
TERMS = ("reconstruction", "alignment", "kl", "adversarial", "discriminator", "velocity", "cosine")  # of losses shown

NOTE = (
    "This page shows what each step of the chain writes. It does not show which tokenizer is better: a plain "
    "autoencoder has learned next to nothing after so few steps, and FA-VAE begins as a linear codec."
)
STYLE = f"""
body {{ font: 15px/1.5 system-ui, sans-serif; color: {INK}; max-width: 1240px; margin: 2em auto; padding: 0 1em; }}
h1 {{ font-size: 1.5em }} h2 {{ font-size: 1.15em; margin-top: 2em }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto }}
th, td {{ padding: .3em .6em; font-size: 14px; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }}
th:first-child, td:first-child {{ text-align: left }}
img {{ max-width: 100%; }} p.note {{ color: {MUTED}; }}
"""


def write_report(folder: Path) -> Path:
    """Writes report.html, one page with everything inside, and metrics.json with the numbers; returns the page's path.

    Raises:
        DataError: if there is nothing to show.
    """
    logs = {file.parent.name: read_json_lines(file) for file in sorted(folder.glob("*/metrics.jsonl"))}
    logs = {name: records for name, records in logs.items() if records}
    results = {file.parent.name: read_results(file) for file in sorted(folder.glob("*/results.json"))}
    if not logs and not results:
        raise DataError(f"{folder} holds neither training runs nor evaluations")
    reconstructions = {name: result for name, result in results.items() if result["task"] == "reconstruction"}
    generations = {name: result for name, result in results.items() if result["task"] == "generation"}

    # Pictures, the most telling first.
    parts = [
        f'<p class="note">{NOTE}</p>\n',
        _pictures("Reconstruction: the worst images", folder, reconstructions, "comparison.png"),
    ]
    parts += [_pictures("Generated images", folder, generations, "samples*.png")]

    # Numbers.
    for evaluations, section in ((reconstructions, _reconstruction_section), (generations, _generation_section)):
        for name, result in evaluations.items():
            try:
                parts.append(section(name, result, logs))
            except (KeyError, TypeError, IndexError) as error:
                raise DataError(
                    f"{folder / name / 'results.json'} is damaged, or of another version ({error!r})"
                ) from error

    # What lies behind them.
    parts += [_pictures("Power and error per frequency", folder, reconstructions, "spectra.png")]
    parts += [_pictures("Latents", folder, reconstructions, "latents.png")]
    parts += _training_sections(folder, logs)

    training = {name: {key: records[-1].get(key) for key in ("step", "seconds")} for name, records in logs.items()}
    write_text(folder / "metrics.json", json.dumps({"training": training, "evaluations": results}, indent=1))
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>favae demo</title><style>{STYLE}</style></head><body>\n"
        f"<h1>favae demo</h1>\n{''.join(parts)}\n</body></html>\n"
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


def verdict(ours: dict, baseline: dict) -> str:
    """One sentence on Recon and High of two rows of a reconstruction result, whichever way they came out."""
    parts = []
    for name in ("Recon", "High"):
        ratio = ours["metrics"][name] / baseline["metrics"][name]
        parts.append(f"{name} is {ratio:.2f} times {baseline['model']}'s ({'lower' if ratio < 1 else 'NOT lower'})")
    flops = ours["flops"] / baseline["flops"] - 1
    return (
        f"{ours['model']}'s {' and its '.join(parts)}, at {ours['floats_per_image']:,} floats per image against "
        f"{baseline['floats_per_image']:,} and {flops:+.1%} FLOPs."
    )


# ----------------------------------------------------------------------------------------------------------------------
# Sections


def _pictures(title: str, folder: Path, evaluations: dict[str, dict], pattern: str) -> str:
    """The pictures of this name in the folders of evaluations, below a title."""
    files = [file for name in evaluations for file in sorted((folder / name).glob(pattern))]
    if not files:
        return ""
    return f"<h2>{title}</h2>\n" + "\n".join(
        _image(file.read_bytes(), f"{file.parent.name}: {title}") for file in files
    )


def _reconstruction_section(name: str, result: dict, logs: dict[str, list[dict]]) -> str:
    rows, protocol = result["rows"], result["protocol"]
    cells = [{**table_row(row), **_training_columns(row["model"], logs)} for row in rows]
    note = (
        f"{protocol['num_images']} images of {protocol['data_name']} at {protocol['resolution']} px. Recon, Low, High: "
        "mean squared error in [-1, 1] of the image, of its LL band, and the mean of LH, HL and HH; "
        "Recon = (Low + 3 High) / 4."
    )
    summary = f"<p>{html.escape(verdict(rows[1], rows[0]))}</p>\n" if _comparable(rows) else ""
    return f'<h2>Metrics: {html.escape(name)}</h2>\n{summary}{_table(cells)}\n<p class="note">{html.escape(note)}</p>\n'


def _comparable(rows: list[dict]) -> bool:
    return len(rows) == 2 and all(row.get("floats_per_image") for row in rows)


def _generation_section(name: str, result: dict, logs: dict[str, list[dict]]) -> str:
    cells = []
    for row in result["rows"]:
        path = Path(row["model"])
        run = path.parent.name if path.name == "final" else path.name
        guidance = {"guidance": f"{row['guidance_scale']}"} if "guidance_scale" in row else {}
        cells.append({"pipeline": run, **shown_metrics(row), **guidance, **_training_columns(run, logs)})
    protocol = result["protocol"]
    note = (
        f"{protocol['num_images']:,} images, {protocol['num_inference_steps']} steps, against "
        f"{protocol['reference_name']}. Few images and a small network: these numbers compare runs of this demo, "
        "nothing else."
    )
    return f'<h2>Metrics: {html.escape(name)}</h2>\n{_table(cells)}\n<p class="note">{html.escape(note)}</p>\n'


def _training_columns(run: str, logs: dict[str, list[dict]]) -> dict[str, str]:
    if run not in logs:
        return {"steps": "-", "training s": "-"}
    last = logs[run][-1]
    return {"steps": f"{last['step']:,}", "training s": f"{last.get('seconds', 0):.0f}"}


def _training_sections(folder: Path, logs: dict[str, list[dict]]) -> list[str]:
    """The newest samples of each run, and the losses of runs that have the same terms in one figure."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, records in logs.items():
        groups.setdefault(tuple(term for term in TERMS if term in records[-1]), []).append(name)
    sections = []
    for terms, names in groups.items():
        section = f"<h2>Training: {html.escape(', '.join(names))}</h2>\n"
        for name in names:
            samples = sorted((folder / name / "samples").glob("*.png"))[-1:]
            section += "".join(
                f"<p>{html.escape(name)}, {file.stem}</p>\n{_image(file.read_bytes(), f'{name}: {file.stem}')}\n"
                for file in samples
            )
        if terms:
            section += _curves({name: logs[name] for name in names}, terms)
        sections.append(section)
    return sections


def _curves(logs: dict[str, list[dict]], terms: tuple[str, ...]) -> str:
    """Loss terms against steps, one panel per term, one line per run; as an <img>."""
    figure = Figure(figsize=(3.2 * len(terms), 2.6))
    axes = figure.subplots(1, len(terms), squeeze=False)
    for axis, term in zip(axes[0], terms):
        for (name, records), color in zip(logs.items(), itertools.cycle(COLORS)):
            points = [(record["step"], record[term]) for record in records if term in record]
            if points:
                axis.plot(*zip(*points), label=name, color=color, linewidth=1.3)
        axis.set_title(term, fontsize=10, color=INK)
        axis.set_xlabel("step", fontsize=8, color=MUTED)
        axis.tick_params(labelsize=8, colors=MUTED)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return _image(buffer.getvalue(), "loss curves")


def _image(data: bytes, alternative: str) -> str:
    encoded = base64.b64encode(data).decode()
    return f'<img src="data:image/png;base64,{encoded}" alt="{html.escape(alternative)}">'


def _table(rows: list[dict[str, str]]) -> str:
    """Without the columns that nothing was measured for."""
    headings = [heading for heading in rows[0] if any(row[heading] != "-" for row in rows)]
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    lines = ("".join(f"<td>{html.escape(row[heading])}</td>" for heading in headings) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
