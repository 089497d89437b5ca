import copy
import runpy
import sys
import warnings

import numpy as np
import pytest
import pywt
import torch

from favae import InverseWaveletTransform2D, WaveletTransform2D, wavelets
from favae.wavelets import WaveletBands

ORTHOGONAL = ["haar", "db2", "db4", "sym4", "coif1"]
BIORTHOGONAL = ["bior2.2", "bior4.4", "rbio3.1"]


@pytest.mark.parametrize("wavelet", ORTHOGONAL + BIORTHOGONAL)
def test_perfect_reconstruction(wavelet):
    images = torch.randn(2, 3, 24, 32)
    low, high = WaveletTransform2D(wavelet)(images)
    assert low.shape == (2, 3, 12, 16) and high.shape == (2, 3, 3, 12, 16)
    assert torch.allclose(InverseWaveletTransform2D(wavelet)(low, high), images, atol=1e-5)


@pytest.mark.parametrize("wavelet", ORTHOGONAL + BIORTHOGONAL)
def test_float64_is_not_that_of_float32_filters(wavelet):
    images = torch.randn(1, 1, 24, 32, dtype=torch.float64)
    error = InverseWaveletTransform2D(wavelet)(*WaveletTransform2D(wavelet)(images)) - images
    assert error.abs().max() < 1e-9


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


@pytest.mark.parametrize("wavelet", ["haar", "db4", "bior4.4"])
def test_gradients_are_exact(wavelet):
    images = torch.randn(1, 2, 10, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(WaveletTransform2D(wavelet), images)
    low = torch.randn(1, 1, 5, 6, dtype=torch.float64, requires_grad=True)
    high = torch.randn(1, 1, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    inverse = InverseWaveletTransform2D(wavelet)
    assert torch.autograd.gradcheck(inverse, (low, high))
    assert torch.autograd.gradcheck(lambda bands: inverse(low.detach(), bands), high)  # the low band may be a constant


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


@pytest.mark.parametrize("change", ["half", "bfloat16", "to_empty", "deepcopy", "default_dtype"])
def test_filters_stay_exact_whatever_happens_to_the_module(change):
    """They would be rounded by casts, and uninitialized after the meta device."""
    if change == "to_empty":
        with torch.device("meta"):
            bands = WaveletBands("db2", 2)
        assert bands(torch.zeros(1, 3, 16, 16, device="meta"))[1].shape == (1, 45, 4, 4)
        bands.to_empty(device="cpu")
    elif change == "default_dtype":  # what from_pretrained(torch_dtype=...) does
        torch.set_default_dtype(torch.float16)
        try:
            bands = WaveletBands("db2", 2)
        finally:
            torch.set_default_dtype(torch.float32)
    else:
        bands = WaveletBands("db2", 2)
        filters = bands.transform.filters
        bands = copy.deepcopy(bands) if change == "deepcopy" else getattr(bands, change)()
        assert (bands.transform.filters is filters) == (change != "deepcopy")  # hooks of offloading know the tensor
    images, expected = torch.randn(1, 3, 16, 16), WaveletBands("db2", 2)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(bands(images), expected(images)))
    assert not bands.state_dict()


@pytest.mark.parametrize("wavelet", ["haar", "bior4.4"])
def test_compiles_without_graph_breaks_and_exports(wavelet):
    bands, images = WaveletBands(wavelet), torch.randn(2, 3, 16, 16)

    class RoundTrip(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bands = bands

        def forward(self, images):
            return self.bands.inverse(*self.bands(images))

    compiled = torch.compile(RoundTrip(), backend="eager", fullgraph=True)
    exported = torch.export.export(RoundTrip(), (images,)).module()
    assert torch.allclose(compiled(images), images, atol=1e-5) and torch.allclose(exported(images), images, atol=1e-5)


def test_sizes_and_wavelets_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="even .* 15x16"):
        WaveletTransform2D()(torch.zeros(1, 3, 15, 16))
    with pytest.raises(ValueError, match="at least 10 .*bior4.4.* 8x16"):  # the package would give another image back
        WaveletTransform2D("bior4.4")(torch.zeros(1, 3, 8, 16))
    with pytest.raises(ValueError, match="at least 10 .*bior4.4.* 16x8"):
        InverseWaveletTransform2D("bior4.4")(torch.zeros(1, 3, 8, 4), torch.zeros(1, 3, 3, 8, 4))
    with pytest.raises(ValueError, match="no-such-bank"):
        WaveletTransform2D("no-such-bank")


def test_the_smallest_sizes_are_right():
    for wavelet, size in (("haar", 2), ("db4", 8), ("bior4.4", 10)):
        images = torch.randn(1, 1, size, size)
        low, high = WaveletTransform2D(wavelet)(images)
        assert np.allclose(low, pywt.dwt2(images.numpy(), wavelet, mode="periodization")[0], atol=1e-5)
        assert torch.allclose(InverseWaveletTransform2D(wavelet)(low, high), images, atol=1e-5)


def test_importing_the_package_warns_of_nothing(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] in ("pytorch_wavelets", "pkg_resources")]:
        monkeypatch.delitem(sys.modules, name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runpy.run_path(wavelets.__file__)
        assert "pytorch_wavelets" in sys.modules
    assert not [warning for warning in caught if "pkg_resources" in str(warning.message)]


@pytest.mark.parametrize("wavelet", ["haar", "db2", "bior2.2"])
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_bands_join_to_the_image(wavelet, levels):
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    bands = WaveletBands(wavelet, levels, 2.0, 0.5)
    low, high = bands(images)
    size = (32 // 2**levels, 48 // 2**levels)
    assert low.shape == (2, 3, *size) and high.shape == (2, 3 * bands.num_high_bands, *size)
    assert torch.allclose(bands.inverse(low, high), images, atol=1e-5)


def test_bands_of_a_flat_image_and_of_its_details():
    bands = WaveletBands("haar", 2, 2.0, 0.5)
    flat = torch.full((1, 3, 8, 8), 0.3)
    low, high = bands(flat)
    assert torch.allclose(low, torch.full((1, 3, 2, 2), 0.3), atol=1e-6) and high.abs().max() < 1e-6
    blocks = torch.rand(1, 3, 2, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)
    noisy = blocks + 0.1 * torch.randn(1, 3, 8, 8)
    means = torch.nn.functional.avg_pool2d(noisy, 4)
    assert torch.allclose(bands.low_pass(noisy), means.repeat_interleave(4, 2).repeat_interleave(4, 3), atol=1e-5)
