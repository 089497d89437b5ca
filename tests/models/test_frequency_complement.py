import pytest
import torch
from conftest import TINY_VQ
from diffusers.models.autoencoders.vae import Decoder

from favae import VQModelFA
from favae.models.frequency_complement import ComplementedDecoder, FeatureRecorder, FrequencyComplement


@pytest.mark.parametrize("type", ["conv", "res", "attn"])
@pytest.mark.parametrize("channels", [3, 13, 16])
def test_shapes_and_gradients(type, channels):
    module = FrequencyComplement(type, channels, 8)
    sample = torch.randn(2, channels, 4, 6, requires_grad=True)
    output = module(sample)
    assert output.shape == sample.shape
    assert torch.autograd.grad(output.square().sum(), sample)[0].abs().sum() > 0


def test_conv_changes_nothing_at_the_start_and_learns():
    module = FrequencyComplement("conv", 8, 4)
    sample = torch.randn(2, 8, 4, 4)
    assert torch.equal(module(sample), sample)
    module(sample).square().sum().backward()
    assert module.block.conv2.weight.grad.abs().sum() > 0
    assert not torch.equal(FrequencyComplement("res", 8, 4)(sample), sample)


def test_a_trained_decoder_with_conv_complements_decodes_as_before():
    settings = {
        "in_channels": 6,
        "out_channels": 3,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    plain, without = Decoder(**settings), ComplementedDecoder(**settings, frequency_complement=None)
    complemented = ComplementedDecoder(**settings, frequency_complement="conv")
    without.load_state_dict(plain.state_dict())
    missing = complemented.load_state_dict(plain.state_dict(), strict=False)
    assert all(key.startswith("complements.") for key in missing.missing_keys) and not missing.unexpected_keys
    latents = torch.randn(2, 6, 4, 4)
    assert torch.equal(complemented(latents), plain(latents)) and torch.equal(without(latents), plain(latents))


@pytest.mark.parametrize("type", ["conv", "res", "attn"])
def test_pairs(type):
    vae = VQModelFA(**TINY_VQ, frequency_complement=type)
    with FeatureRecorder(vae.compared_modules) as recorder:
        latents = vae.encode(torch.rand(2, 3, 16, 16)).latents
        vae.decode(latents)
    complements, activations = recorder.pairs()
    assert [c.shape for c in complements] == [a.shape for a in activations]
    assert [tuple(c.shape[1:]) for c in complements] == [(8, 16, 16), (16, 4, 4), (16, 4, 4), (6, 4, 4)]
    assert not any(module._forward_hooks for pair in vae.compared_modules for module in pair)


def test_only_the_first_pass_is_recorded():
    vae = VQModelFA(**TINY_VQ, frequency_complement="res").eval()
    with FeatureRecorder(vae.compared_modules) as recorder:
        latents = vae.encode(torch.rand(1, 3, 16, 16)).latents
        vae.decode(latents)
        vae.decode(latents[..., :2, :2])
    assert [c.shape for c in recorder.pairs()[0]] == [a.shape for a in recorder.pairs()[1]]


def test_what_is_compared():
    vae = VQModelFA(**TINY_VQ, frequency_complement="res").eval()
    seen = {}
    for name in ("conv_in", "mid_block"):
        getattr(vae.encoder, name).register_forward_hook(lambda m, i, out, name=name: seen.__setitem__(name, out))
    vae.decoder.complements[3].register_forward_hook(lambda m, i, out: seen.__setitem__("last", out))
    with FeatureRecorder(vae.compared_modules) as recorder:
        latents = vae.encode(torch.rand(1, 3, 16, 16)).latents
        vae.decode(latents)
    complements, activations = recorder.pairs()
    assert activations[0] is seen["conv_in"] and activations[2] is seen["mid_block"]
    assert torch.equal(activations[3], latents)
    assert complements[0] is seen["last"]  # "res": the sum
    vae = VQModelFA(**TINY_VQ, frequency_complement="conv").eval()
    with FeatureRecorder(vae.compared_modules) as recorder:
        vae.decode(vae.encode(torch.rand(1, 3, 16, 16)).latents)
    assert not any(c.any() for c in recorder.pairs()[0])  # "conv": the complement, zero at the start
