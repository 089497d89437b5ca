import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from original_layouts import VQGAN, LatentDiffusionAutoencoder, randomize

from favae.adapters import autoencoder_kl_from_ldm, ldm_from_autoencoder_kl, taming_from_vq_model, vq_model_from_taming
from favae.errors import CheckpointError

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def build(kind, config, state):
    model = kind(**config).eval()
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize(
    "layout",
    [{}, {"up": ()}, {"down": (1, 2), "up": (0, 1)}, {"down": (), "up": (), "layers": 2, "widths": (64, 32)}],
    ids=["vavae", "mar", "two levels", "none"],
)
@torch.no_grad()
def test_autoencoders_of_latent_diffusion_give_the_same_latents_and_images(layout):
    original = randomize(LatentDiffusionAutoencoder(**layout))
    config, state = autoencoder_kl_from_ldm(original.state_dict())
    vae = build(AutoencoderKL, config, state)
    moments = original.encode(IMAGES)
    latents = moments.chunk(2, 1)[0]
    assert latents.std() > 0.1
    torch.testing.assert_close(vae.encode(IMAGES).latent_dist.parameters, moments, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vae.decode(latents).sample, original.decode(latents), atol=1e-5, rtol=1e-5)
    assert (config["scaling_factor"], config["shift_factor"], config["force_upcast"]) == (1.0, 0.0, False)

    back = ldm_from_autoencoder_kl(vae.config, vae.state_dict())
    original.load_state_dict(back)  # strict
    assert all(torch.equal(back[name], tensor) for name, tensor in original.state_dict().items())


def test_training_entries_are_left_out_and_a_whole_model_opened():
    state = randomize(LatentDiffusionAutoencoder()).state_dict()
    _, expected = autoencoder_kl_from_ldm(state)
    extra = ("loss.logvar", "foundation_model.model.cls_token", "linear_proj.weight", "model_ema.decay")
    _, found = autoencoder_kl_from_ldm(state | {name: torch.zeros(1) for name in extra})
    assert found.keys() == expected.keys()
    whole = {f"first_stage_model.{name}": tensor for name, tensor in state.items()}
    _, found = autoencoder_kl_from_ldm(whole | {"model.diffusion_model.out.0.weight": torch.zeros(1)})
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_is_not_of_the_layout_is_named():
    state = LatentDiffusionAutoencoder().state_dict()
    with pytest.raises(CheckpointError, match=r"^has encoder\.extra\.weight, which"):
        autoencoder_kl_from_ldm(state | {"encoder.extra.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"^lacks decoder\.up\.1\.block\.0\.conv1\.bias$"):
        autoencoder_kl_from_ldm({name: state[name] for name in state if name != "decoder.up.1.block.0.conv1.bias"})
    with pytest.raises(CheckpointError, match=r"^decoder\.mid\.attn_1\.q\.weight has shape \(64, 64\), expected"):
        autoencoder_kl_from_ldm(state | {"decoder.mid.attn_1.q.weight": torch.zeros(64, 64)})
    with pytest.raises(CheckpointError, match=r"quant_conv\.weight has shape \(6, 8, 1, 1\), expected \(8, 8, 1, 1\)"):
        autoencoder_kl_from_ldm(state | {"quant_conv.weight": torch.zeros(6, 8, 1, 1)})
    with pytest.raises(CheckpointError, match="no autoencoder in LDM's layout"):
        autoencoder_kl_from_ldm({"blocks.0.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="shapes make no AutoencoderKL"):
        autoencoder_kl_from_ldm({name: t[:20] if t.ndim and len(t) == 32 else t for name, t in state.items()})


def test_models_that_the_original_code_cannot_express(tiny_kl):
    with pytest.raises(CheckpointError, match="norm_num_groups is 4"):
        ldm_from_autoencoder_kl(tiny_kl.config, tiny_kl.state_dict())
    config = autoencoder_kl_from_ldm(LatentDiffusionAutoencoder().state_dict())[0]
    state = AutoencoderKL(**config).state_dict()
    with pytest.raises(CheckpointError, match=r"disagree about quant_conv\.bias$"):
        ldm_from_autoencoder_kl(config, {name: state[name] for name in state if name != "quant_conv.bias"})
    with pytest.raises(CheckpointError, match="has no DownBlock2D"):
        ldm_from_autoencoder_kl(config | {"down_block_types": ["DownBlock2D"] * 3}, state)


@torch.no_grad()
def test_vqgan_gives_the_same_images():
    original = randomize(VQGAN())
    config, state = vq_model_from_taming(original.state_dict() | {"loss.perceptual_loss.lin0": torch.zeros(1)})
    model = build(VQModel, config, state)
    torch.testing.assert_close(model.encode(IMAGES).latents, original.encode(IMAGES), atol=1e-5, rtol=1e-5)
    images = original(IMAGES)
    assert (images[0] - images[1]).abs().max() > 0.1
    torch.testing.assert_close(model(IMAGES).sample, images, atol=1e-5, rtol=1e-5)
    back = taming_from_vq_model(model.config, model.state_dict())
    original.load_state_dict(back)
    assert all(torch.equal(back[name], tensor) for name, tensor in original.state_dict().items())


def test_other_quantizers_than_taming_s_are_refused():
    state = VQGAN().state_dict()
    without = {name: state[name] for name in state if not name.startswith("quantize.")}
    with pytest.raises(CheckpointError, match=r"lacks quantize\.embedding\.weight"):
        vq_model_from_taming(without)
    with pytest.raises(CheckpointError, match="Gumbel"):
        vq_model_from_taming(without | {"quantize.embed.weight": torch.zeros(16, 4)})
    config, state = vq_model_from_taming(state)
    with pytest.raises(CheckpointError, match="norm_type is spatial"):
        taming_from_vq_model(config | {"norm_type": "spatial"}, state)
