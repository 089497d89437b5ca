import numpy as np
import pytest
import pywt
import torch

from favae import InverseWaveletTransform2D, WaveletTransform2D
from favae.wavelets import WaveletBands

ORTHOGONAL = ["haar", "db2", "db4", "sym4", "coif1"]
BIORTHOGONAL = ["bior2.2", "bior4.4", "rbio3.1"]


@pytest.mark.parametrize("wavelet", ORTHOGONAL + BIORTHOGONAL)
def test_perfect_reconstruction(wavelet):
    images = torch.randn(2, 3, 24, 32)
    low, high = WaveletTransform2D(wavelet)(images)
    assert low.shape == (2, 3, 12, 16) and high.shape == (2, 3, 3, 12, 16)
    assert torch.allclose(InverseWaveletTransform2D(wavelet)(low, high), images, atol=1e-5)


@pytest.mark.parametrize("wavelet", ORTHOGONAL)
def test_parseval(wavelet):
    images = torch.randn(2, 3, 24, 32)
    low, high = WaveletTransform2D(wavelet)(images)
    assert (low.square().sum() + high.square().sum()).item() == pytest.approx(images.square().sum().item(), rel=1e-5)


@pytest.mark.parametrize("wavelet", ORTHOGONAL + BIORTHOGONAL)
def test_bands_are_those_of_pywt_in_its_order(wavelet):
    images = torch.randn(2, 3, 24, 32)
    low, high = WaveletTransform2D(wavelet)(images)
    expected_low, expected_high = pywt.dwt2(images.numpy(), wavelet, mode="periodization")
    assert np.allclose(low, expected_low, atol=1e-5)
    for band, expected in enumerate(expected_high):
        assert np.allclose(high[:, :, band], expected, atol=1e-5)


@pytest.mark.parametrize("wavelet", ["haar", "bior4.4"])
def test_gradients_are_exact(wavelet):
    forward, inverse = WaveletTransform2D(wavelet), InverseWaveletTransform2D(wavelet)
    images = torch.randn(1, 2, 12, 12, requires_grad=True)
    weights = torch.randn(1, 2, 4, 6, 6)

    def bands(x):
        low, high = forward(x)
        return torch.cat([low.unsqueeze(2), high], dim=2)

    # the transform is linear: <w, T x> differentiated by x is the adjoint, which <w, T e_i> gives one by one
    (gradient,) = torch.autograd.grad((bands(images) * weights).sum(), images)
    basis = torch.eye(images.numel()).view(-1, 2, 12, 12)
    expected = (bands(basis) * weights).sum((1, 2, 3, 4)).view_as(images)
    assert torch.allclose(gradient, expected, atol=1e-5)

    low = torch.randn(1, 1, 6, 6, requires_grad=True)
    high = torch.randn(1, 1, 3, 6, 6)
    (gradient,) = torch.autograd.grad(inverse(low, high).square().sum(), low)
    step = torch.randn_like(low) * 1e-2
    with torch.no_grad():
        difference = inverse(low + step, high).square().sum() - inverse(low - step, high).square().sum()
    assert difference.item() == pytest.approx(2 * (gradient * step).sum().item(), rel=1e-2)


def test_haar_low_band_is_twice_the_mean():
    images = torch.rand(1, 3, 8, 8)
    low, high = WaveletTransform2D()(images)
    assert torch.allclose(low, 2 * torch.nn.functional.avg_pool2d(images, 2), atol=1e-6)
    assert torch.allclose(WaveletTransform2D()(torch.full((1, 3, 8, 8), 0.7))[1], torch.zeros(()), atol=1e-6)


def test_float32_inside_autocast():
    images = torch.randn(1, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, high = WaveletTransform2D("db2")(images)
        restored = InverseWaveletTransform2D("db2")(low, high)
    assert restored.dtype == torch.float32 and torch.allclose(restored, images, atol=1e-5)


def test_odd_sizes_and_unknown_banks_are_refused():
    with pytest.raises(ValueError, match="even"):
        WaveletTransform2D()(torch.zeros(1, 3, 15, 16))
    with pytest.raises(ValueError, match="no-such-bank"):
        WaveletTransform2D("no-such-bank")


@pytest.mark.parametrize("wavelet", ["haar", "db2", "bior2.2"])
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_bands_join_to_the_image(wavelet, levels):
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    bands = WaveletBands(wavelet, levels, 2.0, 0.5)
    low, high = bands.split(images)
    size = (32 // 2**levels, 48 // 2**levels)
    assert low.shape == (2, 3, *size) and high.shape == (2, 3 * bands.high_bands, *size)
    assert torch.allclose(bands.join(low, high), images, atol=1e-5)


def test_bands_of_a_flat_image_and_of_its_details():
    bands = WaveletBands("haar", 2, 2.0, 0.5)
    flat = torch.full((1, 3, 8, 8), 0.3)
    low, high = bands.split(flat)
    assert torch.allclose(low, torch.full((1, 3, 2, 2), 0.3), atol=1e-6) and high.abs().max() < 1e-6
    blocks = torch.rand(1, 3, 2, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)
    noisy = blocks + 0.1 * torch.randn(1, 3, 8, 8)
    means = torch.nn.functional.avg_pool2d(noisy, 4)
    assert torch.allclose(bands.low_pass(noisy), means.repeat_interleave(4, 2).repeat_interleave(4, 3), atol=1e-5)


def test_impossible_levels():
    with pytest.raises(ValueError, match="wavelet_levels must be at least 1"):
        WaveletBands("haar", 0, 1.0, 1.0)
