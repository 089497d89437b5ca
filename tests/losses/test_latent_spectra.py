import pytest
import torch
from scipy.fft import dctn

from favae.losses.latent_spectra import dct, inverse_dct, keep_low_frequencies, spectrum_matching_loss


def test_dct_is_scipys():
    images = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    expected = torch.from_numpy(dctn(images.numpy(), axes=(2, 3), norm="ortho"))
    assert torch.allclose(dct(images), expected, atol=1e-6) and torch.allclose(inverse_dct(dct(images)), images)


def test_spectra_that_match():
    """Without flattening, the small image itself; the order of channels means nothing, nor do their means."""
    images = torch.randn(4, 3, 32, 32).cumsum(2).cumsum(3)
    small = torch.nn.functional.interpolate(images, size=(8, 8), mode="bicubic", antialias=True)
    assert spectrum_matching_loss(small, images, delta=0).item() == pytest.approx(0, abs=1e-6)
    assert spectrum_matching_loss(small, images, delta=1).item() > 0.01
    latents = torch.randn(4, 6, 8, 8)
    value = spectrum_matching_loss(latents, images)
    assert value.item() > 0
    for same in (latents[:, torch.randperm(6)], latents + torch.randn(1, 6, 1, 1)):
        assert spectrum_matching_loss(same, images).item() == pytest.approx(value.item(), rel=1e-4)


def test_flattened_spectra_lie_between_images_and_white_noise():
    images = torch.randn(64, 3, 64, 64).cumsum(2).cumsum(3) / 30
    white, smooth = torch.randn(64, 4, 16, 16), torch.randn(64, 4, 16, 16).cumsum(2).cumsum(3) / 8
    losses = [[spectrum_matching_loss(z, images, delta=d).item() for d in (0, 2)] for z in (white, smooth)]
    assert losses[0][1] < losses[0][0]  # the flatter the target, the better for white noise
    assert losses[1][0] < losses[0][0]  # and smooth latents are closer to images as they are


def test_gradients_are_right_and_the_latents_alone():
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    latents = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: spectrum_matching_loss(z, images), latents)
    spectrum_matching_loss(latents, images).backward()
    assert images.grad is None
    constant = torch.zeros(2, 2, 4, 4, requires_grad=True)
    value = spectrum_matching_loss(constant, images.detach())
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(constant.grad).all()


def test_a_first_call_without_gradients_spoils_no_later_one():
    latents, images = torch.randn(2, 2, 7, 5), torch.randn(2, 3, 14, 10)  # a size that no other test has
    with torch.inference_mode():
        spectrum_matching_loss(latents, images)
    spectrum_matching_loss(latents.requires_grad_(), images).backward()
    assert latents.grad.abs().sum() > 0


@pytest.mark.parametrize("share, kept", [(0.0, 64), (1.0, 28), (1.25, 15), (1.5, 6)])
def test_masks_keep_what_is_published(share, kept):
    noise = torch.randn(2, 3, 16, 24)
    masked = keep_low_frequencies(noise, share, 8)
    coefficients = dct(masked[:, :, :8, 8:16])
    assert (
        (coefficients.abs() > 1e-4).any(dim=(0, 1)).sum() == kept
        if kept < 64
        else torch.allclose(masked, noise, atol=1e-5)
    )
    assert torch.allclose(keep_low_frequencies(masked, share, 8), masked, atol=1e-5)


def test_both_sides_of_a_pair_are_cut_at_the_same_relative_frequency():
    """Blocks of 8 in images and of 4 in small latents: the share of what is kept is about the same."""
    for share in (1.0, 1.25, 1.5):
        counts = []
        for block in (4, 8):
            ones = dct(keep_low_frequencies(inverse_dct(torch.ones(1, 1, block, block)), share, block))
            counts.append(ones.round().sum().item() / block**2)
        assert counts[0] == pytest.approx(counts[1], abs=0.07)
    with pytest.raises(ValueError, match="blocks of 8 do not fill 4 x 4"):
        keep_low_frequencies(torch.zeros(1, 1, 4, 4), 1.0, 8)
