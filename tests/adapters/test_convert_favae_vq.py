import copy

import pytest
import torch
from original_layouts import FrequencyAugmentedCodec, randomize

from favae import VQModelFA
from favae.adapters import vq_model_fa_from_favae_vq
from favae.errors import CheckpointError

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def build(config, state):
    model = VQModelFA(**config).eval()
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"kind": "res", "layers": 2},
        {"kind": "attn"},
        {"latents": 3, "dimension": 8, "attention": False, "widths": (32, 64)},
    ],
    ids=["conv", "res", "attn", "f4"],
)
@torch.no_grad()
def test_published_codec_gives_the_same_indices_and_images(layout, tmp_path):
    original = randomize(FrequencyAugmentedCodec(**layout))
    training = {"sigmas": torch.ones(4), "discriminator.main.0.weight": torch.zeros(1), "encoder.sigmas": torch.ones(4)}
    model = build(*vq_model_fa_from_favae_vq(original.state_dict() | training))
    latents = original.encode(IMAGES)
    torch.testing.assert_close(model.encode(IMAGES).latents, latents, atol=1e-5, rtol=1e-5)
    codes, indices = original.quantize(latents)
    assert len(indices.unique()) > 2
    quantized = model.quantize(latents)
    assert torch.equal(quantized.indices, indices)
    torch.testing.assert_close(quantized.latents, codes, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.lookup(indices), codes, atol=1e-5, rtol=1e-5)
    images = original.decode(codes)
    torch.testing.assert_close(model(IMAGES).sample, images, atol=1e-4, rtol=1e-4)

    model.save_pretrained(tmp_path)
    for other in (VQModelFA.from_pretrained(tmp_path), copy.deepcopy(model)):
        assert torch.equal(other.decode(indices).sample, model.decode(indices).sample)
        assert torch.equal(other(IMAGES).sample, model(IMAGES).sample)


def test_training_keeps_the_lengths_of_the_entries_and_moves_their_directions():
    model = build(*vq_model_fa_from_favae_vq(randomize(FrequencyAugmentedCodec()).state_dict())).train()
    norms, entries = model.entry_norms.clone(), model.codebook._codebook.embed.clone()
    latents = model.encode(IMAGES).latents
    quantized = model.quantize(latents)
    # the entries that were used before this step, stretched
    torch.testing.assert_close(quantized.latents.norm(dim=1), norms[quantized.indices], atol=1e-5, rtol=1e-5)
    quantized.latents.sum().backward()
    assert torch.equal(model.entry_norms, norms)
    assert not torch.equal(model.codebook._codebook.embed, entries)
    unit = model.codebook._codebook.embed.norm(dim=-1)
    torch.testing.assert_close(unit, torch.ones_like(unit))


def test_what_is_not_of_the_layout_is_named():
    state = FrequencyAugmentedCodec().state_dict()

    def refused(match: str, without: str = "-", **changes) -> None:
        with pytest.raises(CheckpointError, match=match):
            kept = {name: state[name] for name in state if not name.startswith(without)}
            vq_model_fa_from_favae_vq(kept | {name.replace("/", "."): t for name, t in changes.items()})

    refused(r"^lacks decoder\.fcm_1: its decoder has no", without="decoder.fcm_1")
    refused(r"^lacks decoder\.fcm_3\.block\.0\.bias, ", without="decoder.fcm_3")
    refused(r"^has decoder\.quant_conv_in\.weight, which", **{"decoder/quant_conv_in/weight": torch.zeros(1)})
    refused(r"embed_avg; VQModelFA's codebook", **{"quantizer/_codebook/embed_avg": torch.zeros(1)})
    refused(r"^lacks encoder\.down\.0\.block", without="encoder.down.0.")
    refused(r"^lacks quantizer\._codebook\.cluster_size$", without="quantizer._codebook.cluster_size")
    refused(r"^decoder\.conv_in\.bias has shape \(3,\), expected \(64,\)", **{"decoder/conv_in/bias": torch.zeros(3)})
    refused(
        r"^encoder\.final\.2\.weight has shape \(64, 64, 3, 3\), expected \(32, ",  # double_z
        **{"encoder/final/2/weight": torch.zeros(64, 64, 3, 3)},
    )
    everywhere = {"encoder/down/1/attn/in_proj_weight": torch.zeros(1)}  # in place of the first change of size
    refused(r"attention at the levels \[0, 1\]", without="encoder.down.1.", **everywhere)
