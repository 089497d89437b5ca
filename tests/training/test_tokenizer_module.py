"""One pass of a tokenizer's training module, and the losses on what it gives."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY_FAVAE, TINY_HYPERPRIOR, TINY_VQ
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from favae import AsymmetricAutoencoderKLFA, AutoencoderKLFA, HyperpriorModelFA, VQModelFA
from favae.errors import ConfigError
from favae.losses.adversarial import PatchDiscriminator
from favae.training.models import lay_out_channels_last
from favae.training.tokenizer_losses import (
    AdversarialConfig,
    AlignmentConfig,
    BandConfig,
    FocalFrequencyConfig,
    RateConfig,
    SpectrumConfig,
    STFTConfig,
    TokenizerLossConfig,
)
from favae.training.tokenizer_module import CodebookStatistics, TokenizerTrainingModule, last_layers


class Teacher(torch.nn.Module):
    """Stands for a frozen network of 7 channels."""

    channels = 7

    def forward(self, images, grid):
        generator = torch.Generator().manual_seed(0)
        return torch.randn(len(images), self.channels, *grid, generator=generator)


def batch(size: int = 16) -> torch.Tensor:
    return torch.rand(2, 3, size, size) * 2 - 1


def module_of(vae, teacher=None, **losses) -> tuple[TokenizerTrainingModule, TokenizerLossConfig]:
    config = TokenizerLossConfig(**losses)
    return TokenizerTrainingModule(vae, [config], teacher), config


@pytest.mark.parametrize("sigma_type", ["dynamic", "fixed", "none"])
def test_spectrum_loss_reaches_encoder_complements_and_sigmas(sigma_type):
    vae = VQModelFA(**TINY_VQ, frequency_complement="res")
    spectrum = SpectrumConfig(weight=1.0, type=sigma_type)
    module, losses = module_of(vae, reconstruction="none", commitment=0, spectrum=spectrum)
    loss, logs, _, _ = module(batch(), losses)
    loss.backward()
    assert loss.item() == pytest.approx(logs["spectrum"].item())
    assert len([name for name in logs if name.startswith("sigma_")]) == (4 if sigma_type == "dynamic" else 0)
    assert vae.encoder.conv_in.weight.grad.abs().sum() > 0
    assert vae.decoder.complements[1].block.conv2.weight.grad.abs().sum() > 0
    sigmas = dict(module.named_parameters()).get("spectrum.rho")
    assert (sigmas is not None) == (sigma_type == "dynamic")
    if sigmas is not None:
        assert torch.isfinite(sigmas.grad).all() and sigmas.grad.abs().min() > 0


def test_sigmas_have_a_parameter_group_of_their_own():
    spectrum = SpectrumConfig(weight=1.0, learning_rate=0.01)
    module, _ = module_of(VQModelFA(**TINY_VQ), spectrum=spectrum)
    groups = module.parameter_groups()
    assert groups[1]["lr"] == 0.01 and groups[1]["weight_decay"] == 0 and groups[1]["params"] == [module.spectrum.rho]
    assert sum(len(group["params"]) for group in groups) == len(list(module.parameters()))


def test_a_frozen_encoder_is_not_optimized(tiny_kl):
    vae = AsymmetricAutoencoderKLFA.from_autoencoder_kl(tiny_kl, high_block_out_channels=(8, 8))
    module, losses = module_of(vae)
    (group,) = module.parameter_groups()
    assert {id(p) for p in group["params"]} == {
        id(p) for p in (*vae.decoder.parameters(), *vae.post_quant_conv.parameters())
    }
    loss, *_ = module(batch(), losses)
    loss.backward()
    assert vae.encoder.conv_in.weight.grad is None
    assert vae.decoder.low.conv_in.weight.grad.abs().sum() > 0


def test_codebook_losses_and_statistics():
    module, losses = module_of(VQModelFA(**TINY_VQ).train(), commitment=0.5)
    for _ in range(3):
        loss, logs, _, _ = module(batch(), losses)
    assert 0 < logs["codebook_usage"] <= 1 and 1 <= logs["codebook_perplexity"] <= 32
    assert loss.item() == pytest.approx((logs["reconstruction"] + 0.5 * logs["commitment"]).item(), rel=1e-5)
    assert "kl" not in logs


def test_codebook_statistics_count():
    statistics = CodebookStatistics(8)
    for _ in range(50):
        first = statistics(torch.tensor([[[0, 1], [2, 3]]]))
    assert first["codebook_perplexity"].item() == pytest.approx(4)
    assert first["codebook_usage"].item() == pytest.approx(4 / 8)
    for _ in range(99):
        later = statistics(torch.tensor([[[0, 0], [0, 0]]]))
    assert later["codebook_usage"].item() == pytest.approx(4 / 8)
    assert statistics(torch.tensor([[[0]]]))["codebook_usage"].item() == pytest.approx(1 / 8)  # a hundred batches ago
    assert 1 < later["codebook_perplexity"] < 4


def test_dropped_high_latents_aim_at_the_low_pass_image(tiny_favae):
    x, decoded = batch(), []
    tiny_favae.post_quant_conv = torch.nn.Identity()
    tiny_favae.decoder.register_forward_pre_hook(lambda module, inputs: decoded.append(inputs[0]))
    module, losses = module_of(tiny_favae, high_dropout=1.0)
    *_, target = module(x, losses)
    means = torch.nn.functional.avg_pool2d(x, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.allclose(target, means, atol=1e-5)
    assert not decoded[0][:, 4:].any() and decoded[0][:, :4].any()
    assert torch.equal(module(x, TokenizerLossConfig())[-1], x)


def test_latent_noise_and_scale_equivariance(tiny_favae):
    x, found = batch(), []
    for losses in (TokenizerLossConfig(), TokenizerLossConfig(latent_noise=1.0)):
        torch.manual_seed(0)
        found.append(TokenizerTrainingModule(tiny_favae, [losses])(x, losses))
    (_, plain_logs, plain, _), (_, noisy_logs, noisy, _) = found
    assert plain_logs["kl"] == noisy_logs["kl"] and not torch.allclose(plain, noisy)
    module, losses = module_of(tiny_favae, scale_equivariance=0.25, kl=0)
    loss, logs, _, _ = module(x, losses)
    assert logs["scale_equivariance"] > 0
    assert loss.item() == pytest.approx((logs["reconstruction"] + logs["scale_equivariance"] / 4).item(), rel=1e-5)


def test_losses_are_added_with_their_weights(tiny_favae):
    module, losses = module_of(
        tiny_favae,
        reconstruction="l2",
        kl=0.0,
        mask=0.7,
        ssim=0.5,
        focal_frequency=FocalFrequencyConfig(weight=2.0),
        band=BandConfig(weight=0.3, weights=[0, 1, 1, 2]),
        stft=STFTConfig(weight=0.1, window=8),
    )
    loss, logs, _, _ = module(batch(), losses)
    weights = {"reconstruction": 1, "mask": 0.7, "ssim": 0.5, "focal_frequency": 2, "band": 0.3, "stft": 0.1}
    assert set(logs) == set(weights)
    assert loss.item() == pytest.approx(sum(w * logs[name].item() for name, w in weights.items()), rel=1e-5)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in tiny_favae.parameters() if p.grad is not None)


def test_losses_against_their_formulas(tiny_favae):
    module, losses = module_of(
        tiny_favae,
        Teacher(),
        kl=1e-3,
        alignment=AlignmentConfig(weight=0.5, adaptive=False, distmat_margin=0, cosine_margin=0),
        adversarial=AdversarialConfig(weight=0.3, adaptive=False),
    )
    assert module.projector.in_channels == tiny_favae.low_latent_channels
    discriminator, images, moments = PatchDiscriminator(channels=4, num_layers=1), batch(), []
    tiny_favae.quant_conv.register_forward_hook(lambda module, inputs, output: moments.append(output))
    loss, logs, reconstruction, _ = module(images, losses, discriminator)
    assert logs["reconstruction"].item() == pytest.approx((reconstruction - images).abs().mean().item())
    kl = DiagonalGaussianDistribution(moments[0]).kl().mean() / (3 * 16 * 16)
    assert logs["kl"].item() == pytest.approx(kl.item())
    assert logs["adversarial"].item() == pytest.approx(-discriminator(reconstruction).mean().item(), rel=1e-4)
    expected = logs["reconstruction"] + 1e-3 * logs["kl"] + 0.5 * logs["alignment"] + 0.3 * logs["adversarial"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_losses_of_weight_zero_are_not_computed(tiny_favae):
    class Never(Teacher):
        def forward(self, images, grid):
            raise AssertionError("computed although its weight is 0")

    module, losses = module_of(tiny_favae, Never(), kl=0)
    assert set(module(batch(), losses)[1]) == {"reconstruction"}


def test_adaptive_weights_balance_the_gradients_at_the_last_layers(tiny_favae):
    discriminator = torch.nn.Conv2d(3, 1, 3)
    module, losses = module_of(tiny_favae, Teacher(), kl=0, alignment={"weight": 0.5}, adversarial={"weight": 0.1})
    module.projector.weight.data.mul_(10)
    loss, logs, _, _ = module(batch(), losses, discriminator)
    weighted = 0.5 * logs["alignment_scale"] * logs["alignment"] + 0.1 * logs["adversarial_scale"] * logs["adversarial"]
    assert loss.item() == pytest.approx((logs["reconstruction"] + weighted).item(), rel=1e-4)
    assert 0 < logs["alignment_scale"] <= 10 and 0 < logs["adversarial_scale"] <= 10
    loss.backward()
    assert module.projector.weight.grad.abs().sum() > 0
    torch.manual_seed(1)
    free = module(batch(), losses, discriminator)[1]["adversarial_scale"]
    losses = replace(losses, adversarial=replace(losses.adversarial, max_weight=float(free) / 2))
    torch.manual_seed(1)
    assert module(batch(), losses, discriminator)[1]["adversarial_scale"] == pytest.approx(float(free) / 2)


def test_a_network_whose_last_layer_is_not_known_is_refused():
    with pytest.raises(ConfigError, match="last layer of a Linear is not known: set adaptive=false"):
        last_layers(torch.nn.Linear(1, 1))


def test_a_fixed_alignment_weight_compiles(tiny_favae):
    module, losses = module_of(tiny_favae, Teacher(), alignment=AlignmentConfig(weight=0.5, adaptive=False))
    x, results = batch(), []
    for run in (module, torch.compile(module, backend="aot_eager")):
        torch.manual_seed(0)
        results.append(run(x, losses)[0])
    expected, compiled = results
    compiled.backward()
    assert compiled.item() == pytest.approx(expected.item(), rel=1e-4)
    assert module.projector.weight.grad.abs().sum() > 0


def test_stages_switch_losses_on_and_off():
    without = TokenizerLossConfig()
    aligned = TokenizerLossConfig(alignment={"weight": 0.1, "adaptive": False}, spectrum={"weight": 0.1})
    module = TokenizerTrainingModule(VQModelFA(**TINY_VQ), [without, aligned], Teacher())
    x = batch()
    loss, logs, _, _ = module(x, without)
    assert set(logs) == {"reconstruction", "commitment", "codebook_usage", "codebook_perplexity"}
    loss.backward()  # what this stage does not use has a gradient all the same, of zero
    for idle in (module.projector.weight, module.spectrum.rho):
        assert idle.grad is not None and not idle.grad.any()
    _, logs, _, _ = module(x, aligned)
    assert {"alignment", "spectrum"} < set(logs)


def test_no_pixel_loss_at_all(tiny_favae):
    module, losses = module_of(tiny_favae, reconstruction="none", kl=0, ssim=1.0)
    loss, logs, _, _ = module(batch(), losses)
    assert set(logs) == {"ssim"} and loss.item() == pytest.approx(logs["ssim"].item())


def test_frozen_networks_are_in_no_checkpoint(tiny_favae):
    module, _ = module_of(tiny_favae, Teacher(), alignment=AlignmentConfig(weight=0.5))
    assert list(module.trained_parts()) == ["tokenizer", "projector"]


def test_it_is_an_autoencoder_like_any_other_to_torch():
    vae = AutoencoderKLFA(**TINY_FAVAE)
    module, losses = module_of(vae)
    lay_out_channels_last(module)
    assert vae.encoder.low.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    loss, *_ = module(batch().contiguous(memory_format=torch.channels_last), losses)
    loss.backward()


@pytest.mark.parametrize("target", [0.0, 1e6])
def test_bits_weigh_more_above_the_target(target):
    rate = RateConfig(target=target, weight=0.5, weight_below=0.125)
    module, losses = module_of(HyperpriorModelFA(**TINY_HYPERPRIOR), rate=rate, reconstruction="l2")
    loss, logs, _, _ = module(batch(32), losses)
    expected = logs["reconstruction"] + (0.125 if target else 0.5) * logs["rate"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert logs["bits_per_pixel"] > 0 and logs["rate"] != logs["bits_per_pixel"]
    loss.backward()
    assert all(p.grad is not None for p in module.vae.parameters())


def test_a_compression_model_has_every_loss():
    module, losses = module_of(
        HyperpriorModelFA(**TINY_HYPERPRIOR),
        Teacher(),
        focal_frequency=FocalFrequencyConfig(weight=1.0),
        spectrum=SpectrumConfig(weight=0.1, type="dynamic"),
        adversarial=AdversarialConfig(weight=0.1, start_step=0),
        alignment=AlignmentConfig(weight=0.5),
    )
    loss, logs, _, _ = module(batch(32), losses, PatchDiscriminator(channels=4, num_layers=1))
    named = {"reconstruction", "rate", "focal_frequency", "spectrum", "adversarial", "alignment", "sigma_0", "sigma_1"}
    assert named <= set(logs) and loss.isfinite()
