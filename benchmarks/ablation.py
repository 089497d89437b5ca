#!/usr/bin/env python
"""Each loss and module of ours on or off, from the default; and the ladder of the CVPR paper on codebook models.

    python benchmarks/ablation.py                   (photographs at 64 px, 400 steps, 2 seeds: an hour on a CPU)

"base" is `no_band` of equal_budget.py; every other row changes the one thing its name says. The rows `vq_...` are a
VQModelFA (f8, 256 codes, three times the steps), from no frequency loss to the dynamic spectrum loss with each kind of
complement. Data, optimiser and measures as in equal_budget.py. Writes docs/results/ablation.json and the table in
docs/results.md.
"""

from pathlib import Path

from equal_budget import BAND, QUALITY, SPLIT
from tokenizer_report import table, write_section
from tokenizer_runs import ROOT, Experiment, main, throughput

OUTPUT = ROOT / "docs/results/ablation.json"

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


def ours(note: str, model: dict | None = None, **loss) -> Experiment:
    return Experiment({**QUALITY, **(model or {})}, note, loss)


def codebook(note: str, kind: str | None, **loss) -> Experiment:
    return Experiment({**CODEBOOK, "frequency_complement": kind}, note, loss, length=3)  # they begin as noise


def spectrum(kind: str, **settings) -> dict:
    return {"spectrum": {"weight": 0.01, "kind": kind, **settings}, **FOCAL}


EXPERIMENTS = {
    "base": ours("the default"),
    "no_shortcut": Experiment(SPLIT, "without the linear shortcut"),
    "independent": ours("the high decoder reads the high latents only", {"high_decoder_input": "high"}),
    "equal_scales": ours("both band groups divided by 2, as published", {"band_scales": [2.0, 2.0]}),
    "db2": ours("wavelet db2", {"wavelet": "db2"}),
    "bior4.4": ours("wavelet bior4.4", {"wavelet": "bior4.4"}),
    "l1": ours("L1 in place of L2", reconstruction="l1"),
    "ssim": ours("+ 0.1 (1 - SSIM)", ssim=0.1),
    "focal": ours("+ focal frequency loss", **FOCAL),
    "band": ours("+ 0.1 band loss", band={"weight": 0.1}),
    "band_high": ours("+ 0.5 band loss of LH, HL and HH only", **BAND),
    "stft": ours("+ 0.1 STFT loss", stft={"weight": 0.1}),
    "stft_paper": ours("+ 0.01 STFT loss, phase as printed", stft={"weight": 0.01, "phase": "paper"}),
    "alignment": ours("+ 0.05 alignment to EfficientNet-Lite0", alignment=ALIGNMENT),
    "adversary": ours("+ PatchGAN in the second half", adversarial={"weight": 0.05, "start_step": 200, "channels": 32}),
    "complement_conv": ours("+ complements, no loss on them", {"frequency_complement": "conv"}),
    "spectrum_conv": ours(
        "+ complements, focal and 0.01 dynamic spectrum loss", {"frequency_complement": "conv"}, **spectrum("dynamic")
    ),
    "spectrum_res": ours("the same, `res` complements", {"frequency_complement": "res"}, **spectrum("dynamic")),
    "spectrum_attn": ours("the same, `attn` complements", {"frequency_complement": "attn"}, **spectrum("dynamic")),
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


def finish(report: dict, output: Path) -> None:
    there = {row["model"] for row in report["rows"]} | {"base"}
    report["throughput"] = throughput({name: EXPERIMENTS[name] for name in EXPERIMENTS if name in there}, "base")
    ladder = [name for name in EXPERIMENTS if name.startswith("vq")]
    rest = [name for name in EXPERIMENTS if name not in ladder]
    tables = [table(report, rest, "base"), table(report, ladder, "vq")]
    print("\n\n".join(tables))
    if output == OUTPUT:
        notes = "\n".join(f"- `{name}`: {experiment.note}" for name, experiment in EXPERIMENTS.items())
        write_section("ablation", "\n\n".join([*tables, notes]))


if __name__ == "__main__":
    main(__doc__, EXPERIMENTS, OUTPUT, finish, steps=400, seeds=2, pictures=False)
