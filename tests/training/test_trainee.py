"""The forward pass of tokenizer training, and the loss on what it gives."""

import pytest
import torch
from conftest import TINY_FAVAE

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
from favae.training.trainee import TokenizerTrainee

TINY_VQ = {
    "block_out_channels": (8, 8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 6,
    "codebook_size": 32,
}


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
    assert len([name for name in output.statistics if name.startswith("sigma_")]) == levels
    encoder = vae.encoder.low if isinstance(vae, AutoencoderKLFA) else vae.encoder
    assert encoder.conv_in.weight.grad.abs().sum() > 0
    sigmas = dict(trainee.named_parameters()).get("spectrum.rho")
    assert (sigmas is not None) == (kind == "dynamic")
    if sigmas is not None:
        assert torch.isfinite(sigmas.grad).all() and sigmas.grad.abs().min() > 0


def test_the_encoder_can_be_spared():
    vae = complemented()
    trainee = trainee_of(vae, spectrum=SpectrumConfig(weight=1.0, detach_encoder=True))
    output = trainee(batch())
    term = output.terms["spectrum"]
    (gradient,) = torch.autograd.grad(term, vae.encoder.low.conv_in.weight, allow_unused=True, retain_graph=True)
    through_decoder = 0 if gradient is None else gradient.abs().sum()
    full = trainee_of(vae, spectrum=SpectrumConfig(weight=1.0))(batch()).terms["spectrum"]
    (whole,) = torch.autograd.grad(full, vae.encoder.low.conv_in.weight)
    assert whole.abs().sum() > through_decoder


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


def test_codebook_perplexity_counts():
    trainee = TokenizerTrainee(VQModelFA(**TINY_VQ))
    indices = torch.tensor([[[0, 1], [2, 3]]])
    statistics = trainee._codebook_statistics(indices)
    assert statistics["codebook_perplexity"].item() == pytest.approx(4)
    assert statistics["codebook_usage"].item() == pytest.approx(4 / 32)


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
        focal_frequency=FocalFrequencyConfig(weight=2.0, patch_factor=2),
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
    trainee = TokenizerTrainee(tiny_favae, feature_channels=7)
    features = torch.randn(2, 7, 4, 4)
    config = TokenizerLossConfig(alignment=AlignmentConfig(weight=0.5, adaptive=False))
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


def test_stages_switch_terms_on_and_off(tiny_favae):
    losses = [TokenizerLossConfig(), TokenizerLossConfig(scale_equivariance=1.0, high_dropout=1.0)]
    trainee = TokenizerTrainee(tiny_favae, losses)
    x = batch()
    assert not trainee(x).terms
    trainee.config = losses[1]
    output = trainee(x)
    assert set(output.terms) == {"scale_equivariance"} and not torch.equal(output.target, x)
