"""What experiments/latents.py writes of its rows: the table, correlations, and the sheet of samples."""

import statistics
from pathlib import Path

from scipy.stats import spearmanr

from experiments.report import format_table, rows_by_model, save_samples, with_std
from experiments.training_sets import GLYPHS, PHOTOGRAPHS, PHOTOGRAPHS_128

GLOBAL = "_global"  # ends the names of rows that have the autoencoder of another row
ON_PHOTOGRAPHS = ("stock", "stock_aligned", "stock_mask", "one_trunk", "split", "split_aligned", "ours")
SHOWN = {  # below each other
    "alignment": (GLYPHS, ["stock", "stock_aligned", "split", "split_aligned"]),
    "samples": (
        GLYPHS,
        [
            "stock",
            "stock_shortcut",
            "stock_shortcut_global",
            "stock_half_aligned",
            "stock_shortcut_aligned",
            "stock_overlapping_aligned_global",
            "one_trunk",
            "ours",
        ],
    ),
    "photographs": (PHOTOGRAPHS, [f"photographs_{name}" for name in ON_PHOTOGRAPHS]),
}


def figures(report: dict, stem: Path) -> None:
    """NAME_KIND.png for each of `SHOWN`: samples of one tokenizer's generator below the other's."""
    for kind, (images, names) in SHOWN.items():
        save_samples(stem, names, images.size, stem.with_name(f"{stem.name}_{kind}.png"))


Columns = dict[str, tuple[int, str]]  # decimals, and where a row has it
AUTOENCODERS: Columns = {
    "GFLOP": (2, "gflop"),
    "Recon, a quarter": (5, "curve.0.recon"),
    "Recon": (5, "recon"),
    "Low": (5, "low"),
    "High": (5, "high"),
    "PSNR": (2, "psnr"),
    "seams": (2, "seams"),
    "VIV": (2, "latents.VIV"),
    "SEC 1/4": (2, "latents.SEC 1/4"),
    "LNC": (3, "latents.LNC"),
}
GENERATORS: Columns = {
    "FD, a quarter": (1, "generator.curve.0.unguided.fd"),
    "FD": (1, "generator.unguided.fd"),
    "FD, guided": (1, "generator.guided.fd"),
    "IS, guided": (1, "generator.guided.is"),
    "accuracy": (2, "generator.unguided.accuracy"),
    "guided": (2, "generator.guided.accuracy"),
    "precision": (2, "generator.unguided.precision"),
    "recall": (2, "generator.unguided.recall"),
    "MIND": (1, "generator.unguided.mind"),
    "seams of samples": (2, "generator.unguided.seams"),
}


def tables(report: dict) -> str:
    """For each set, its autoencoders and their generators, and what real pictures reach; what the meters predict."""
    parts = []
    for data in map(str, (GLYPHS, PHOTOGRAPHS, PHOTOGRAPHS_128)):
        own = rows_by_model({"rows": [row for row in report["rows"] if row["data"] == data]})
        if own:
            autoencoders: dict[str, list[dict]] = {}
            for name, rows in own.items():
                autoencoders.setdefault(name.removesuffix(GLOBAL), rows)
            parts += [f"## {data}", table(autoencoders, "autoencoder", AUTOENCODERS)]
            parts.append(table(own, "latents of", GENERATORS))
        real = report.get("real", {}).get(data)
        if real is not None:
            classes = f", IS {real['is']:.1f} and an accuracy of {real['accuracy']:.2f}" if "accuracy" in real else ""
            parts.append(f"As many real pictures that nobody has seen have FD {real['fd']:.1f}{classes}.")
    return "\n\n".join([*parts, correlations(report)])


def table(rows: dict[str, list[dict]], head: str, columns: Columns) -> str:
    """Means over seeds, without the columns that no row has, and how many of the trainings reached a plateau."""
    found = {
        column: [_cell(own, place, digits) for own in rows.values()] for column, (digits, place) in columns.items()
    }
    found = {column: cells for column, cells in found.items() if any(cells)}
    found["plateaus"] = [
        str(sum((row["generator"] if columns is GENERATORS else row)["plateau"] for row in own))
        for own in rows.values()
    ]
    names = [[f"`{name}`", len(own)] for name, own in rows.items()]
    lines = [[*name, *cells] for name, cells in zip(names, zip(*found.values()))]
    return format_table([head, "seeds", *found], lines)


def _cell(rows: list[dict], place: str, digits: int) -> str:
    """The mean of a value over seeds; nothing where rows do not have it."""
    values = _values(rows, place)
    return "" if None in values else with_std(values, digits)


def _values(rows: list[dict], place: str) -> list:
    values: list = rows
    for key in place.split("."):
        values = [value[int(key)] if isinstance(value, list) else (value or {}).get(key) for value in values]
    return values


def correlations(report: dict) -> str:
    """Spearman's rank correlation of each meter with the FD of samples, over means of autoencoders of glyphs at f8.

    Latents are normalized per channel, as those are that the meters see.
    """
    rows = [row for row in report["rows"] if row["f"] == 8 and row["data"] == str(GLYPHS)]
    models = rows_by_model({"rows": [row for row in rows if not row["model"].endswith(GLOBAL)]})
    if len(models) < 4:
        return ""
    meters = {name: f"latents.{name}" for name in ("VIV", "rho", "phi", "SEC 1/4", "SEC 1/2", "LNC")}
    meters |= {"Recon": "recon", "seams": "seams", "FD of reconstructions": "reconstructions.fd"}
    lines = []
    for kind in ("unguided", "guided"):
        distances = _means(models, f"generator.{kind}.fd")
        found = [f"{name} {spearmanr(_means(models, at), distances).statistic:+.2f}" for name, at in meters.items()]
        lines.append(f"with the FD of {kind} samples: {', '.join(found)}")
    return f"Rank correlation over {len(models)} autoencoders of glyphs at f8, {'; '.join(lines)}."


def _means(models: dict[str, list[dict]], place: str) -> list[float]:
    return [statistics.mean(_values(rows, place)) for rows in models.values()]
