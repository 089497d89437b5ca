"""Muon computes in the precision that the processor is fast in, and is timm's otherwise."""

from copy import deepcopy

import pytest
import timm.optim
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

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


@pytest.mark.parametrize("batch", [2**24, 500])
def test_matrices_of_one_shape_are_orthogonalized_together_as_timm_does_one_by_one(monkeypatch, batch):
    monkeypatch.setattr(muon, "_is_alone", lambda param: False)
    monkeypatch.setattr(muon, "BATCH", batch)
    monkeypatch.setattr(muon, "fast_dtype", lambda device: torch.bfloat16)
    shapes = [(16, 24), (8, 4, 3, 3), (16, 24), (24, 16), (16, 24), (16, 6, 2, 2)]
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    timms = [torch.nn.Parameter(weight.detach().clone()) for weight in ours]
    optimizers = [
        optimizer([*weights], LEARNING_RATE, nesterov=True, weight_decay=0.1)
        for optimizer, weights in ((Muon, ours), (timm.optim.Muon, timms))
    ]
    for _ in range(3):
        for own, other in zip(ours, timms):
            own.grad = torch.randn_like(own)
            other.grad = own.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert max(map(len, muon._batches(ours))) == (4 if batch > 500 else 1)
    for own, other in zip(ours, timms):
        torch.testing.assert_close(own, other, rtol=0, atol=0.01 * LEARNING_RATE)


def test_sharded_matrices_are_those_of_a_whole_model(monkeypatch, tmp_path):
    monkeypatch.setattr(muon, "fast_dtype", lambda device: torch.float32)
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8))
    sharded = deepcopy(whole)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
        images = torch.randn(4, 8)
        for model in (whole, sharded):
            weights = [layer.weight for layer in model]
            optimizer = Muon(weights, LEARNING_RATE, nesterov=True, weight_decay=0.1)
            for _ in range(2):
                model(images).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        for expected, found in zip(whole.parameters(), sharded.parameters()):
            assert isinstance(found, DTensor)
            torch.testing.assert_close(found.full_tensor(), expected, rtol=1e-4, atol=1e-5)
    finally:
        distributed.destroy_process_group()


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
