"""Borders of patches: seen where they are, on rectangles too, and relative to real images."""

import numpy as np
import pytest
import torch
from conftest import TINY_FAVAE
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from favae import AutoencoderKLFA
from favae.eval.seams import neighbor_differences, patch_size_of, relative_seams, seams


def differences(images: torch.Tensor) -> np.ndarray:
    return neighbor_differences(images).double().mean(dim=0).numpy()


@pytest.mark.parametrize("size", [(64, 64), (32, 48)])
def test_seams_are_seen(size):
    height, width = size
    noise = torch.randn(16, 3, height, width)
    patches = torch.randn(16, 3, height // 8, width // 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    plain, blocked = differences(noise), differences(noise + patches)
    assert plain.shape == (width - 1 + height - 1,)
    assert seams(plain, size, 8) == pytest.approx(1, abs=0.03)
    assert seams(blocked, size, 8) == pytest.approx(2**0.5, abs=0.06)  # the differences' variance is 4 against 2
    assert relative_seams(blocked, plain, size, 8) == pytest.approx(2**0.5, abs=0.06)
    assert relative_seams(plain, plain, size, 8) == 1


def test_without_borders_there_is_no_number():
    steps = differences(torch.randn(4, 3, 8, 8))
    assert seams(steps, (8, 8), 8) is None and seams(steps, (8, 8), 1) is None
    assert seams(np.zeros(14), (8, 8), 4) is None  # of images of one color
    assert relative_seams(steps, None, (8, 8), 4) is None and relative_seams(steps, steps, (8, 8), None) is None


def test_an_autoencoder_that_does_not_tell_its_ratio_has_no_seams():
    class Other(ModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self):
            super().__init__()

    assert patch_size_of(Other()) is None and patch_size_of(AutoencoderKLFA(**TINY_FAVAE)) == 4
    assert relative_seams(np.ones(14), np.ones(14), (8, 8), None) is None
