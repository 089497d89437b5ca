import pickle

import numpy as np
import pytest
import torch
from conftest import TINY_VQ
from diffusers import AutoencoderDC, VQModel
from PIL import Image
from tiny_autoencoders import autoencoders

from favae import VQModelFA
from favae.adapters.pipelines import fold_latent_statistics
from favae.adapters.shims import MARVAE, VA_VAE, VARVQ, DeTokVAE, EDM2Encoder, LlamaGenVQ
from favae.autoencoders import encode
from favae.data.images import center_crop, to_uint8

RESIDUAL = {"quantizer": "residual", "num_quantizers": 3}
SCALES = {"quantizer": "next_scale", "scales": (1, 2, 4)}
FSQ = {"quantizer": "fsq", "fsq_levels": (5, 4, 3), "codebook_size": None}


def images(count: int = 2, size: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, size, size) * 2 - 1


def pixels(count: int = 3, size: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


def photograph(width: int, height: int, mode: str = "RGB") -> Image.Image:
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


@pytest.fixture(params=["favae", "kl", "path"])
def vae(request, tiny_favae, tiny_kl, tmp_path):
    """What the shims take, and the model behind it."""
    if request.param == "path":
        tiny_favae.save_pretrained(tmp_path)
        return tmp_path, tiny_favae
    model = {"favae": tiny_favae, "kl": tiny_kl}[request.param]
    return model, model


def vq_model(options: dict) -> VQModelFA:
    model = VQModelFA(**{**TINY_VQ, **options}).train()
    model(images(8))  # the codebook is no longer what the constructor draws
    return model.eval()


@torch.no_grad()
def test_va_vae_encodes_and_decodes_as_the_model(vae):
    given, model = vae
    shim = VA_VAE(given).to("cpu")
    x = images()
    posterior = model.encode(x).latent_dist
    torch.manual_seed(1)
    latents = shim.encode_images(x)
    torch.manual_seed(1)
    assert torch.equal(latents, posterior.sample()) and latents.shape == (2, 6, 4, 4) and latents.is_contiguous()
    assert not torch.equal(shim.encode_images(x), latents)  # another sample
    decoded = shim.decode_to_images(latents)
    assert decoded.dtype == np.uint8 and decoded.shape == (2, 16, 16, 3)
    expected = ((model.decode(latents).sample + 1) * 127.5).round().clamp(0, 255)
    assert np.array_equal(decoded, expected.permute(0, 2, 3, 1).numpy().astype(np.uint8))
    # LightningDiT's evaluation of tokenizers takes the network out
    assert torch.equal(shim.model.encode(x).mode(), posterior.mean)
    assert torch.equal(shim.model.decode(latents), model.decode(latents).sample)


def test_va_vae_takes_autoencoders_without_a_posterior():
    model = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=3,
        num_vq_embeddings=16,
    ).eval()
    x = images()
    latents = VA_VAE(model).encode_images(x)
    assert torch.equal(latents, model.encode(x).latents) and not latents.requires_grad
    assert VA_VAE(model).decode_to_images(latents).shape == (2, 16, 16, 3)


def test_img_transform_crops_and_flips(tiny_favae):
    shim, photo = VA_VAE(tiny_favae, img_size=16), photograph(70, 50)
    straight, mirrored = shim.img_transform()(photo), shim.img_transform(p_hflip=1.0)(photo)
    assert straight.shape == (3, 16, 16) and straight.dtype == torch.float32
    assert -1 <= straight.min() < -0.2 and 0.2 < straight.max() <= 1
    assert np.array_equal(to_uint8(straight).permute(1, 2, 0).numpy(), np.array(center_crop(photo, 16)))
    assert torch.equal(mirrored, straight.flip(2))
    assert shim.img_transform(img_size=8)(photo).shape == (3, 8, 8)
    assert shim.img_transform()(photograph(20, 30, "L")).shape == (3, 16, 16)
    half = shim.img_transform(p_hflip=0.5)
    torch.manual_seed(0)
    first = [half(photo) for _ in range(16)]
    torch.manual_seed(0)
    assert all(torch.equal(a, half(photo)) for a in first)
    assert {torch.equal(a, straight) for a in first} == {True, False}
    assert torch.equal(pickle.loads(pickle.dumps(shim.img_transform()))(photo), straight)  # for workers that spawn


@torch.no_grad()
def test_mar_encodes_and_decodes_as_the_model(vae):
    given, model = vae
    shim = MARVAE(given).to("cpu").eval()
    x = images()
    posterior, expected = shim.encode(x), model.encode(x).latent_dist
    assert torch.equal(posterior.parameters, expected.parameters) and posterior.parameters.shape == (2, 12, 4, 4)
    assert torch.equal(posterior.mode(), expected.mean) and torch.equal(posterior.std, expected.std)
    torch.manual_seed(1)
    sample = posterior.sample().mul_(0.5)
    torch.manual_seed(1)
    assert torch.equal(sample, expected.sample() * 0.5)
    assert torch.equal(shim.decode(sample / 0.5), model.decode(sample / 0.5).sample)


@torch.no_grad()
def test_unit_latents_need_no_constant(tiny_favae):
    x = images(16)
    mean = tiny_favae.encode(x).latent_dist.mean
    decoded = tiny_favae.decode(mean).sample
    tiny_favae.register_to_config(
        latents_mean=mean.mean((0, 2, 3)).tolist(), latents_std=mean.std((0, 2, 3), correction=0).tolist()
    )
    shim = MARVAE(fold_latent_statistics(tiny_favae))
    latents = shim.encode(x).mode()
    assert torch.allclose(latents.mean((0, 2, 3)), torch.zeros(6), atol=1e-4)
    assert torch.allclose(latents.std((0, 2, 3), correction=0), torch.ones(6), atol=1e-3)
    assert torch.allclose(shim.decode(latents), decoded, atol=1e-3)


@torch.no_grad()
def test_detok_normalizes(vae):
    given, model = vae
    shim = DeTokVAE(given, scale_factor=0.5)
    x = images()
    posterior = model.encode(x).latent_dist
    assert torch.allclose(shim.tokenize(x), posterior.mean * 0.5)
    mean, std = torch.linspace(-1, 1, 6), torch.linspace(0.5, 2, 6)
    shim.reset_stats(mean, std)
    expected = (posterior.mean - mean.view(1, 6, 1, 1)) / std.view(1, 6, 1, 1) * 0.5
    tokens = shim.tokenize(x)
    assert torch.allclose(tokens, expected, atol=1e-6)
    torch.manual_seed(1)
    sampled = shim.tokenize(x, sampling=True)
    torch.manual_seed(1)
    assert torch.allclose(shim.sample_from_moments(shim.encode_into_posteriors(x).parameters), sampled)
    decoded = shim.detokenize(tokens)
    assert decoded.min() >= 0 and decoded.max() <= 1
    assert torch.allclose(decoded, (model.decode(posterior.mean).sample / 2 + 0.5).clamp(0, 1), atol=1e-5)
    assert torch.equal(shim.detokenize(tokens.flatten(2).transpose(1, 2)), decoded)
    assert torch.equal(shim.reconstruct(x), decoded)
    shim.reset_stats(torch.tensor(0.1), torch.tensor(2.0))
    assert torch.allclose(shim.tokenize(x), (posterior.mean - 0.1) / 4)
    with pytest.raises(ValueError, match="15 tokens"):
        shim.detokenize(torch.zeros(1, 15, 6))


@torch.no_grad()
def test_edm2_raw_and_final_latents(vae):
    given, model = vae
    mean, std = torch.linspace(-1, 1, 6).tolist(), torch.linspace(0.5, 2, 6).tolist()
    shim = EDM2Encoder(given, raw_mean=mean, raw_std=std, final_mean=0.25, batch_size=2)
    shim.init(torch.device("cpu"))
    x = pixels()
    raw = shim.encode_pixels(x)
    posterior = model.encode(x.float() / 127.5 - 1).latent_dist
    assert raw.shape == (3, 12, 4, 4) and raw.dtype == torch.float32
    assert torch.allclose(raw, torch.cat([posterior.mean, posterior.std], dim=1), atol=1e-5)
    torch.manual_seed(1)
    final = shim.encode_latents(raw)
    torch.manual_seed(1)
    sample = raw[:, :6] + raw[:, 6:] * torch.randn(3, 6, 4, 4)
    channels = (1, 6, 1, 1)
    expected = (sample - torch.tensor(mean).view(channels)) / torch.tensor(std).view(channels) * 0.5 + 0.25
    assert torch.allclose(final, expected, atol=1e-5)
    torch.manual_seed(1)
    assert torch.equal(shim.encode(x), final)
    decoded = shim.decode(final)
    assert decoded.dtype == torch.uint8 and decoded.shape == x.shape
    assert (decoded.int() - to_uint8(model.decode(sample).sample).int()).abs().max() <= 1


def test_edm2_takes_statistics_from_the_config(tiny_favae, tiny_kl):
    shim = EDM2Encoder(tiny_kl, final_std=1.0)  # diffusers' default: scaling_factor 0.18215, no shift
    raw = torch.cat([torch.full((1, 6, 2, 2), 2.0), torch.zeros(1, 6, 2, 2)], dim=1)
    assert torch.allclose(shim.encode_latents(raw), torch.full((1, 6, 2, 2), 2 * 0.18215))
    tiny_favae.register_to_config(latents_mean=[1.0] * 6, latents_std=[4.0] * 6, scaling_factor=2.0)
    assert torch.allclose(EDM2Encoder(tiny_favae).encode_latents(raw), torch.full((1, 6, 2, 2), 0.25))
    assert torch.allclose(EDM2Encoder(tiny_favae, 0, 1).encode_latents(raw), torch.ones(1, 6, 2, 2))
    tiny_favae.register_to_config(scaling_factor=None)
    assert torch.allclose(EDM2Encoder(tiny_favae).encode_latents(raw), torch.full((1, 6, 2, 2), 0.125))
    with pytest.raises(ValueError, match="raw_std must be above 0"):
        EDM2Encoder(tiny_favae, raw_std=0.0)
    with pytest.raises(ValueError, match="not in its config"):
        EDM2Encoder(autoencoders()["AutoencoderKLFlux2"])


@torch.no_grad()
def test_autoencoders_of_frames_have_a_posterior_of_images():
    vae = autoencoders()["AutoencoderKLWan, as Wan 2.1's"]
    x = images()
    posterior = MARVAE(vae).encode(x)
    torch.testing.assert_close(posterior.mean, encode(vae, x))
    assert posterior.sample().ndim == 4 and MARVAE(vae).decode(posterior.mean).shape == x.shape


def test_edm2_snapshots_hold_no_weights(tiny_favae, tmp_path):
    tiny_favae.save_pretrained(tmp_path)
    shim = EDM2Encoder(str(tmp_path), final_std=1.0)
    data = pickle.dumps(shim)
    assert len(data) < 5000
    loaded, latents = pickle.loads(data), torch.randn(1, 6, 4, 4)
    assert torch.equal(loaded.decode(latents), shim.decode(latents))


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"codebook_dim": 4}, FSQ])
def test_llamagen_encodes_and_decodes_as_the_model(options, tmp_path):
    model = vq_model(options)
    model.save_pretrained(tmp_path)
    shim = LlamaGenVQ(tmp_path).to("cpu").eval()
    x = images()
    quant, losses, (_, _, indices) = shim.encode(x)
    expected = model.quantize(model.encode(x).latents)
    assert torch.equal(quant, expected.latents) and len(losses) == 4
    assert indices.shape == (32,) and torch.equal(indices.reshape(2, 4, 4), expected.indices)
    assert shim.vocab_size == model.num_tokens > indices.max()
    decoded = model(x).sample
    assert torch.allclose(shim.decode(quant), decoded, atol=1e-6)
    assert torch.allclose(shim.decode_code(indices, quant.shape), decoded, atol=1e-6)
    # sampling: int32 (B, h * w), and a number of channels that is the script's own
    assert torch.allclose(shim.decode_code(indices.reshape(2, 16).int(), [2, 8, 4, 4]), decoded, atol=1e-6)
    assert torch.allclose(shim.decode_code(indices, (2, 4, 4, 8), channel_first=False), decoded, atol=1e-6)
    assert torch.allclose(shim.decode_code(indices.reshape(2, 4, 4)), decoded, atol=1e-6)
    with pytest.raises(ValueError, match=r"32 indices do not fill \(B, h, w\) = \(2, 4, 5\)"):
        shim.decode_code(indices, (2, 6, 4, 5))
    with pytest.raises(ValueError, match="32 indices do not fill"):
        shim.decode_code(indices)
    with pytest.raises(ValueError, match="indices must be in"):
        shim.decode_code(indices + 1000, quant.shape)


@torch.no_grad()
def test_var_encodes_and_decodes_as_the_model():
    model = vq_model(SCALES)
    shim, x = VARVQ(model).to("cpu"), images()
    tokens = shim.img_to_idxBl(x)
    assert [tuple(t.shape) for t in tokens] == [(2, 1), (2, 4), (2, 16)]
    assert shim.vocab_size == model.num_tokens and shim.Cvae == 6
    decoded = model(x).sample.clamp(-1, 1)
    assert torch.allclose(shim.idxBl_to_img(tokens, same_shape=True, last_one=True), decoded, atol=1e-5)
    stages = shim.idxBl_to_img(tokens, same_shape=True)
    assert len(stages) == 3 and torch.allclose(stages[-1], decoded, atol=1e-5)
    assert torch.allclose(stages[0], model.decode(tokens[0]).sample.clamp(-1, 1), atol=1e-5)
    with pytest.raises(ValueError, match="sum of the first"):
        shim.idxBl_to_img([tokens[0], tokens[1][:, :3]], same_shape=True, last_one=True)
    with pytest.raises(ValueError, match="indices must be in 0"):
        shim.idxBl_to_img([tokens[0] + shim.vocab_size], same_shape=True)
    with pytest.raises(ValueError, match="same_shape"):
        shim.idxBl_to_img(tokens, same_shape=False)


@torch.no_grad()
def test_var_takes_a_model_in_half_precision():
    shim = VARVQ(vq_model(SCALES).to(torch.bfloat16))
    assert shim.quantize.idxBl_to_var_input(shim.img_to_idxBl(images().bfloat16())).shape == (2, 4 + 16, shim.Cvae)


@torch.no_grad()
def test_var_training_and_sampling_see_the_same_inputs():
    shim, x = VARVQ(vq_model(SCALES)), images()
    tokens = shim.img_to_idxBl(x)
    inputs = shim.quantize.idxBl_to_var_input(tokens)
    assert inputs.shape == (2, 4 + 16, shim.Cvae)
    f_hat, seen = torch.zeros(2, shim.Cvae, 4, 4), []
    for number, (side, indices) in enumerate(zip((1, 2, 4), tokens)):  # as VAR's sampling loop, had it drawn these
        vectors = shim.quantize.embedding(indices).transpose_(1, 2).reshape(2, shim.Cvae, side, side)
        f_hat, following = shim.quantize.get_next_autoregressive_input(number, 3, f_hat, vectors)
        seen.append(following.view(2, shim.Cvae, -1).transpose(1, 2))
    assert torch.allclose(torch.cat(seen[:-1], dim=1), inputs, atol=1e-6)
    expected = shim.idxBl_to_img(tokens, same_shape=True, last_one=True)
    assert torch.allclose(shim.fhat_to_img(f_hat), expected, atol=1e-5)


def test_what_the_shims_refuse(tiny_favae):
    deterministic = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
    ).eval()
    with pytest.raises(ValueError, match="posterior, not a AutoencoderDC"):
        MARVAE(deterministic).encode(images())
    with pytest.raises(ValueError, match="with a posterior"):
        EDM2Encoder(deterministic).encode(pixels())
    with pytest.raises(ValueError, match="must be uint8, 0 to 255, got torch.float32"):
        EDM2Encoder(tiny_favae).encode(images())
    for shim in (LlamaGenVQ, VARVQ):
        with pytest.raises(ValueError, match="come from a VQModelFA, not from a AutoencoderKLFA"):
            shim(tiny_favae)
    with pytest.raises(ValueError, match="one token per position"):
        LlamaGenVQ(VQModelFA(**{**TINY_VQ, **RESIDUAL}))
    with pytest.raises(ValueError, match="needs quantizer='next_scale', not 'residual'"):
        VARVQ(VQModelFA(**{**TINY_VQ, **RESIDUAL}))
