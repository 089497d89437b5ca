import pytest
import torch

from favae import VQModelFA

TINY_VQ = {
    "block_out_channels": (8, 8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 6,
    "codebook_size": 32,
    "sample_size": 16,
}
QUANTIZERS = [
    {},
    {"codebook_dim": 4},
    {"quantizer": "residual", "num_quantizers": 3},
    {"quantizer": "fsq", "fsq_levels": (5, 4, 3), "codebook_size": None},
]


def images(count: int = 2, size: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, size, size) * 2 - 1


@pytest.mark.parametrize("options", QUANTIZERS)
def test_indices_and_latents_decode_alike(options):
    model = VQModelFA(**{**TINY_VQ, **options}).eval()
    x = images()
    latents = model.encode(x).latents
    assert latents.shape == (2, 6, 4, 4)
    quantized = model.quantize(latents)
    depth = (3,) if options.get("quantizer") == "residual" else ()
    assert quantized.indices.shape == (2, 4, 4, *depth) and quantized.indices.dtype == torch.int64
    assert quantized.indices.min() >= 0 and quantized.indices.max() < model.num_tokens
    assert torch.allclose(model.lookup(quantized.indices), quantized.latents, atol=1e-6)
    decoded = model.decode(quantized.indices).sample
    assert decoded.shape == x.shape
    assert torch.allclose(decoded, model(x).sample, atol=1e-6)
    assert torch.allclose(decoded, model.decode(quantized.latents, force_not_quantize=True).sample, atol=1e-6)


@pytest.mark.parametrize("octaves, attention", [(3, False), (4, True), (5, True)])
def test_f4_f8_and_f16(octaves, attention):
    model = VQModelFA(**{**TINY_VQ, "block_out_channels": (8,) * octaves, "attention": attention}).eval()
    assert model.stride == 2 ** (octaves - 1)
    x = images(1, 32)
    assert model.encode(x).latents.shape[-1] == 32 // model.stride
    assert model(x).sample.shape == x.shape
    assert ("AttnDown" in type(model.encoder.down_blocks[-1]).__name__) == attention


@pytest.mark.parametrize("options", [*QUANTIZERS, {"frequency_complement": None}, {"frequency_complement": "attn"}])
def test_save_load_same_output(options, tmp_path):
    model = VQModelFA(**{**TINY_VQ, **options})
    model.train()
    model(images(8))  # the codebook is no longer what the constructor draws
    model.eval().save_pretrained(tmp_path)
    loaded, info = VQModelFA.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    x = images()
    assert torch.equal(loaded(x).sample, model(x).sample)


@pytest.mark.parametrize("options", [{}, {"quantizer": "residual"}])
def test_a_frozen_codebook_stays_frozen(options):
    model = VQModelFA(**{**TINY_VQ, **options}).train()
    codebooks = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def changed() -> bool:
        return any(not torch.equal(buffer, codebooks[name]) for name, buffer in model.named_buffers())

    with torch.no_grad():
        model(images(8))
    assert not changed()
    model.requires_grad_(False)
    model.train()(images(8))
    assert not changed()
    model.requires_grad_(True)
    model.eval()(images(8))
    assert not changed()
    model.train()(images(8))
    assert changed()


def test_gradients_pass_straight_through():
    model = VQModelFA(**TINY_VQ).train()
    latents = torch.randn(2, 6, 4, 4, requires_grad=True)
    quantized = model.quantize(latents)
    (gradient,) = torch.autograd.grad(quantized.latents.sum(), latents, retain_graph=True)
    assert gradient.abs().sum() > 0
    (pull,) = torch.autograd.grad(quantized.loss, latents)
    assert quantized.loss > 0 and pull.abs().sum() > 0


def test_dead_codes_come_back():
    torch.manual_seed(0)
    used = {}
    for threshold in (0.0, 1.0):
        model = VQModelFA(**{**TINY_VQ, "dead_code_threshold": threshold, "codebook_decay": 0.5}).train()
        with torch.no_grad():  # a codebook on one side of the sphere, latents on the other
            direction = torch.ones(6)
            model.codebook._codebook.embed.copy_(-direction + 0.1 * torch.randn(1, 32, 6))
        latents = direction.view(1, 6, 1, 1) + 0.5 * torch.randn(8, 6, 8, 8)
        for _ in range(20):
            model.quantize(latents)
        used[threshold] = len(model.eval().quantize(latents).indices.unique())
    assert used[1.0] == 32 and used[1.0] > used[0.0]


def test_gradient_checkpointing_gives_the_same_gradients():
    model = VQModelFA(**TINY_VQ).eval()
    x = images()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(x).sample.square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    model.enable_gradient_checkpointing()
    actual = gradients()
    assert expected and all(torch.allclose(actual[name], value, atol=1e-6) for name, value in expected.items())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"quantizer": "lfq"}, "'vq', 'residual' or 'fsq', got 'lfq'"),
        ({"quantizer": "fsq", "fsq_levels": (5, 4)}, r"codebook_size 32 is not the product of fsq_levels \[5, 4\], 20"),
        ({"frequency_complement": "fft"}, "frequency_complement"),
    ],
)
def test_impossible_settings(options, message):
    with pytest.raises(ValueError, match=message):
        VQModelFA(**{**TINY_VQ, **options})


def test_indices_and_sizes_that_do_not_fit():
    model = VQModelFA(**TINY_VQ)
    with pytest.raises(ValueError, match="indices must be in 0 ... 31, got 0 ... 32"):
        model.decode(torch.tensor([[[0, 32]]]))
    with pytest.raises(ValueError, match="multiples of 4, got 18x16"):
        model.encode(torch.zeros(1, 3, 18, 16))
