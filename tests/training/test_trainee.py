"""The forward pass of tokenizer training, and the loss on what it gives."""

import pytest
import torch
from conftest import TINY_FAVAE, TINY_VQ

from favae import AutoencoderKLFA, VQModelFA
from favae.losses.tokenizer_loss import (
    AlignmentConfig,
    BandConfig,
    FocalFrequencyConfig,
    SpectrumConfig,
    STFTConfig,
    TokenizerLoss,
    TokenizerLossConfig,
)
from favae.training.trainee import CodebookStatistics, TokenizerTrainee


def batch(size: int = 16) -> torch.Tensor:
    return torch.rand(2, 3, size, size) * 2 - 1


def trainee_of(vae, **loss) -> TokenizerTrainee:
    return TokenizerTrainee(vae, [TokenizerLossConfig(**loss)])


def complemented(kind: str = "conv") -> AutoencoderKLFA:
    return AutoencoderKLFA(**TINY_FAVAE, frequency_complement=kind)


@pytest.mark.parametrize("kind", ["dynamic", "fixed", "none"])
@pytest.mark.parametrize("vae", [complemented("res"), VQModelFA(**TINY_VQ)], ids=["kl", "vq"])
def test_spectrum_loss_reaches_encoder_complements_and_sigmas(vae, kind):
    vae.zero_grad()
    trainee = trainee_of(vae, spectrum=SpectrumConfig(weight=1.0, kind=kind))
    output = trainee(batch())
    output.terms["spectrum"].backward()
    levels = 8 if isinstance(vae, AutoencoderKLFA) else 4
    sigmas_logged = len([name for name in output.statistics if name.startswith("sigma_")])
    assert sigmas_logged == (levels if kind == "dynamic" else 0)
    assert len(trainee.spectrum.sigma) == levels
    encoder = vae.encoder.low if isinstance(vae, AutoencoderKLFA) else vae.encoder
    assert encoder.conv_in.weight.grad.abs().sum() > 0
    sigmas = dict(trainee.named_parameters()).get("spectrum.rho")
    assert (sigmas is not None) == (kind == "dynamic")
    if sigmas is not None:
        assert torch.isfinite(sigmas.grad).all() and sigmas.grad.abs().min() > 0


def test_the_encoder_can_be_spared():
    gradients = []
    for spared in (False, True):
        vae = complemented("conv")  # its complements are zero, and so is every gradient through them to the encoder
        trainee = trainee_of(vae, spectrum=SpectrumConfig(weight=1.0, detach_encoder=spared))
        trainee(batch()).terms["spectrum"].backward()
        gradients.append(sum(float(p.grad.abs().sum()) for p in vae.encoder.parameters() if p.grad is not None))
    assert gradients[0] > 0 and gradients[1] == 0


def test_sigmas_have_a_group_of_their_own():
    trainee = trainee_of(complemented(), spectrum=SpectrumConfig(weight=1.0, learning_rate=0.01))
    groups = trainee.parameter_groups()
    assert groups[1]["lr"] == 0.01 and groups[1]["weight_decay"] == 0 and groups[1]["params"] == [trainee.spectrum.rho]
    count = sum(len(group["params"]) for group in groups)
    assert count == len(list(trainee.parameters()))


def test_a_frozen_encoder_is_not_optimised(tiny_kl):
    vae = AutoencoderKLFA.from_autoencoder_kl(tiny_kl, high_block_out_channels=(8, 8))
    trainee = TokenizerTrainee(vae)
    trained = {id(p) for group in trainee.parameter_groups() for p in group["params"]}
    assert trained == {id(p) for p in (*vae.decoder.parameters(), *vae.post_quant_conv.parameters())}
    config = TokenizerLossConfig()
    total, _ = TokenizerLoss(config, vae)(x := batch(), trainee(x))
    total.backward()
    assert vae.encoder.conv_in.weight.grad is None
    assert vae.decoder.low.conv_in.weight.grad.abs().sum() > 0


def test_codebook_terms_and_statistics():
    vae = VQModelFA(**TINY_VQ).train()
    trainee = TokenizerTrainee(vae)
    for _ in range(3):
        output = trainee(x := batch())
    assert output.moments is None
    assert 0 < output.statistics["codebook_usage"] <= 1
    assert 1 <= output.statistics["codebook_perplexity"] <= 32
    total, terms = TokenizerLoss(TokenizerLossConfig(commitment=0.5), vae)(x, output)
    assert total.item() == pytest.approx((terms["reconstruction"] + 0.5 * terms["commitment"]).item(), rel=1e-5)
    assert {"codebook_usage", "codebook_perplexity"} < set(terms) and "kl" not in terms


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
    x = batch()
    output = trainee_of(tiny_favae, high_dropout=1.0)(x)
    means = torch.nn.functional.avg_pool2d(x, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.allclose(output.target, means, atol=1e-5)
    assert torch.equal(TokenizerTrainee(tiny_favae)(x).target, x)
    seen = []
    identity = AutoencoderKLFA(**TINY_FAVAE, use_post_quant_conv=False)
    identity.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    trainee_of(identity, high_dropout=1.0)(x)
    assert not seen[0][:, 4:].any() and seen[0][:, :4].any()


def test_latent_noise_and_scale_equivariance(tiny_favae):
    x = batch()
    torch.manual_seed(0)
    plain = TokenizerTrainee(tiny_favae)(x)
    torch.manual_seed(0)
    noisy = trainee_of(tiny_favae, latent_noise=1.0)(x)
    assert torch.equal(plain.moments, noisy.moments) and not torch.allclose(plain.sample, noisy.sample)
    output = trainee_of(tiny_favae, scale_equivariance=1.0)(x)
    assert output.terms["scale_equivariance"] > 0
    total, terms = TokenizerLoss(TokenizerLossConfig(scale_equivariance=0.25, kl=0), tiny_favae)(x, output)
    assert total.item() == pytest.approx((terms["reconstruction"] + terms["scale_equivariance"] / 4).item(), rel=1e-5)


def test_frequency_terms_are_added_with_their_weights(tiny_favae):
    config = TokenizerLossConfig(
        reconstruction="l2",
        kl=0.0,
        ssim=0.5,
        focal_frequency=FocalFrequencyConfig(weight=2.0),
        band=BandConfig(weight=0.3, weights=[0, 1, 1, 2]),
        stft=STFTConfig(weight=0.1, window=8),
    )
    x = batch()
    total, terms = TokenizerLoss(config, tiny_favae)(x, TokenizerTrainee(tiny_favae)(x))
    assert set(terms) == {"reconstruction", "ssim", "focal_frequency", "band", "stft"}
    weights = {"reconstruction": 1, "ssim": 0.5, "focal_frequency": 2, "band": 0.3, "stft": 0.1}
    assert total.item() == pytest.approx(sum(w * terms[name].item() for name, w in weights.items()), rel=1e-5)
    total.backward()
    assert all(torch.isfinite(p.grad).all() for p in tiny_favae.parameters() if p.grad is not None)


def test_a_fixed_alignment_weight_compiles(tiny_favae):
    features = torch.randn(2, 7, 4, 4)
    config = TokenizerLossConfig(alignment=AlignmentConfig(weight=0.5, adaptive=False))
    trainee = TokenizerTrainee(tiny_favae, [config], feature_channels=7)
    objective = TokenizerLoss(config, tiny_favae, foundation=lambda images, grid: features)

    def step(images):
        return objective(images, trainee(images))[0]

    x = batch()
    torch.manual_seed(0)
    expected = step(x)
    torch.manual_seed(0)
    compiled = torch.compile(step, backend="aot_eager")(x)
    compiled.backward()
    assert compiled.item() == pytest.approx(expected.item(), rel=1e-4)
    assert trainee.projection.weight.grad.abs().sum() > 0


def test_stages_switch_terms_on_and_off():
    losses = [TokenizerLossConfig(), TokenizerLossConfig(scale_equivariance=1.0, high_dropout=1.0)]
    losses[1].alignment.weight = losses[1].spectrum.weight = 0.1
    trainee = TokenizerTrainee(complemented(), losses, feature_channels=7)
    x = batch()
    output = trainee(x)
    assert not output.terms and output.projected is None
    output.sample.sum().backward()  # what is idle has a gradient all the same, of zero
    for idle in (trainee.projection.weight, trainee.spectrum.rho):
        assert idle.grad is not None and not idle.grad.any()
    trainee.config = losses[1]
    output = trainee(x)
    assert set(output.terms) == {"scale_equivariance", "spectrum"} and not torch.equal(output.target, x)
    assert output.projected.shape == (2, 7, 4, 4)


def test_no_pixel_loss_at_all(tiny_favae):
    x = batch()
    total, terms = TokenizerLoss(TokenizerLossConfig(reconstruction="none", kl=0, ssim=1.0), tiny_favae)(
        x, TokenizerTrainee(tiny_favae)(x)
    )
    assert set(terms) == {"ssim"} and total.item() == pytest.approx(terms["ssim"].item())
