"""Muon computes in the precision that the processor is fast in, and is timm's otherwise."""

import pytest
import timm.optim
import torch

from favae.precision import fast_dtype
from favae.training import muon
from favae.training.muon import Muon

LEARNING_RATE = 0.1


def stepped(optimizer_class, shape):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(shape))
    weight.grad = torch.randn(shape)
    optimizer_class([weight], LEARNING_RATE, nesterov=True).step()
    return weight.detach()


@pytest.mark.parametrize("shape", [(16, 24), (16, 8, 3, 3)])
def test_the_first_step_is_the_nearest_orthogonal_matrix(monkeypatch, shape):
    published = timm.optim.muon.zeropower_via_newtonschulz
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(muon, "fast_dtype", lambda device, dtype=dtype: dtype)
        found[dtype] = stepped(Muon, shape)
    assert timm.optim.muon.zeropower_via_newtonschulz is published
    assert torch.equal(found[torch.bfloat16], stepped(timm.optim.Muon, shape))
    assert not torch.equal(found[torch.float32], found[torch.bfloat16])

    exact = {key: value.flatten(1).double() / LEARNING_RATE for key, value in found.items()}
    scale = 0.2 * max(exact[torch.float32].shape) ** 0.5
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape).flatten(1).double(), full_matrices=False)
    for update in exact.values():  # five iterations leave singular values near 1
        torch.testing.assert_close(-update / scale, u @ v, rtol=0, atol=0.3)


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [({"avx2": True, "avx512_bf16": False}, torch.float32), ({"avx512_bf16": True}, torch.bfloat16)],
)
def test_processors_without_bfloat16_compute_in_float32(monkeypatch, capabilities, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert fast_dtype("cpu") == dtype
    assert fast_dtype("cuda") == torch.bfloat16


def test_a_torch_that_does_not_say_gets_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert fast_dtype("cpu") == torch.float32
