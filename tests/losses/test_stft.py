import math

import numpy as np
import pytest
import torch

from favae.losses.stft import STFTLoss, ssim_loss


def waves(phase: float, amplitude: float = 1.0, frequency: int = 4, size: int = 32) -> torch.Tensor:
    x = torch.arange(size) / 16 * 2 * math.pi * frequency
    return amplitude * torch.cos(x + phase).expand(1, 1, size, size).clone()


def test_a_window_is_a_tapered_orthonormal_transform():
    loss = STFTLoss(8, 4, phase="paper")
    images = torch.randn(1, 1, 16, 12)
    spectra = loss.spectrogram(images)
    assert spectra.shape == (1, 1, 3, 2, 8, 5)
    hann = 0.5 * (1 - np.cos(2 * np.pi * np.arange(8) / 8))
    patch = images[0, 0, 4:12, 4:12].numpy() * np.outer(hann, hann)
    assert np.allclose(spectra[0, 0, 1, 1].numpy(), np.fft.rfft2(patch, norm="ortho"), atol=1e-5)


def test_phases_wrap_around():
    first, second = waves(math.pi - 0.01), waves(-math.pi + 0.01)  # 0.02 apart
    near, far = waves(0.0), waves(0.02)
    loss = STFTLoss(phase_weight=1.0)
    assert loss(first, second).item() == pytest.approx(loss(near, far).item(), rel=0.2)
    paper = STFTLoss(phase="paper", phase_weight=1.0)
    assert paper(first, second) > 5 * loss(first, second)


def test_phase_costs_its_arc_and_only_where_there_is_amplitude():
    only_phase = STFTLoss(phase_weight=1.0)(waves(0.0), waves(0.3)) - STFTLoss(phase_weight=0.0)(waves(0), waves(0.3))
    double = STFTLoss(phase_weight=1.0)(waves(0.0, 2), waves(0.3, 2)) - STFTLoss(phase_weight=0.0)(
        waves(0.0, 2), waves(0.3, 2)
    )
    assert double.item() == pytest.approx(2 * only_phase.item(), rel=1e-3)
    noise = torch.randn(1, 1, 32, 32) * 1e-3
    assert STFTLoss(phase_weight=1.0)(noise, noise.flip(-1)) < 1e-2
    assert STFTLoss(phase="paper", phase_weight=1.0)(noise, noise.flip(-1)) > 0.5  # empty frequencies dominate


def test_high_frequencies_count_more():
    zero = torch.zeros(1, 1, 32, 32)
    loss = STFTLoss()
    assert loss(waves(0.0, frequency=6), zero) > 1.5 * loss(waves(0.0, frequency=2), zero)


@pytest.mark.parametrize("phase", ["wrapped", "paper"])
@pytest.mark.parametrize("constant", [0.0, 0.5])
def test_gradients_are_finite_without_amplitude(phase, constant):
    loss = STFTLoss(phase=phase)
    flat = torch.full((2, 3, 32, 32), constant)
    for prediction, target in ((flat, flat), (flat, torch.rand_like(flat)), (flat + 1e-9, flat)):
        prediction = prediction.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(prediction, target), prediction)
        assert torch.isfinite(gradient).all()


def test_the_gradient_is_bounded():
    target = torch.rand(1, 3, 32, 32)
    for size in (1.0, 1e-3, 1e-6, 1e-9):
        prediction = (size * torch.randn(1, 3, 32, 32)).requires_grad_()
        (gradient,) = torch.autograd.grad(STFTLoss()(prediction, target), prediction)
        assert gradient.abs().max() < 1


def test_float32_inside_autocast():
    a, b = torch.rand(1, 3, 32, 32).bfloat16(), torch.rand(1, 3, 32, 32).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value, similarity = STFTLoss()(a, b), ssim_loss(a, b)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(STFTLoss()(a.float(), b.float()).item(), rel=1e-5)
    assert similarity.item() == pytest.approx(ssim_loss(a.float(), b.float()).item(), rel=1e-5)


@pytest.mark.parametrize("phase", ["wrapped", "paper"])
def test_against_its_formula(phase):
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 20, 16)).astype(np.float32)
    window, stride, weight = 8, 4, 3.0
    hann = 0.5 * (1 - np.cos(2 * np.pi * np.arange(window) / window))
    frequency = np.fft.fftfreq(window)
    radius = np.hypot(*np.meshgrid(frequency, frequency, indexing="ij"))  # the whole plane, no mirrored bins
    images = [np.pad(x, window // 2, mode="reflect") if phase == "wrapped" else x for x in (first, second)]
    costs = []
    for row in range(0, images[0].shape[0] - window + 1, stride):
        for column in range(0, images[0].shape[1] - window + 1, stride):
            patches = [x[row : row + window, column : column + window] * np.outer(hann, hann) for x in images]
            p, t = (np.fft.fft2(patch, norm="ortho") for patch in patches)
            if phase == "wrapped":
                angle = np.minimum(abs(p), abs(t)) * abs(np.angle(p * t.conj()))
            else:
                angle = abs(np.angle(p) - np.angle(t))
            costs.append(((abs(abs(p) - abs(t)) + weight * angle) * radius / radius.sum()).sum())
    loss = STFTLoss(window, stride, phase_weight=weight, phase=phase)
    value = loss(*(torch.from_numpy(x)[None, None] for x in (first, second)))
    assert value.item() == pytest.approx(np.mean(costs), rel=1e-4)


@pytest.mark.parametrize(
    "settings, message",
    [({"window": 7}, "window"), ({"stride": 17}, "stride"), ({"phase": "raw"}, "phase")],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        STFTLoss(**settings)


def test_images_smaller_than_a_window():
    with pytest.raises(RuntimeError):
        STFTLoss()(torch.zeros(1, 1, 8, 32), torch.zeros(1, 1, 8, 32))


def test_ssim_loss():
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    assert ssim_loss(image, image).item() == pytest.approx(0, abs=1e-6)
    assert ssim_loss(-image, image) > 1  # every structure inverted
    assert ssim_loss(torch.zeros_like(image), image) > 0.9  # none left
