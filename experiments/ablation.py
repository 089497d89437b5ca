#!/usr/bin/env python
"""What does each loss and module bring? Each on or off, from the default; and the steps of the CVPR paper on codebooks.

    python -m experiments.ablation                  (400 steps at 64 px, 2 seeds: about 4 hours on 2 CPU cores)
    python -m experiments.ablation --seeds 0        (what made docs/results/ablation.json)

The control is `base`, which is `no_band` of experiments/equal_budget.py; every other row changes the one thing that its
name says. The rows `vq_...` are a VQModelFA (f8, 256 codes, three times the steps), from no frequency loss to the
dynamic spectrum loss with each type of complement; their control is `vq`. Data, optimizer and metrics are those of
equal_budget. Writes docs/results/ablation.json and .md.
"""

from pathlib import Path

from experiments.equal_budget import HIGH_BAND_LOSS, QUALITY, SPLIT
from experiments.report import full_table, short_table
from experiments.rows import Comparison, main
from experiments.tokenizers import Variant, compare_speed, make_row

CODEBOOK = {
    "name": "VQModelFA",
    "block_out_channels": [32, 32, 64, 128],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 32,
    "codebook_size": 256,
    "frequency_complement": None,
    "sample_size": 64,
}
ALIGNMENT = {"weight": 0.05, "backbone": "efficientnet-lite0", "adaptive": False}
FOCAL = {"focal_frequency": {"weight": 1.0}}


def ours(note: str, model: dict | None = None, **loss) -> Variant:
    """`base` with another model or loss."""
    return Variant({**QUALITY, **(model or {})}, note, loss)


def codebook(note: str, complement: str | None, **loss) -> Variant:
    """A VQModelFA. Three times the steps, since it starts from noise: it has no linear shortcut."""
    return Variant({**CODEBOOK, "frequency_complement": complement}, note, loss, length=3)


def spectrum(type: str, **settings) -> dict:
    """The spectrum loss of the complements with the focal frequency loss of the image."""
    return {"spectrum": {"weight": 0.01, "type": type, **settings}, **FOCAL}


VARIANTS = {
    "base": ours("the default"),
    "no_shortcut": Variant(SPLIT, "without the linear shortcut"),
    "db2": ours("wavelet db2", {"wavelet": "db2"}),
    "bior4.4": ours("wavelet bior4.4", {"wavelet": "bior4.4"}),
    "l1": ours("L1 in place of L2", reconstruction="l1"),
    "ssim": ours("+ 0.1 (1 - SSIM)", ssim=0.1),
    "focal": ours("+ focal frequency loss", **FOCAL),
    "band": ours("+ 0.1 band loss", band={"weight": 0.1}),
    "band_high": ours("+ 0.5 band loss of LH, HL and HH only", **HIGH_BAND_LOSS),
    "stft": ours("+ 0.1 STFT loss", stft={"weight": 0.1}),
    "stft_paper": ours("+ 0.01 STFT loss, phase as printed", stft={"weight": 0.01, "phase": "paper"}),
    "alignment": ours("+ 0.05 alignment to EfficientNet-Lite0", alignment=ALIGNMENT),
    "adversary": ours("+ PatchGAN in the second half", adversarial={"weight": 0.05, "start_step": 200, "channels": 32}),
    "scale_equivariance": ours("+ 0.25 scale equivariance", scale_equivariance=0.25),
    "latent_noise": ours("+ latent noise, tau 0.1", latent_noise=0.1),
    "high_dropout": ours("+ high latents dropped in a tenth of the images", high_dropout=0.1),
    "vq": codebook("no complements, no frequency loss", None),
    "vq_complement": codebook("`conv` complements, no frequency loss", "conv"),
    "vq_focal": codebook("+ focal frequency loss of the image", "conv", **FOCAL),
    "vq_focal_all": codebook("+ of the image and at all levels", "conv", **spectrum("none")),
    "vq_spectrum": codebook("+ fixed spectrum loss (sigma 3)", "conv", **spectrum("fixed")),
    "vq_dynamic_conv": codebook("+ dynamic spectrum loss", "conv", **spectrum("dynamic")),
    "vq_dynamic_res": codebook("the same, `res` complements", "res", **spectrum("dynamic")),
    "vq_dynamic_attn": codebook("the same, `attn` complements", "attn", **spectrum("dynamic")),
    "vq_dynamic_published": codebook(
        "the same, as published: 5 x 5 kernels, not normalized, sigmas at 2e-7",
        "conv",
        **spectrum("dynamic", kernel_size=5, normalize=False, learning_rate=2e-7),
    ),
}


def finish(report: dict, stem: Path) -> None:
    """Adds the speed of the models there are."""
    names = {row["model"] for row in report["rows"]} | {"base"}
    present = {name: variant for name, variant in VARIANTS.items() if name in names}
    report["speed"] = compare_speed(present, "base", report["resolution"])


def tables(report: dict) -> str:
    codebooks = [name for name in VARIANTS if name.startswith("vq")]
    others = [name for name in VARIANTS if name not in codebooks]
    sections = [
        short_table(report, others, "base"),
        short_table(report, codebooks, "vq"),
        "All columns:",
        full_table(report, others, "base"),
        full_table(report, codebooks, "vq"),
    ]
    return "\n\n".join(sections)


COMPARISON = Comparison(
    name="ablation",
    variants=VARIANTS,
    make_row=make_row,
    tables=tables,
    steps=400,
    seeds=2,
    finish=finish,
    pictures=False,
    other_sizes=True,
)

if __name__ == "__main__":
    main(COMPARISON, __doc__)
