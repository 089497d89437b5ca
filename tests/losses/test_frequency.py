import math

import pytest
import pywt
import torch
from focal_frequency_loss import FocalFrequencyLoss
from torchvision.transforms import GaussianBlur

from favae.losses.frequency import (
    DynamicSpectrumLoss,
    SpectrumLoss,
    band_loss,
    detail_mask,
    focal_frequency_loss,
    gaussian_spectrum,
)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("size", [(16, 24), (15, 9), (4, 1)])
def test_focal_frequency_loss_agrees_with_the_package(alpha, size):
    prediction, target = torch.randn(3, 3, *size, requires_grad=True), torch.randn(3, 3, *size)
    value = focal_frequency_loss(prediction, target, alpha=alpha)
    expected = FocalFrequencyLoss(alpha=alpha)(prediction, target)
    assert value.item() == pytest.approx(expected.item(), abs=1e-6)
    gradient, wanted = (torch.autograd.grad(v, prediction)[0] for v in (value, expected))
    assert torch.allclose(gradient, wanted, atol=1e-7)


def test_focal_frequency_loss_without_focus_is_the_mean_squared_error():
    prediction, target = torch.randn(2, 3, 8, 12), torch.randn(2, 3, 8, 12)
    value = focal_frequency_loss(prediction, target, alpha=0)
    assert value.item() == pytest.approx((prediction - target).square().mean().item(), rel=1e-5)


@pytest.mark.parametrize("target", [torch.zeros(1, 2, 8, 8), torch.full((1, 2, 8, 8), 0.5), torch.rand(1, 2, 8, 8)])
def test_gradients_are_finite_where_nothing_differs(target):
    prediction = target.clone().requires_grad_()
    losses = SpectrumLoss(1, 2.0, normalize=True), DynamicSpectrumLoss(1, 2.0), DynamicSpectrumLoss(1, kernel_size=3)
    values = [focal_frequency_loss(prediction, target), band_loss(prediction, target)]
    values += [loss([prediction], [target]) for loss in losses]
    assert [value.item() for value in values] == [0] * 5
    for value in values:
        assert torch.isfinite(torch.autograd.grad(value, prediction)[0]).all()


def test_mismatches_are_refused():
    a, b = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match="differ in shape"):
        focal_frequency_loss(a, b)
    with pytest.raises(ValueError):
        SpectrumLoss(2, normalize=False)([a], [a, a])
    with pytest.raises(ValueError):
        band_loss(a, a, weights=(1, 1))
    with pytest.raises(ValueError, match="kernel_size"):
        SpectrumLoss(1, kernel_size=4)
    with pytest.raises(ValueError, match="sigma"):
        DynamicSpectrumLoss(1, 0.2)


def test_published_kernel_is_torchvisions_blur_under_the_package():
    c, a = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16)
    blur = GaussianBlur(5, 3.0)
    expected = FocalFrequencyLoss()(blur(c), blur(a))
    assert SpectrumLoss(1, 3.0, kernel_size=5, normalize=False)([c], [a]).item() == pytest.approx(
        expected.item(), rel=1e-4
    )


def test_exact_gaussian_is_the_limit_of_wide_kernels():
    c, a = torch.zeros(1, 2, 64, 64), torch.zeros(1, 2, 64, 64)
    c[..., 24:40, 24:40] = torch.randn(16, 16)  # far from the border, where the two differ
    exact = SpectrumLoss(1, 2.0, normalize=False)([c], [a]).item()
    assert SpectrumLoss(1, 2.0, kernel_size=31, normalize=False)([c], [a]).item() == pytest.approx(exact, rel=1e-3)
    assert (
        abs(SpectrumLoss(1, 2.0, kernel_size=3, normalize=False)([c], [a]).item() / exact - 1) > 0.5
    )  # nearly a small box
    response = gaussian_spectrum((64, 64), torch.tensor(2.0))
    assert response[0, 0] == 1
    assert response[0, 4].item() == pytest.approx(math.exp(-2 * math.pi**2 * 4 * (4 / 64) ** 2))


def test_without_blur_it_is_the_focal_frequency_loss_of_each_level():
    levels = [(torch.randn(2, 3, n, n), torch.randn(2, 3, n, n)) for n in (16, 8)]
    expected = sum(focal_frequency_loss(c, a) for c, a in levels) / 2
    value = SpectrumLoss(2, 0.0, normalize=False)([c for c, _ in levels], [a for _, a in levels])
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)


def test_both_of_a_pair_are_blurred_alike():
    loss = DynamicSpectrumLoss(3)
    with torch.no_grad():
        loss.rho.copy_(torch.tensor([-1.0, 0.1, 1.0]))
    features = [torch.randn(1, 2, 8, 8) for _ in range(3)]
    assert loss(features, features).item() == 0  # the published code pairs sigma_i with sigma_(3-i): not 0
    assert SpectrumLoss(1, normalize=False)([features[0]], [features[1]]) > 0


def test_low_frequencies_count_more():
    x = torch.arange(32) / 32 * 2 * math.pi
    zero = torch.zeros(1, 1, 32, 32)
    slow, fast = (torch.sin(k * x).expand(1, 1, 32, 32) for k in (1, 8))
    loss = SpectrumLoss(1, 1.0, normalize=False)
    assert loss([slow], [zero]) > 10 * loss([fast], [zero])
    assert focal_frequency_loss(slow, zero).item() == pytest.approx(focal_frequency_loss(fast, zero).item(), rel=1e-4)


def test_sigmas_start_where_told_and_really_move():
    loss = DynamicSpectrumLoss(2, 3.0)
    assert torch.allclose(loss.sigma, torch.tensor([3.0, 3.0]))
    optimizer = torch.optim.Adam(loss.parameters(), 1e-2)
    pairs = [(torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16)) for _ in range(2)]
    for _ in range(300):
        loss([c for c, _ in pairs], [a for _, a in pairs]).backward()
        assert torch.isfinite(loss.rho.grad).all()
        optimizer.step()
        optimizer.zero_grad()
    assert ((loss.sigma - 3).abs() > 0.5).all()
    with torch.no_grad():
        loss.rho.copy_(torch.tensor([100.0, -100.0]))
    assert torch.allclose(loss.sigma, torch.tensor([5.7, 0.3]))  # the ends


def test_the_normalized_loss_has_no_unit_and_no_gradient_to_shrink_its_target():
    c, a = torch.randn(1, 2, 16, 16), torch.randn(1, 2, 16, 16)
    loss = DynamicSpectrumLoss(1)
    assert loss([10 * c], [10 * a]).item() == pytest.approx(loss([c], [a]).item(), rel=1e-4)
    a.requires_grad_()
    (gradient,) = torch.autograd.grad(loss([c], [a]), a)
    plain = SpectrumLoss(1, normalize=False)
    (unscaled,) = torch.autograd.grad(plain([c], [a]), a)
    assert torch.allclose(gradient / gradient.norm(), unscaled / unscaled.norm(), atol=1e-5)


def test_the_mask_is_high_where_the_detail_is():
    images = torch.zeros(2, 3, 16, 16)
    images[0, :, 4:8, 4:8] = torch.rand(3, 4, 4) * 2 - 1  # the second image stays flat
    mask = detail_mask(images)
    assert mask.shape == (2, 1, 16, 16) and torch.allclose(mask.mean(dim=(1, 2, 3)), torch.ones(2))
    assert (mask[0, 0, 4:8, 4:8] > 1).all() and torch.allclose(mask[1], torch.ones(1, 16, 16))
    outside = mask[0, 0].clone()
    outside[4:8, 4:8] = 0
    assert outside.max() < 0.3


def test_everything_is_float32_inside_autocast():
    c, a = torch.randn(1, 2, 16, 16), torch.randn(1, 2, 16, 16)
    losses = [
        lambda p, t: focal_frequency_loss(p, t),
        lambda p, t: band_loss(p, t),
        lambda p, t: SpectrumLoss(1, normalize=False)([p], [t]),
        lambda p, t: DynamicSpectrumLoss(1, kernel_size=5)([p], [t]),
    ]
    for loss in losses:
        expected = loss(c.bfloat16().float(), a.bfloat16().float())
        prediction = c.bfloat16().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(prediction, a.bfloat16())
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)
        assert torch.isfinite(torch.autograd.grad(value, prediction)[0]).all()


@pytest.mark.parametrize("levels", [1, 2])
def test_band_loss_against_pywt(levels):
    prediction, target = torch.randn(1, 2, 16, 24), torch.randn(1, 2, 16, 24)
    weights = (0.5, 1.0, 2.0, 3.0)
    low, expected = (prediction - target).numpy(), 0.0
    for _ in range(levels):
        low, high = pywt.dwt2(low, "db2", mode="periodization")
        expected += sum(w * abs(band).mean() for w, band in zip(weights, (low, *high))) / 4 / levels
    value = band_loss(prediction, target, weights=weights, levels=levels, wavelet="db2")
    assert value.item() == pytest.approx(float(expected), rel=1e-5)
