#!/usr/bin/env python
"""Tokenizers of one latent size, compared: is it the split, the shortcut, the loss, the parameters, or the compute?

    python benchmarks/equal_budget.py          (photographs at 64 px, 2,000 steps, 3 seeds: hours on a CPU)
    python benchmarks/equal_budget.py --models stock quality --seeds 0 --steps 400 --output quick.json
    python benchmarks/equal_budget.py --resolution 128 --steps 40000 --batch-size 16 --output gpu.json      (a GPU)

Every model gets 1,024 floats per image, the same images, steps, seeds, optimiser and losses (L2 + 1e-6 KL) unless its
note says otherwise. Measured on crops of two photographs that are never trained on; "validation" is unseen regions of
the trained ones. Writes docs/results/equal_budget.json and the figures and the table of docs/results.md beside it.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import Decoder, Encoder
from tokenizer_report import MEASURES, save_curves, save_spectra, save_strips, table, write_section
from tokenizer_runs import ROOT, Experiment, errors, main, throughput
from torch import Tensor, nn

from favae.models.linear_shortcut import LatentsToPatches, PatchesToLatents, start_linear
from favae.training.models import build_model
from favae.wavelets import WaveletBands


class ControlEncoder(nn.Module):
    def __init__(self, network: Encoder, bands: WaveletBands | None, shortcut: PatchesToLatents | None):
        super().__init__()
        self.network, self.bands, self.shortcut = network, bands, shortcut

    def forward(self, images: Tensor) -> Tensor:
        moments = self.network(images if self.bands is None else torch.cat(self.bands(images), dim=1))
        if self.shortcut is None:
            return moments
        mean, logvar = moments.chunk(2, dim=1)
        return torch.cat([mean + self.shortcut(images), logvar], dim=1)


class ControlDecoder(nn.Module):
    def __init__(self, network: Decoder, bands: WaveletBands | None, shortcut: LatentsToPatches | None):
        super().__init__()
        self.network, self.bands, self.shortcut = network, bands, shortcut

    def forward(self, latents: Tensor) -> Tensor:
        images = self.network(latents)
        if self.bands is not None:
            images = self.bands.inverse(images[:, :3], images[:, 3:])
        return images if self.shortcut is None else images + self.shortcut(latents)


class Control(AutoencoderKL):
    """A plain autoencoder with one of our ideas: the wavelet's channels for one trunk, or the linear shortcut."""

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        block_out_channels: tuple[int, ...] = (32, 32, 64, 128),
        latent_channels: int = 16,
        wavelet: bool = False,
        shortcut: bool = False,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
    ):
        ModelMixin.__init__(self)
        channels = in_channels * 4 if wavelet else in_channels
        widths = block_out_channels[1:] if wavelet else block_out_channels
        stride = 2 ** (len(block_out_channels) - 1)
        common = {"layers_per_block": 1, "norm_num_groups": 8}
        down = ("DownEncoderBlock2D",) * (len(widths) - 1) + ("AttnDownEncoderBlock2D",)
        up = ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * (len(widths) - 1)
        bands = WaveletBands("haar", 1, 2.0, 0.5) if wavelet else None
        self.encoder = ControlEncoder(
            Encoder(channels, latent_channels, down, widths, **common),
            bands,
            PatchesToLatents(in_channels, latent_channels, stride) if shortcut else None,
        )
        self.decoder = ControlDecoder(
            Decoder(latent_channels, channels, up, widths, **common),
            bands,
            LatentsToPatches(latent_channels, in_channels, stride, overlapping=False) if shortcut else None,
        )
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        if shortcut:
            start_linear(self, [self.encoder.network], [self.decoder.network])
        self.use_slicing = self.use_tiling = False


OUTPUT = ROOT / "docs/results/equal_budget.json"

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
BAND = {"band": {"weight": 0.5, "weights": [0, 1, 1, 1]}}  # an L1 of LH, HL and HH

EXPERIMENTS = {
    "stock": Experiment(PLAIN, "a plain `AutoencoderKL` of VA-VAE's shape"),
    "stock_band": Experiment(PLAIN, "the same, with our loss on the high bands", loss=BAND),
    "stock_wide": Experiment({**PLAIN, "block_out_channels": [40, 40, 80, 152]}, "the same, at our parameter count"),
    "stock_shortcut": Experiment(
        {"name": "equal_budget.Control", "shortcut": True}, "the same, with our linear shortcut"
    ),
    "one_trunk": Experiment(
        {"name": "equal_budget.Control", "wavelet": True, "block_out_channels": [32, 56, 88, 144]},
        "one plain trunk on the 12 wavelet channels, equal FLOPs",
    ),
    "published": Experiment(
        {
            **SPLIT,
            "block_out_channels": [32, 32, 64, 128],
            "high_block_out_channels": [32, 64, 128],
            "high_latent_channels": 8,
            "attention": True,
            "low_branch": "upsampled",
            "high_decoder_input": "high",
            "band_scales": [2.0, 2.0],
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
        "the published two branches, upsampled and independent, in the same 16 channels (8 + 8), 1.6 times the FLOPs",
    ),
    "split": Experiment(SPLIT, "ours without shortcut and band loss: wide low branch, narrow high branch, 13 + 3"),
    "quality": Experiment(QUALITY, "ours: split, shortcut, and the loss on the high bands", loss=BAND),
    "overlapping": Experiment(
        {**QUALITY, "shortcut": "overlapping"},
        "as `quality`, with a shortcut that decodes each patch together with its neighbours: the recipes' default",
        loss=BAND,
    ),
    "fast": Experiment(FAST, "ours at half the FLOPs", loss=BAND),
    "no_band": Experiment(QUALITY, "ours without the loss on the high bands, as all rows below"),
    "channels_14_2": Experiment({**QUALITY, "high_latent_channels": 2}, "14 + 2 channels (28:4 of 32)"),
    "channels_12_4": Experiment({**QUALITY, "high_latent_channels": 4}, "12 + 4 channels (24:8 of 32)"),
    "channels_8_8": Experiment({**QUALITY, "high_latent_channels": 8}, "8 + 8 channels (16:16 of 32)"),
    "compute_even": Experiment(
        {**QUALITY, "block_out_channels": [32, 32, 64, 112], "high_block_out_channels": [32, 64, 112]},
        "the two branches equally wide",
    ),
    "compute_low": Experiment(
        {**QUALITY, "block_out_channels": [32, 48, 88, 160], "high_block_out_channels": [16, 24, 32]},
        "nearly all compute in the low branch",
    ),
    "two_levels": Experiment(
        {
            **QUALITY,
            "wavelet_levels": 2,
            "block_out_channels": [32, 32, 96, 160],
            "high_block_out_channels": [72, 96],
        },
        "two levels of the transform",
    ),
}


SHOWN = ["stock", "stock_shortcut", "published", "split", "quality", "overlapping", "fast"]  # in the figures


def finish(report: dict, output: Path) -> None:
    there = {row["model"] for row in report["rows"]} | {"stock"}
    report["throughput"] = throughput({name: EXPERIMENTS[name] for name in EXPERIMENTS if name in there}, "stock")
    report["linear"] = {shortcut: linear_codec(shortcut) for shortcut in ("patches", "overlapping")}
    text = table(report, list(EXPERIMENTS), "stock")
    print(text)
    save_curves(report, SHOWN, output.with_name(f"{output.stem}_curves.png"))
    save_spectra(report, SHOWN, output.with_name(f"{output.stem}_spectra.png"))
    save_strips(output.with_suffix(""), SHOWN, output.with_name(f"{output.stem}_reconstructions.png"))
    if output == OUTPUT:
        floors = []
        for shortcut, found in report["linear"].items():
            recon, low, high = (found[key] for key in MEASURES)
            floors.append(f"`{shortcut}` Recon {recon:.4f}, Low {low:.4f}, High {high:.5f}")
        notes = "\n".join(f"- `{name}`: {experiment.note}" for name, experiment in EXPERIMENTS.items())
        floor = f"The shortcut alone, untrained: {'; '.join(floors)}."
        write_section("equal_budget", f"{text}\n\n{floor}\n\n{notes}")


def linear_codec(shortcut: str) -> dict[str, float]:
    """What the shortcut alone reaches, before any training: the reference that a trained model has to beat."""
    return errors(build_model({**QUALITY, "shortcut": shortcut}).eval(), "heldout")


if __name__ == "__main__":
    main(__doc__, EXPERIMENTS, OUTPUT, finish, steps=2_000, seeds=3)
