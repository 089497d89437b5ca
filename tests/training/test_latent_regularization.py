"""What is decoded in place of the latents: which channels, which images, and what the target is."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_FAVAE, refusal, tiny_tokenizer_recipe, train, train_whole_and_in_parts, write_images
from safetensors.torch import load_file

from favae import AutoencoderKLFA
from favae.autoencoders import decode, encode
from favae.data.images import ImageDataset
from favae.data.sources import open_source
from favae.errors import ConfigError
from favae.losses.alignment import PrincipalComponents
from favae.models.linear_shortcut import LatentsToPatches, PatchesToLatents, share_left, shortcut_weights
from favae.training import latent_regularization
from favae.training.latent_regularization import regularize
from favae.training.optimization import Ema
from favae.training.tokenizer_losses import (
    AlignmentConfig,
    FrequencyMaskingConfig,
    PrefixConfig,
    SpectrumMatchingConfig,
    TokenizerLossConfig,
)
from favae.training.tokenizer_module import TokenizerTrainingModule
from train_tokenizer import fit_principal_components


def pair(count: int = 8, side: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, 6, side, side), torch.rand(count, 3, 4 * side, 4 * side) * 2 - 1


def regularized(latents, images, **losses):
    return regularize(latents, images, TokenizerLossConfig(**losses), low_channels=4, low_pass=lambda x: x / 2)


def test_without_a_loss_nothing_is_changed():
    latents, images = pair()
    decoded, target = regularized(latents, images)
    assert decoded is latents and target is images


def test_high_latents_are_dropped_with_either_target():
    latents, images = pair(200)
    for target_kind, expected in (("low_pass", images / 2), ("image", images)):
        decoded, target = regularized(latents, images, high_dropout=0.4, high_dropout_target=target_kind)
        dropped = (decoded[:, 4:] == 0).all(dim=(1, 2, 3))
        assert 0.25 < dropped.float().mean() < 0.55 and torch.equal(decoded[:, :4], latents[:, :4])
        assert torch.equal(decoded[~dropped], latents[~dropped]) and torch.equal(target[~dropped], images[~dropped])
        assert torch.equal(target[dropped], expected[dropped])


def test_noise_of_the_high_latents_alone():
    latents, images = pair(400)
    decoded, target = regularized(latents, images, high_noise=0.8)
    assert torch.equal(decoded[:, :4], latents[:, :4]) and target is images
    std = (decoded - latents)[:, 4:].std(dim=(1, 2, 3))
    assert std.max() < 1.0 and std.mean() == pytest.approx(0.4, abs=0.05)  # uniform in 0 ... 0.8


def test_latents_become_smaller_after_they_are_masked():
    masking = FrequencyMaskingConfig(probability=1.0)
    for seed in range(8):
        torch.manual_seed(seed)
        decoded, target = regularized(*pair(side=16), equivariance=1.0, frequency_masking=masking)
        assert decoded.shape[-1] < 16 and target.shape[-1] == 4 * decoded.shape[-1]


def test_latents_become_no_smaller_than_a_quarter(monkeypatch):
    monkeypatch.setattr(torch, "randint", lambda low, high, size: torch.tensor(low))
    for side, smallest in ((6, 2), (8, 2), (5, 2), (2, 1)):
        assert regularized(*pair(side=side), equivariance=1.0)[0].shape[-2:] == (smallest, smallest)


def test_prefixes_keep_the_first_channels():
    latents, images = pair(300)
    decoded, target = regularized(latents, images, prefix=PrefixConfig(probability=0.5, widths=[2, 4]))
    kept = (decoded != 0).any(dim=(2, 3)).sum(dim=1)
    counts = {width: int((kept == width).sum()) for width in (2, 4, 6)}
    assert sum(counts.values()) == 300 and all(45 < counts[width] < 110 for width in (2, 4)) and 110 < counts[6] < 190
    assert all(torch.equal(decoded[i, : kept[i]], latents[i, : kept[i]]) for i in range(300)) and target is images


def test_equivariance_moves_both_alike():
    """A latent that is the image made smaller stays that."""
    images = torch.nn.functional.interpolate(torch.randn(2, 3, 4, 4), size=(64, 64), mode="bicubic")
    latents = torch.nn.functional.avg_pool2d(images, 4)
    sides = set()
    for _ in range(40):
        decoded, target = regularize(
            latents, images, TokenizerLossConfig(equivariance=1.0), low_channels=3, low_pass=None
        )
        assert target.shape[-1] == 4 * decoded.shape[-1] < 64
        again = torch.nn.functional.interpolate(target, size=decoded.shape[-2:], mode="bilinear", antialias=True)
        assert torch.corrcoef(torch.stack([decoded.flatten(), again.flatten()]))[0, 1] > 0.9
        sides.add(decoded.shape[-1])
    assert min(sides) == 4 and len(sides) > 6


def test_masks_cut_latents_and_images(monkeypatch):
    monkeypatch.setattr(latent_regularization, "MASKED_SHARES", (1.0,))
    latents, images = pair()
    decoded, target = regularized(latents, images, frequency_masking=FrequencyMaskingConfig(probability=1.0))
    for before, after in ((latents, decoded), (images, target)):
        assert after.shape == before.shape and 0.3 < after.var() / before.var() < 0.6  # 28 of 64
    with torch.autocast("cpu", torch.bfloat16):
        _, in_autocast = regularized(latents, images, frequency_masking=FrequencyMaskingConfig(probability=1.0))
    assert torch.equal(in_autocast, target)
    assert regularized(latents, images, frequency_masking=FrequencyMaskingConfig(probability=0.0))[0] is latents


@pytest.mark.parametrize(
    "losses",
    [
        {"spectrum_matching": SpectrumMatchingConfig(weight=0.5), "kl": 0.0},
        {"prefix": PrefixConfig(probability=1.0, widths=[3]), "equivariance": 1.0},
    ],
    ids=lambda losses: next(iter(losses)),
)
def test_the_encoder_learns_from_them(losses):
    vae = AutoencoderKLFA(**TINY_FAVAE)
    config = TokenizerLossConfig(**losses)
    loss, logs, reconstruction, target = TokenizerTrainingModule(vae, [config])(torch.rand(2, 3, 32, 32), config)
    loss.backward()
    assert reconstruction.shape == target.shape and vae.quant_conv.weight.grad.abs().sum() > 0
    if "spectrum_matching" in losses:
        assert loss.item() == pytest.approx((logs["reconstruction"] + logs["spectrum_matching"] / 2).item(), rel=1e-5)


def test_the_low_channels_all_or_the_first_few_are_aligned():
    class Teacher(torch.nn.Module):
        channels = 7

    vae = AutoencoderKLFA(**TINY_FAVAE)
    for channels, expected in (("low", 4), ("all", 6), (2, 2)):
        losses = TokenizerLossConfig(alignment=AlignmentConfig(weight=1.0, channels=channels))
        module = TokenizerTrainingModule(vae, [losses], Teacher())
        assert module.projector.in_channels == module.aligned_channels == expected and module.low_channels == 4
    Teacher.channels = 5
    losses = TokenizerLossConfig(alignment=AlignmentConfig(weight=1.0, channels="all", target="principal"))
    with pytest.raises(ConfigError, match="5 components .* fewer than the 6 channels"):
        TokenizerTrainingModule(vae, [losses], Teacher())


def test_latents_are_aligned_to_principal_components_and_the_run_goes_on(tmp_path):
    recipe = tiny_tokenizer_recipe(tmp_path, write_images(tmp_path / "images"))
    alignment = "loss.alignment={weight: 0.5, backbone: efficientnet-lite0, channels: all, target: principal}"
    words = (recipe, alignment, "loss.adversarial.weight=0", "train.lr_scheduler=constant", "train.lr_warmup_steps=0")
    train_whole_and_in_parts("train_tokenizer", tmp_path, *words, steps=8, first=4)
    records = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert all(record["alignment"] > 0 for record in records)
    components = load_file(tmp_path / "whole/checkpoints/step-8/principal.safetensors")
    assert components["directions"].shape[0] == 6 and components["directions"].any()


def test_all_processes_take_the_principal_components_of_the_main_one(monkeypatch):
    monkeypatch.setattr("train_tokenizer.process_state", lambda: SimpleNamespace(is_main_process=False))
    monkeypatch.setattr("train_tokenizer.broadcast", torch.ones_like)
    images = ImageDataset(open_source("photos"), 16)
    module = SimpleNamespace(
        vae=AutoencoderKLFA(**TINY_FAVAE), teacher=torch.nn.Identity(), principal=PrincipalComponents(7, 6)
    )
    fit_principal_components(module, images, torch.device("cpu"))
    assert all((buffer == 1).all() for buffer in module.principal.buffers())


def test_latents_of_unit_length(tmp_path):
    vae = AutoencoderKLFA(**TINY_FAVAE, latent_norm="rms").eval()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        latents = encode(vae, images)
        assert torch.allclose(latents.square().mean(dim=1), torch.ones(2, 4, 4), atol=1e-4)
        assert torch.allclose(encode(vae, images, "sample", torch.Generator()), latents, atol=1e-4)
        vae.save_pretrained(tmp_path)
        again = AutoencoderKLFA.from_pretrained(tmp_path).eval()
        assert torch.equal(encode(again, images), latents) and decode(again, latents).shape == images.shape
    losses = TokenizerLossConfig(kl=1.0)
    _, logs, _, _ = TokenizerTrainingModule(vae, [losses])(images, losses)
    assert "kl" not in logs


def test_a_shortcut_in_the_decoder_alone():
    vae = AutoencoderKLFA(**{**TINY_FAVAE, "shortcut": "decoder"})
    assert [type(m) for m in vae.modules() if isinstance(m, (PatchesToLatents, LatentsToPatches))] == [LatentsToPatches]
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert encode(vae, images).std() > 0.01  # the encoder's networks are not silenced


def test_a_shortcut_fades_linearly_and_stays_away():
    vae = AutoencoderKLFA(**{**TINY_FAVAE, "shortcut": "overlapping"})
    before = vae.encoder.shortcut.weight.clone()
    ema = Ema(vae, 0.9, warmup=False)
    for step in range(6):
        ema.multiply(shortcut_weights(vae), share_left(step, 4))
        left = max(0, 3 - step) / 4
        with ema:  # the average fades as the weights do
            assert torch.allclose(vae.encoder.shortcut.weight, left * before, atol=1e-6)
        assert torch.allclose(vae.encoder.shortcut.weight, left * before, atol=1e-6)
    assert not vae.decoder.shortcut.weight.any()
    frozen = AutoencoderKLFA(**{**TINY_FAVAE, "shortcut": "overlapping"})
    frozen.encoder.requires_grad_(False)
    assert shortcut_weights(frozen) == [frozen.decoder.shortcut.weight]


@pytest.mark.parametrize("average", ["train.ema_decay=0", "train={ema_decay: 0.99, ema_warmup: false}"])
def test_training_fades_the_shortcut(average, tmp_path):
    recipe = tiny_tokenizer_recipe(tmp_path, write_images(tmp_path / "images"))
    more = ["model.shortcut=overlapping", "train.fade_shortcut_steps=6", average, "loss.equivariance=0.5"]
    more += ["loss.adversarial.weight=0"]
    train("train_tokenizer", recipe, *more, f"output={tmp_path / 'run'}")
    weights = load_file(next((tmp_path / "run/final").glob("*.safetensors")))
    assert not weights["encoder.shortcut.weight"].any() and weights["encoder.low.conv_in.weight"].any()


@pytest.mark.parametrize(
    "setting, named",
    [
        ("loss.frequency_masking.probability=0.5", "loss.frequency_masking.latent_block=8"),
        ("loss.prefix.probability=0.5", "loss.prefix.widths"),
        ("loss={spectrum_matching: {weight: 0.1}, adversarial: {weight: 0}}", "loss.spectrum_matching.weight"),
        ("loss.prefix={probability: 0.5, widths: [2, 6]}", "loss.prefix.widths"),
        ("loss.alignment={weight: 0.5, backbone: efficientnet-lite0, channels: 7}", "loss.alignment.channels"),
        ("loss.frequency_masking.latent_block=5", "loss.frequency_masking.latent_block"),
        ("loss.high_dropout_target=blue", "loss.high_dropout_target"),
        ("train.fade_shortcut_steps=5", "train.fade_shortcut_steps"),
        ("model.latent_norm=layer", "model.latent_norm"),
    ],
)
def test_settings_that_do_not_fit(setting, named, tmp_path):
    recipe = tiny_tokenizer_recipe(tmp_path, write_images(tmp_path / "images"))
    extra = ["model.shortcut=null"] if "fade" in setting else []
    extra += ["train.resolution=4"] if "spectrum" in setting else []
    assert named in refusal("train_tokenizer", recipe, setting, *extra, f"output={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


def test_equivariance_and_losses_of_larger_images(tmp_path):
    recipe = tiny_tokenizer_recipe(tmp_path, write_images(tmp_path / "images"))
    for setting, named in (
        ("loss.stft={weight: 0.1, window: 8}", "loss.stft.window"),
        ("loss.band={weight: 0.1, levels: 3}", "loss.band.levels"),
    ):
        more = ["loss.adversarial.weight=0", "loss.equivariance=0.5", setting]
        assert named in refusal("train_tokenizer", recipe, *more, f"output={tmp_path / 'run'}")
