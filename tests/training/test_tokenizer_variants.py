"""The other kinds of tokenizer through the scripts, as a user would train and measure them."""

import copy
import json
import math
from functools import partial

import pytest
import safetensors.torch
import torch
from conftest import (
    ROOT,
    command,
    refusal,
    tiny_tokenizer_recipe,
    train,
    train_in_processes,
    train_whole_and_in_parts,
    weights,
)
from diffusers import AutoencoderKL
from tiny_autoencoders import autoencoders
from torch.utils.flop_counter import FlopCounterMode

import train_tokenizer
from benchmarks import decoder_cost
from favae import AsymmetricAutoencoderKLFA, VQModelFA
from favae.autoencoders import decode, encode, takes_frames
from favae.data.latents import open_latents
from favae.errors import ConfigError
from favae.training.config import load_config
from favae.training.models import build_model
from favae.training.optimization import matrices_of
from favae.training.tokenizer_config import TokenizerConfig
from train_tokenizer import freeze_parts

VQ = "{name: VQModelFA, block_out_channels: [8, 8, 16], layers_per_block: 1, norm_num_groups: 4, latent_channels: 6, \
codebook_size: 16, frequency_complement: res}"
SMALL = "block_out_channels: [8, 8, 8], latent_channels: 4, hyper_channels: 4"
TRAIN = ("train.lr_scheduler=constant", "train.lr_warmup_steps=0")
MUON = ("train.optimizer=muon", "loss.adversarial.weight=0")
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


@pytest.mark.parametrize(
    "model, setting, named",
    [
        (VQ.replace("{", "{quantizer: next_scale, scales: [1, 2], "), "seed=1", "train.resolution must be 8"),
        (f"{{name: HyperpriorModelFA, {SMALL}}}", "train.resolution=4", "train.resolution must be 8"),
        (f"{{name: HyperpriorModelFA, {SMALL}}}", "train.gradient_checkpointing=true", "train.gradient_checkpointing"),
    ],
)
def test_what_a_model_does_not_take(model, setting, named, tmp_path, image_folder):
    more = ["loss.kl=0", "loss.adversarial.weight=0", f"output={tmp_path / 'run'}"]
    assert named in refusal("train_tokenizer", recipe(tmp_path, image_folder, model), setting, *more)


def test_a_codebook_with_dynamic_spectrum_loss(tmp_path, image_folder, capsys):
    file = recipe(tmp_path, image_folder, VQ)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train("train_tokenizer", file, *TRAIN, *SPECTRUM, f"output={whole}")
    last = metrics(whole)[-1]
    assert {"commitment", "spectrum", "focal_frequency", "codebook_usage", "codebook_perplexity"} < set(last)
    assert all(math.isfinite(value) for value in last.values())
    sigmas = [last[f"sigma_{i}"] for i in range(4)]
    moved = [abs(sigma - 1) for sigma in sigmas]
    assert min(moved) > 1e-4 and max(moved) > 0.01, sigmas

    train("train_tokenizer", file, *TRAIN, *SPECTRUM, f"output={parts}", "train.steps=4")
    train("train_tokenizer", file, *TRAIN, *SPECTRUM, f"output={parts}", "train.steps=8")
    checkpoint = "checkpoints/step-8"
    assert "spectrum.safetensors" in weights(whole / checkpoint)
    assert weights(whole / checkpoint) == weights(parts / checkpoint)
    assert weights(whole / "final") == weights(parts / "final")

    model = VQModelFA.from_pretrained(whole / "final")
    assert model.lookup(torch.zeros(1, 2, 2, dtype=torch.long)).shape == (1, 6, 2, 2)
    measured = ("evaluate", "reconstruction", "--model", f"vq={whole / 'final'}", "--data", image_folder)
    command(*measured, "--resolution", "16", "--features", "efficientnet-lite0", "--output", tmp_path / "out")
    assert "16 tokens" in capsys.readouterr().out
    (result,) = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    assert result["tokens_per_image"] == 16 and result["bits_per_image"] == 64 and result["floats_per_image"] is None
    cache = ("--resolution", "16", "--output", tmp_path / "cache")
    command("cache-latents", "--tokenizer", whole / "final", "--data", image_folder, *cache)
    assert open_latents(tmp_path / "cache").codebook_size == 16


@pytest.mark.parametrize("model_class", [AsymmetricAutoencoderKLFA, AutoencoderKL])
def test_a_decoder_for_an_existing_latent_space(tmp_path, image_folder, tiny_kl, model_class):
    tiny_kl.register_to_config(scaling_factor=0.25)
    tiny_kl.save_pretrained(tmp_path / "existing")
    model = f"{{name: {model_class.__name__}, from_autoencoder_kl: {tmp_path / 'existing'}}}"
    file = recipe(tmp_path, image_folder, model)
    train("train_tokenizer", file, *TRAIN, f"output={tmp_path / 'run'}", "loss.kl=0")
    trained = model_class.from_pretrained(tmp_path / "run/final").eval()
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    original = AutoencoderKL.from_pretrained(tmp_path / "existing").eval()
    assert torch.equal(trained.encode(images).latent_dist.mean, original.encode(images).latent_dist.mean)
    assert trained.config.scaling_factor == 0.25
    first, last = (
        safetensors.torch.load_file(
            tmp_path / f"run/checkpoints/step-{step}/tokenizer/diffusion_pytorch_model.safetensors"
        )
        for step in (6, 8)
    )
    changed = {name.split(".")[0] for name in first if not torch.equal(first[name], last[name])}
    assert changed == {"decoder", "post_quant_conv"}
    if model_class is AutoencoderKL:
        return
    with pytest.raises(ConfigError, match="is a AsymmetricAutoencoderKLFA, no stock AutoencoderKL"):
        build_model({"name": "AsymmetricAutoencoderKLFA", "from_autoencoder_kl": str(tmp_path / "run/final")})
    nothing = f"model.from_autoencoder_kl={tmp_path / 'nothing'}"
    assert "model.from_autoencoder_kl" in refusal("train_tokenizer", file, f"output={tmp_path / 'other'}", nothing)


def test_compiled_blocks_train_with_adaptive_weights(tmp_path, image_folder, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # without minutes of C++
    more = ["train.compile=true", "train.channels_last=true", "train.steps=4", "loss.adversarial.start_step=1"]
    file = recipe(tmp_path, image_folder)
    for name, options in (("compiled", more), ("plain", more[2:])):
        train("train_tokenizer", file, f"output={tmp_path / name}", *options)
    compiled, plain = metrics(tmp_path / "compiled"), metrics(tmp_path / "plain")
    for ours, expected in zip(compiled, plain):
        assert ours["reconstruction"] == pytest.approx(expected["reconstruction"], rel=1e-3)
    assert compiled[-1]["adversarial_scale"] == pytest.approx(plain[-1]["adversarial_scale"], rel=1e-2)


def test_two_processes_with_every_regularizer(tmp_path, image_folder):
    file = recipe(tmp_path, image_folder)
    more = ["model.shortcut=overlapping", "loss.scale_equivariance=0.1"]
    more += ["loss.latent_noise=0.1", "loss.high_dropout=0.5", "loss.stft={weight: 0.1, window: 8}", "loss.ssim=0.1"]
    assert train_in_processes(2, "train_tokenizer", file, *more, f"output={tmp_path / 'run'}") == [0, 0]
    last = metrics(tmp_path / "run")[-1]
    assert last["step"] == 8 and last["skipped"] == 0
    assert {"scale_equivariance", "stft", "ssim", "adversarial_scale"} < set(last)
    assert all(math.isfinite(value) for value in last.values())


class SquaredDistance(torch.nn.Module):
    """In the place of LPIPS, whose weights may not be at hand."""

    def __init__(self, weights):
        super().__init__()
        assert weights == "vgg16.pth"

    def forward(self, first, second):
        return (first - second).square().mean(dim=(1, 2, 3))


def test_lpips_is_trained_with_and_measured(tmp_path, image_folder, monkeypatch):
    monkeypatch.setattr(train_tokenizer, "LPIPS", SquaredDistance)
    words = ["loss.perceptual_weights=vgg16.pth", "loss.adversarial.weight=0", "train.steps=4", *TRAIN]
    words += ["evaluation.every=4", f"evaluation.data={image_folder}", "evaluation.features=null"]
    for name, perceptual in (("with", 5.0), ("without", 0.0)):
        train(
            "train_tokenizer",
            recipe(tmp_path, image_folder),
            *words,
            f"loss.perceptual={perceptual}",
            f"output={tmp_path / name}",
        )
    assert all(0 < record["perceptual"] < 4 for record in metrics(tmp_path / "with"))
    assert not any("perceptual" in record for record in metrics(tmp_path / "without"))
    assert weights(tmp_path / "with/final") != weights(tmp_path / "without/final")
    for name in ("with", "without"):
        (record,) = (json.loads(line) for line in (tmp_path / name / "evaluation.jsonl").read_text().splitlines())
        assert record["LPIPS"] == pytest.approx(record["Recon"], rel=0.1)  # which does not clamp


def test_the_discriminator_has_its_rate_and_the_average_its_warmup(tmp_path, image_folder):
    words = ("train.steps=1", "train.discriminator_learning_rate=5.0e-4", "train.learning_rate=2.0e-4", *TRAIN)
    averages = {}
    for warmup in ("true", "false"):
        output = tmp_path / warmup
        train(
            "train_tokenizer",
            recipe(tmp_path, image_folder),
            *words,
            f"train.ema_warmup={warmup}",
            "loss.adversarial.start_step=0",
            f"output={output}",
        )
        last = output / "checkpoints/step-1"
        parts = (last / name / "diffusion_pytorch_model.safetensors" for name in ("tokenizer", "ema"))
        new, averages[warmup] = map(safetensors.torch.load_file, parts)
    states = torch.load(last / "optimizers-0.pt", weights_only=True)
    assert {group["lr"] for state in states for group in state["param_groups"]} == {2e-4, 5e-4}
    behind = {
        key: max(float((value - new[name]).abs().max()) for name, value in average.items())
        for key, average in averages.items()
    }
    assert behind == {"true": 0, "false": pytest.approx(0.9 * 2e-4, rel=0.01)}  # Adam's first step is the rate


KEYS = ("ssim", "adversarial", "discriminator")


def test_stages_change_the_loss_in_one_run(tmp_path, image_folder):
    file = recipe(tmp_path, image_folder)
    without = "loss: {ssim: 0.0, adversarial: {weight: 0.0}}"
    stages = f"stages=[{{start_step: 4, loss: {{ssim: 1.0}}}}, {{start_step: 6, {without}}}]"
    train("train_tokenizer", file, stages, f"output={tmp_path / 'run'}")
    found = {key: [record["step"] for record in metrics(tmp_path / "run") if key in record] for key in KEYS}
    assert found == {"ssim": [5, 6], "adversarial": [4, 5, 6], "discriminator": [4, 5, 6]}  # steps 3 to 5


def test_muon_trains_convolutions_and_resumes(tmp_path, image_folder):
    file = recipe(tmp_path, image_folder)
    train_whole_and_in_parts("train_tokenizer", tmp_path, file, *TRAIN, *MUON, steps=4, first=2)
    vae = build_model(load_config(TokenizerConfig, file).model)
    adamw, muon = torch.load(tmp_path / "whole/checkpoints/step-4/optimizers-0.pt", weights_only=True)[:2]
    assert len(muon["state"]) == len(matrices_of([vae]))
    assert len(adamw["state"]) + len(muon["state"]) == len(list(vae.parameters()))


def test_two_processes_share_one_codebook_and_stages_switch_alignment(tmp_path, image_folder):
    file = recipe(tmp_path, image_folder, VQ)
    alignment = "loss.alignment={weight: 0.1, backbone: efficientnet-lite0, adaptive: false}"
    stages = "stages=[{start_step: 2, loss: {alignment: {weight: 0}, spectrum: {weight: 0}}}, \
{start_step: 5, loss: {alignment: {weight: 0.1}, spectrum: {weight: 0.1}}}]"
    words = (file, *SPECTRUM, alignment, stages, f"output={tmp_path / 'run'}")
    assert train_in_processes(2, "train_tokenizer", *words) == [0, 0]
    records = metrics(tmp_path / "run")
    assert [r["step"] for r in records if "alignment" in r] == [1, 2, 6, 7, 8]
    assert [r["step"] for r in records if "spectrum" in r] == [1, 2, 6, 7, 8]
    assert records[-1]["skipped"] == 0 and all(math.isfinite(value) for value in records[-1].values())


@pytest.mark.parametrize("quantizer", ["next_scale", "next_band"])
def test_tokens_from_coarse_to_fine_train_in_two_processes_and_resume(tmp_path, image_folder, quantizer):
    file = recipe(tmp_path, image_folder, f"{VQ[:-1]}, quantizer: {quantizer}, scales: [1, 2, 4]}}")
    if quantizer == "next_scale":  # one codebook for all stages
        pair = (file, f"output={tmp_path / 'pair'}", "train.steps=2", "train.sample_every=0")
        assert train_in_processes(2, "train_tokenizer", *pair) == [0, 0]
    train_whole_and_in_parts("train_tokenizer", tmp_path, file, *TRAIN, steps=4, first=2)


def decoding_flops(vae, channels: int) -> int:
    frames = (1,) if takes_frames(vae) else ()
    with FlopCounterMode(display=False) as counter:
        vae.decode(torch.zeros(1, channels, *frames, 8, 8, device="meta"))
    return counter.get_total_flops()


@pytest.mark.parametrize("name, channels", decoder_cost.CHANNELS.items())
def test_recipes_for_existing_latents_cost_what_they_say(name, channels, monkeypatch):
    """With the published shapes and random weights in place of what the hub has."""
    with torch.device("meta"):
        stock = decoder_cost.stock(name)
    monkeypatch.setattr(AutoencoderKL, "load_config", lambda *_, **options: {"_class_name": type(stock).__name__})
    monkeypatch.setattr(type(stock), "from_pretrained", lambda *_, **options: decoder_cost.stock(name))
    small, tiny = (
        load_config(TokenizerConfig, ROOT / f"configs/tokenizer/{name}_{size}.yaml") for size in ("small", "tiny")
    )
    flops = decoding_flops(stock, channels)
    for config, share in ((small, 0.41), (tiny, 0.02)):
        vae = build_model(config.model).to("meta")
        latents = encode(vae, torch.zeros(1, 3, 64, 64, device="meta"))
        assert latents.shape == (1, channels, 8, 8) and decode(vae, latents).shape == (1, 3, 64, 64)
        assert decoding_flops(vae, channels) <= share * flops
    assert tiny.teacher.normalize and (small.model.get("from_autoencoder_kl") or small.teacher.autoencoder)


@pytest.mark.parametrize(
    "name, changes",
    [
        ("VQModelFA", {"codebook_dim": 2}),
        ("VQModelFA", {"quantizer": "next_scale", "scales": (1, 2)}),
        ("HyperpriorModelFA", {}),
    ],
)
def test_a_decoder_trained_alone_leaves_tokens_and_files_as_they_are(name, changes):
    """No other part learns, also none that quantizes latents."""
    model = autoencoders()[name]
    model = type(model).from_config(model.config, **changes)
    freeze_parts(model, "decoder")
    learned = {parameter.split(".")[0] for parameter, tensor in model.named_parameters() if tensor.requires_grad}
    assert "decoder" in learned and learned <= {"decoder", "post_quant_conv"}


def test_what_is_neither_encoder_nor_decoder_belongs_to_the_encoder(tiny_kl):
    for trained, learns in (("decoder", False), ("encoder", True)):
        model = copy.deepcopy(tiny_kl)
        model.bottleneck = torch.nn.Conv2d(4, 4, 1)
        freeze_parts(model, trained)
        assert model.bottleneck.weight.requires_grad is learns is not model.decoder.conv_in.weight.requires_grad
