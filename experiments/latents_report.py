"""What experiments/latents.py writes of its rows: the table, correlations, and the sheet of samples."""

from pathlib import Path

from PIL import Image
from scipy.stats import spearmanr

from experiments.report import format_table, rows_by_model, with_std
from experiments.training_sets import GLYPHS, PHOTOGRAPHS

SHOWN = {  # below each other
    "alignment": (GLYPHS, ["stock", "stock_aligned", "split", "split_aligned"]),
    "samples": (GLYPHS, ["stock", "stock_spectrum", "one_trunk", "ours"]),
    "photographs": (
        PHOTOGRAPHS,
        [f"photographs_{name}" for name in ("stock", "stock_aligned", "one_trunk", "split", "split_aligned", "ours")],
    ),
}


def figures(report: dict, stem: Path) -> None:
    """NAME_KIND.png for each of `SHOWN`: samples of one tokenizer's generator below the other's, magnified."""
    for kind, (images, names) in SHOWN.items():
        strips = [Image.open(stem / f"{name}.png") for name in names if (stem / f"{name}.png").exists()]
        if strips:
            size, columns = images.size, 768 // images.size
            width, height = columns * (size + 1) + 1, columns // 6 * (size + 1) + 1
            sheet = Image.new("RGB", (width, len(strips) * (height + 8) - 8), "white")
            for number, strip in enumerate(strips):
                sheet.paste(strip.crop((0, 0, width, height)), (0, number * (height + 8)))
            sheet = sheet.resize((2 * width, 2 * sheet.height), Image.Resampling.NEAREST)
            sheet.save(stem.with_name(f"{stem.name}_{kind}.png"))


COLUMNS: dict[str, tuple[int, str]] = {  # decimals, and where a row has it
    "Recon": (5, "recon"),
    "High": (5, "high"),
    "PSNR": (2, "psnr"),
    "VIV": (3, "latents.VIV"),
    "SEC 1/4": (3, "latents.SEC 1/4"),
    "LNC": (3, "latents.LNC"),
    "seams": (3, "seams"),
    "FD of samples": (2, "generator.unguided.fd"),
    "guided": (2, "generator.guided.fd"),
    "IS, guided": (1, "generator.guided.is"),
    "accuracy": (3, "generator.unguided.accuracy"),
    "precision": (2, "generator.unguided.precision"),
    "recall": (2, "generator.unguided.recall"),
    "seams of samples": (3, "generator.unguided.seams"),
}


def tables(report: dict, names: list[str]) -> str:
    """The rows of these tokenizers, what real pictures reach, and what the meters predict."""
    rows, lines = rows_by_model(report), []
    for name in (name for name in names if name in rows):
        own = rows[name]
        plateaus = [sum(row["plateau"] for row in own), sum(row["generator"]["plateau"] for row in own)]
        cells = [_cell(own, place, digits) for digits, place in COLUMNS.values()]
        shape = [f"`{name}`", len(own), own[0]["f"], f"{own[0]['gflop']:.2f}"]
        lines.append([*shape, *cells, f"{plateaus[0]}, {plateaus[1]}"])
    floors = [
        f"Real {name} that nobody has seen have FD {real['fd']:.2f}"
        + (f", IS {real['is']:.1f} and an accuracy of {real['accuracy']:.3f}." if "accuracy" in real else ".")
        for name, real in report["real"].items()
    ]
    table = format_table(["tokenizer", "seeds", "f", "GFLOP", *COLUMNS, "plateaus"], lines)
    return "\n\n".join([table, " ".join(floors), correlations(report)])


def _cell(rows: list[dict], place: str, digits: int) -> str:
    """The mean of a value over seeds; nothing where rows do not have it."""
    values: list = rows
    for key in place.split("."):
        values = [(value or {}).get(key) for value in values]
    return "" if None in values else with_std(values, digits)


def correlations(report: dict) -> str:
    """Spearman's rank correlation of each meter with the FD of samples, over the rows of glyphs at f8."""
    rows = [row for row in report["rows"] if row["f"] == 8 and row["data"] == str(GLYPHS)]
    if len(rows) < 4:
        return ""
    distances = [row["generator"]["unguided"]["fd"] for row in rows]
    meters = {name: [row["latents"][name] for row in rows] for name in ("VIV", "rho", "phi", "SEC 1/4", "LNC")}
    meters |= {
        "Recon": [row["recon"] for row in rows],
        "FD of reconstructions": [r["reconstructions"]["fd"] for r in rows],
    }
    found = [f"{name} {spearmanr(values, distances).statistic:+.2f}" for name, values in meters.items()]
    return f"Rank correlation with the FD of samples, {len(rows)} rows of glyphs at f8: {', '.join(found)}."
