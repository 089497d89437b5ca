"""The other kinds of tokenizer through the scripts, as a user would train and measure them."""

import json
import math

import pytest
import safetensors.torch
import torch
from conftest import ROOT, run, tiny_tokenizer_recipe
from diffusers import AutoencoderKL

from favae import AutoencoderKLFA, VQModelFA
from favae.errors import ConfigError
from favae.training.config import TokenizerConfig, load_config
from favae.training.models import TOKENIZERS, build_model

VQ = "{name: VQModelFA, block_out_channels: [8, 8, 16], layers_per_block: 1, norm_num_groups: 4, latent_channels: 6, \
codebook_size: 16, frequency_complement: res}"
TRAIN = ("train.lr_scheduler=constant", "train.lr_warmup_steps=0")
SPECTRUM = ("loss.spectrum={weight: 0.1, sigma: 1.0, learning_rate: 0.01}", "loss.focal_frequency.weight=1")


def recipe(folder, images, model: str | None = None):
    file = tiny_tokenizer_recipe(folder, images)
    if model is not None:
        lines = file.read_text().splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith("model:"))
        file.write_text("\n".join([f"model: {model}", *lines[start + 2 :]]) + "\n")
    return file


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.safetensors"))}


def test_a_codebook_with_dynamic_spectrum_loss(tmp_path, image_folder):
    file = recipe(tmp_path, image_folder, VQ)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run("train_tokenizer.py", file, *TRAIN, *SPECTRUM, f"output={whole}")
    last = metrics(whole)[-1]
    assert {"commitment", "spectrum", "focal_frequency", "codebook_usage", "codebook_perplexity"} < set(last)
    assert all(math.isfinite(value) for value in last.values())
    sigmas = [last[f"sigma_{i}"] for i in range(4)]
    moved = [abs(sigma - 1) for sigma in sigmas]
    assert min(moved) > 1e-4 and max(moved) > 0.01, sigmas

    run("train_tokenizer.py", file, *TRAIN, *SPECTRUM, f"output={parts}", "train.steps=4")
    run("train_tokenizer.py", file, *TRAIN, *SPECTRUM, f"output={parts}", "train.steps=8")
    checkpoint = "checkpoints/step-8"
    assert "spectrum.safetensors" in weights(whole / checkpoint)
    assert weights(whole / checkpoint) == weights(parts / checkpoint)
    assert weights(whole / "final") == weights(parts / "final")

    model = VQModelFA.from_pretrained(whole / "final")
    assert model.lookup(torch.zeros(1, 2, 2, dtype=torch.long)).shape == (1, 6, 2, 2)
    measured = ("-m", "favae", "evaluate", "reconstruction", "--model", f"vq={whole / 'final'}", "--data", image_folder)
    options = ("--resolution", "16", "--features", "efficientnet-lite0", "--output", tmp_path / "out")
    table = run(*measured, *options).stdout
    assert "16 tokens" in table
    (result,) = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    assert result["tokens_per_image"] == 16 and result["bits_per_image"] == 64 and result["floats_per_image"] is None
    run("-m", "favae", "cache-latents", "--tokenizer", whole / "final", "--data", image_folder, "--resolution", "16",
        "--output", tmp_path / "cache")  # fmt: skip
    manifest = json.loads((tmp_path / "cache/manifest.json").read_text())
    assert manifest["kind"] == "tokens" and manifest["codebook_size"] == 16


@pytest.mark.parametrize("kind", [AutoencoderKLFA, AutoencoderKL])
def test_a_decoder_for_an_existing_latent_space(tmp_path, image_folder, tiny_kl, kind):
    tiny_kl.register_to_config(scaling_factor=0.25)
    tiny_kl.save_pretrained(tmp_path / "existing")
    model = f"{{name: {kind.__name__}, from_autoencoder_kl: {tmp_path / 'existing'}}}"
    file = recipe(tmp_path, image_folder, model)
    run("train_tokenizer.py", file, *TRAIN, f"output={tmp_path / 'run'}", "loss.kl=0")
    trained = kind.from_pretrained(tmp_path / "run/final").eval()
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    original = AutoencoderKL.from_pretrained(tmp_path / "existing").eval()
    assert torch.equal(trained.encode(images).latent_dist.mean, original.encode(images).latent_dist.mean)
    assert trained.config.scaling_factor == 0.25
    first = tmp_path / "run/checkpoints/step-6/tokenizer/diffusion_pytorch_model.safetensors"
    last = tmp_path / "run/checkpoints/step-8/tokenizer/diffusion_pytorch_model.safetensors"
    a, b = safetensors.torch.load_file(first), safetensors.torch.load_file(last)
    changed = {name.split(".")[0] for name in a if not torch.equal(a[name], b[name])}
    assert changed == {"decoder", "post_quant_conv"}
    if kind is AutoencoderKL:
        return
    settings = {"name": "AutoencoderKLFA", "from_autoencoder_kl": str(tmp_path / "run/final")}
    with pytest.raises(ConfigError, match="is a AutoencoderKLFA, not a stock AutoencoderKL"):
        build_model(settings, TOKENIZERS)
    missing = run("train_tokenizer.py", file, f"output={tmp_path / 'other'}",
                  f"model.from_autoencoder_kl={tmp_path / 'nothing'}", check=False)  # fmt: skip
    assert missing.returncode == 1 and "Traceback" not in missing.stderr
    assert "model.from_autoencoder_kl" in missing.stderr.strip().splitlines()[-1]


def test_two_processes_with_complements_and_every_regulariser(tmp_path, image_folder):
    file = recipe(tmp_path, image_folder)
    more = ["model.frequency_complement=conv", "model.shortcut=overlapping", "loss.scale_equivariance=0.1"]
    more += ["loss.latent_noise=0.1", "loss.high_dropout=0.5", "loss.stft={weight: 0.1, window: 8}", "loss.ssim=0.1"]
    run("train_tokenizer.py", file, *SPECTRUM, *more, f"output={tmp_path / 'run'}", processes=2)
    last = metrics(tmp_path / "run")[-1]
    assert last["step"] == 8 and last["skipped"] == 0
    assert {"spectrum", "scale_equivariance", "stft", "ssim", "sigma_7"} < set(last)
    assert all(math.isfinite(value) for value in last.values())


def test_stages_change_the_loss_in_one_run(tmp_path, image_folder):
    file = recipe(tmp_path, image_folder)
    stages = "stages=[{start_step: 4, loss: {ssim: 1.0}}, {start_step: 6, loss: {ssim: 0.0}}]"
    run("train_tokenizer.py", file, stages, f"output={tmp_path / 'run'}")
    assert [record["step"] for record in metrics(tmp_path / "run") if "ssim" in record] == [5, 6]  # steps 4 and 5


def test_two_processes_share_one_codebook_and_stages_switch_alignment(tmp_path, image_folder):
    file = recipe(tmp_path, image_folder, VQ)
    alignment = "loss.alignment={weight: 0.1, backbone: efficientnet-lite0, adaptive: false}"
    stages = "stages=[{start_step: 2, loss: {alignment: {weight: 0}, spectrum: {weight: 0}}}, \
{start_step: 5, loss: {alignment: {weight: 0.1}, spectrum: {weight: 0.1}}}]"
    run("train_tokenizer.py", file, *SPECTRUM, alignment, stages, f"output={tmp_path / 'run'}", processes=2)
    records = metrics(tmp_path / "run")
    assert [r["step"] for r in records if "alignment" in r] == [1, 2, 6, 7, 8]
    assert [r["step"] for r in records if "spectrum" in r] == [1, 2, 6, 7, 8]
    assert records[-1]["skipped"] == 0 and all(math.isfinite(value) for value in records[-1].values())


@pytest.mark.parametrize("name, channels", [("favae_sd_f8d4", 4), ("favae_f8d16", 16)])
def test_recipes_for_existing_latents_fit_their_autoencoders(name, channels, monkeypatch):
    """With the published shapes and random weights in place of what the hub has."""
    shape = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": channels,
        "use_quant_conv": channels == 4,
        "use_post_quant_conv": channels == 4,
    }
    asked = {}

    def from_pretrained(path, **options):
        asked.update(path=path, **options)
        return AutoencoderKL(**shape)

    monkeypatch.setattr(AutoencoderKL, "load_config", lambda path, **options: {"_class_name": "AutoencoderKL"})
    monkeypatch.setattr(AutoencoderKL, "from_pretrained", from_pretrained)
    config = load_config(TokenizerConfig, ROOT / f"configs/tokenizer/{name}.yaml")
    vae = build_model(config.model, TOKENIZERS).to("meta")
    assert asked["path"] in ("stabilityai/sd-vae-ft-mse", "black-forest-labs/FLUX.1-schnell")
    images = torch.zeros(1, 3, 64, 64, device="meta")
    latents = vae.encode(images).latent_dist.mode()
    assert latents.shape == (1, channels, 8, 8) and vae.decode(latents).sample.shape == images.shape
