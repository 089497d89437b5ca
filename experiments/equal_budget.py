#!/usr/bin/env python
"""Tokenizers of one latent size, compared: is it the split, the shortcut, the loss, the parameters, or the compute?

    python -m experiments.equal_budget      (17 rows of 3 seeds, 2,000 steps at 64 px: about 4 hours on 2 CPU cores)
    python -m experiments.equal_budget --models stock quality --seeds 0 --steps 400 --output quick.json
    python -m experiments.equal_budget --resolution 128 --steps 40000 --batch-size 16 --output gpu.json   (on a GPU)

Every model gets 1,024 floats per image, the same images, steps, seeds, optimizer and losses (L2 + 1e-6 KL), unless its
note says otherwise. The controls answer one question each: `stock_wide` has our parameters, `stock_shortcut` our
shortcut, `stock_band` our loss, `one_trunk` our wavelet bands in one network. `published` is the two-branch model.
Errors are measured on crops of two photographs that are never trained on; "validation" is unseen regions of the
trained ones, "test" three other photographs.
Writes docs/results/equal_budget.json, .md and figures. The rows there were trained at several commits, each by this
command with the names of its rows.
"""

from pathlib import Path

from experiments.report import full_table, save_curves, save_spectra, save_strips, short_table
from experiments.rows import Comparison, main
from experiments.tokenizers import Variant, compare_speed, load_photos, make_row, mean_errors

CONTROL = "experiments.controls.ControlAutoencoder"

PLAIN = {
    "name": "AutoencoderKL",
    "down_block_types": ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"],
    "up_block_types": ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [32, 32, 64, 128],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 16,
    "sample_size": 64,
}
SPLIT = {
    "name": "AutoencoderKLFA",
    "block_out_channels": [32, 40, 80, 144],
    "high_block_out_channels": [24, 48, 64],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 16,
    "high_latent_channels": 3,
    "shortcut": None,
    "sample_size": 64,
}
QUALITY = {**SPLIT, "shortcut": "patches"}
FAST = {**QUALITY, "block_out_channels": [32, 24, 56, 104], "high_block_out_channels": [16, 32, 48]}
HIGH_BAND_LOSS = {"band": {"weight": 0.5, "weights": [0, 1, 1, 1]}}  # L1 of LH, HL and HH

VARIANTS = {
    "stock": Variant(PLAIN, "a plain `AutoencoderKL` of VA-VAE's shape"),
    "stock_band": Variant(PLAIN, "the same, with our loss on the high bands", loss=HIGH_BAND_LOSS),
    "stock_wide": Variant({**PLAIN, "block_out_channels": [40, 40, 80, 152]}, "the same, at our parameter count"),
    "stock_shortcut": Variant({"name": CONTROL, "shortcut": True}, "the same, with our linear shortcut"),
    "one_trunk": Variant(
        {"name": CONTROL, "wavelet": True, "block_out_channels": [32, 56, 88, 144]},
        "one plain trunk on the 12 wavelet channels, equal FLOPs",
    ),
    "published": Variant(
        {
            "name": "TwoBranchAutoencoderKL",
            "block_out_channels": [32, 32, 64, 128],
            "high_block_out_channels": [32, 64, 128],
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "latent_channels": 16,
            "high_latent_channels": 8,
            "sample_size": 64,
        },
        "the published two branches, upsampled and independent, in the same 16 channels (8 + 8), 1.6 times the FLOPs",
    ),
    "split": Variant(SPLIT, "ours without shortcut and band loss: wide low branch, narrow high branch, 13 + 3"),
    "quality": Variant(QUALITY, "ours: split, shortcut, and the loss on the high bands", loss=HIGH_BAND_LOSS),
    "overlapping": Variant(
        {**QUALITY, "shortcut": "overlapping"},
        "as `quality`, with a shortcut that decodes each patch together with its neighbors",
        loss=HIGH_BAND_LOSS,
    ),
    "fast": Variant(FAST, "ours at half the FLOPs", loss=HIGH_BAND_LOSS),
    "no_band": Variant(QUALITY, "ours without the loss on the high bands, as all rows below"),
    "channels_14_2": Variant({**QUALITY, "high_latent_channels": 2}, "14 + 2 channels (28:4 of 32)"),
    "channels_12_4": Variant({**QUALITY, "high_latent_channels": 4}, "12 + 4 channels (24:8 of 32)"),
    "channels_8_8": Variant({**QUALITY, "high_latent_channels": 8}, "8 + 8 channels (16:16 of 32)"),
    "compute_even": Variant(
        {**QUALITY, "block_out_channels": [32, 32, 64, 112], "high_block_out_channels": [32, 64, 112]},
        "the two branches equally wide",
    ),
    "compute_low": Variant(
        {**QUALITY, "block_out_channels": [32, 48, 88, 160], "high_block_out_channels": [16, 24, 32]},
        "nearly all compute in the low branch",
    ),
    "two_levels": Variant(
        {
            **QUALITY,
            "wavelet_levels": 2,
            "block_out_channels": [32, 32, 96, 160],
            "high_block_out_channels": [72, 96],
        },
        "two levels of the transform",
    ),
}

IN_FIGURES = ["stock", "stock_shortcut", "published", "split", "quality", "overlapping", "fast"]


def finish(report: dict, stem: Path) -> None:
    """Adds the speed of the models there are, and what the shortcut alone reaches before any training."""
    names = {row["model"] for row in report["rows"]} | {"stock"}
    present = {name: variant for name, variant in VARIANTS.items() if name in names}
    report["speed"] = compare_speed(present, "stock", report["resolution"])
    images = load_photos("heldout", report["resolution"])
    report["linear"] = {
        shortcut: mean_errors(Variant({**QUALITY, "shortcut": shortcut}, "").build().eval(), images)
        for shortcut in ("patches", "overlapping")
    }


def tables(report: dict) -> str:
    untrained = [
        f"`{shortcut}` Recon {errors['recon']:.4f}, Low {errors['low']:.4f}, High {errors['high']:.5f}"
        for shortcut, errors in report.get("linear", {}).items()
    ]
    sections = [
        short_table(report, list(VARIANTS), "stock"),
        f"The shortcut alone, untrained: {'; '.join(untrained)}.",
        "All columns, with standard deviations over seeds:",
        full_table(report, list(VARIANTS), "stock"),
    ]
    return "\n\n".join(sections)


def figures(report: dict, stem: Path) -> None:
    save_curves(report, IN_FIGURES, Path(f"{stem}_curves.png"))
    save_spectra(report, IN_FIGURES, Path(f"{stem}_spectra.png"))
    save_strips(stem, IN_FIGURES, Path(f"{stem}_reconstructions.png"))


COMPARISON = Comparison(
    name="equal_budget",
    variants=VARIANTS,
    make_row=make_row,
    tables=tables,
    steps=2_000,
    seeds=3,
    finish=finish,
    figures=figures,
    other_sizes=True,
)

if __name__ == "__main__":
    main(COMPARISON, __doc__)
