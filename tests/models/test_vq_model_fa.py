import pytest
import torch
from conftest import TINY_VQ, checkpointed_blocks

from favae import VQModelFA
from favae.autoencoders import measure_budget

QUANTIZERS = [
    {},
    {"codebook_dim": 4},
    {"quantizer": "residual", "num_quantizers": 3},
    {"quantizer": "fsq", "fsq_levels": (5, 4, 3), "codebook_size": None},
    {"quantizer": "next_scale", "scales": (1, 2, 3, 4)},
    {"quantizer": "next_band", "scales": (1, 2, 4)},
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
    shapes = {"residual": (4, 4, 3), "next_scale": (1 + 4 + 9 + 16,), "next_band": (1 + 3 + 12,)}
    shape = shapes.get(options.get("quantizer"), (4, 4))
    assert quantized.indices.shape == (2, *shape) and quantized.indices.dtype == torch.int64
    assert measure_budget(model, 16).tokens_per_image == quantized.indices[0].numel()
    assert quantized.indices.min() >= 0 and quantized.indices.max() < model.num_tokens
    assert torch.allclose(model.lookup(quantized.indices), quantized.latents, atol=1e-6)
    if options in ({}, QUANTIZERS[-1]):  # others have projections, or sums of several vectors
        assert torch.equal(model.quantize(quantized.latents).indices, quantized.indices)
    decoded = model.decode(quantized.indices).sample
    assert decoded.shape == x.shape
    for small in (torch.uint8, torch.int16):  # as they may be stored
        assert torch.equal(model.decode(quantized.indices.to(small)).sample, decoded)
    assert torch.allclose(decoded, model(x).sample, atol=1e-6)
    assert torch.allclose(decoded, model.decode(quantized.latents, force_not_quantize=True).sample, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", QUANTIZERS)
@torch.no_grad()
def test_indices_and_latents_decode_alike_in_half_precision(options, dtype):
    model = VQModelFA(**{**TINY_VQ, **options}).eval().to(dtype)
    quantized = model.quantize(model.encode(images().to(dtype)).latents)
    assert torch.equal(model.lookup(quantized.indices), quantized.latents)


@pytest.mark.parametrize("octaves, attention", [(3, False), (4, True), (5, True)])
def test_f4_f8_and_f16(octaves, attention):
    model = VQModelFA(**{**TINY_VQ, "block_out_channels": (8,) * octaves, "attention": attention}).eval()
    assert model.spatial_compression_ratio == 2 ** (octaves - 1)
    x = images(1, 32)
    assert model.encode(x).latents.shape[-1] == 32 // model.spatial_compression_ratio
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


@pytest.mark.parametrize("options", [{}, *QUANTIZERS[-2:], {"quantizer": "residual"}])
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
    model.decoder.requires_grad_(True)  # a decoder that is tuned to the codebook
    model(images(8)).sample.sum().backward()
    assert not changed()
    model.requires_grad_(True)
    model.eval()(images(8))
    assert not changed()
    model.train()(images(8))
    assert changed()


@pytest.mark.parametrize("options", [{}, {"quantizer": "residual"}, *QUANTIZERS[-2:]])
def test_gradients_pass_straight_through(options):
    model = VQModelFA(**TINY_VQ | options).train()
    latents = torch.randn(2, 6, 4, 4, requires_grad=True)
    quantized = model.quantize(latents)
    (gradient,) = torch.autograd.grad(quantized.latents.sum(), latents, retain_graph=True)
    assert gradient.abs().sum() > 0
    if options:  # the first normalizes latents, which has a gradient of its own
        torch.testing.assert_close(gradient, torch.ones_like(gradient))
    (pull,) = torch.autograd.grad(quantized.loss, latents)
    assert quantized.loss > 0 and pull.abs().sum() > 0


def test_residual_codes_each_lessen_the_error():
    torch.manual_seed(0)
    model = VQModelFA(**TINY_VQ | {"quantizer": "residual", "codebook_decay": 0.8}).train()
    latents = (0.3 * torch.randn(8, 6, 16, 16)).requires_grad_()
    for _ in range(40):
        found = model.quantize(latents)
    tokens = found.indices.flatten(1, 2)
    parts = model.codebook.get_codes_from_indices(tokens)  # (4, B, hw, C)
    target = latents.detach().flatten(2).transpose(1, 2)
    errors = [(target - parts[: k + 1].sum(0)).square().mean() for k in range(4)]
    for coarse, fine in zip(errors, errors[1:]):
        assert fine < 0.75 * coarse
    assert found.loss < errors[0]  # the mean over the codebooks


def test_dead_codes_come_back():
    used = {}
    for threshold in (0.0, 0.02):
        torch.manual_seed(0)
        model = VQModelFA(**{**TINY_VQ, "dead_code_threshold": threshold, "codebook_decay": 0.5}).train()
        with torch.no_grad():  # a codebook on one side of the sphere, latents on the other
            direction = torch.ones(6)
            model.codebook._codebook.embed.copy_(-direction + 0.1 * torch.randn(1, 32, 6))
        latents = (direction.view(1, 6, 1, 1) + 0.5 * torch.randn(8, 6, 8, 8)).requires_grad_()
        for _ in range(30):
            model.quantize(latents)
        used[threshold] = len(model.eval().quantize(latents).indices.unique())
    assert used[0.02] > 28 and used[0.02] > 2 * used[0.0]


def test_living_codes_stay():
    """One token per entry and step, as in the recipes: an entry that is merely rare must not be thrown out."""
    model = VQModelFA(**{**TINY_VQ, "codebook_size": 256, "latent_channels": 8}).train()
    codebook, replaced = model.codebook._codebook, []
    replace = codebook.replace
    codebook.replace = lambda samples, batch_mask, **more: (
        replaced.append(int(batch_mask.sum())),
        replace(samples, batch_mask=batch_mask, **more),
    )
    for step in range(400):
        if step == 300:
            replaced.clear()
        model.quantize(torch.randn(4, 8, 8, 8, requires_grad=True))
    assert sum(replaced) / 100 < 0.05 * 256


def test_latents_that_are_not_finite_leave_the_codebook_whole():
    model = VQModelFA(**TINY_VQ).train()
    latents = torch.randn(2, 6, 4, 4)
    latents[0, :, 1, 1] = torch.tensor([torch.nan, torch.inf, 0, 0, 0, 0])
    quantized = model.quantize(latents.requires_grad_())
    assert quantized.latents[0, :2, 1, 1].isnan().all()  # whoever looks at the loss must see it
    assert torch.isfinite(quantized.latents[1]).all()
    assert all(torch.isfinite(buffer).all() for buffer in model.buffers())


@pytest.mark.parametrize("options", QUANTIZERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(options, dtype):
    model = VQModelFA(**{**TINY_VQ, **options}).eval().to(dtype)
    x = images().to(dtype)
    output = model(x).sample
    assert output.dtype == dtype and torch.isfinite(output).all()
    assert model.decode(model.quantize(model.encode(x).latents).indices).sample.dtype == dtype


def test_gradient_checkpointing_gives_the_same_gradients():
    model = VQModelFA(**TINY_VQ).eval()
    x = images()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(x).sample.square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    blocks = checkpointed_blocks(model)
    actual = gradients()
    assert {block for block in blocks if block in list(model.decoder.up_blocks)}
    assert expected and all(torch.allclose(actual[name], value, atol=1e-6) for name, value in expected.items())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"quantizer": "lfq"}, "quantizer .*'lfq'"),
        ({"quantizer": "fsq", "fsq_levels": (5, 4)}, "fsq_levels .* codebook_size .* 32"),
        ({"quantizer": "fsq", "fsq_levels": (2,) * 10, "codebook_size": None}, "fsq_levels must be 3 or more"),
        ({"quantizer": "fsq", "codebook_size": None, "codebook_dim": 4}, "quantizer='fsq'.*codebook_dim"),
        ({"quantizer": "residual", "num_quantizers": 1}, "two or more codebooks"),
        ({"frequency_complement": "fft"}, "frequency_complement"),
        ({"block_out_channels": (8, 10, 16)}, "block_out_channels must be multiples of norm_num_groups = 4"),
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


def test_every_quantizer_can_be_measured_without_weights():
    for options in QUANTIZERS:
        with torch.device("meta"):
            model = VQModelFA(**{**TINY_VQ, **options})
        tokens = {"residual": 48, "next_scale": 30}.get(model.config.quantizer, 16)
        assert measure_budget(model, 16).tokens_per_image == tokens


@pytest.mark.parametrize("options", QUANTIZERS[-2:], ids=lambda options: options["quantizer"])
def test_every_first_scale_is_a_picture(options):
    torch.manual_seed(0)
    model = VQModelFA(**TINY_VQ | options).train()
    latents = torch.randn(16, 6, 4, 4) + 2 * torch.randn(16, 6, 1, 1)  # mostly low frequencies
    optimizer = torch.optim.Adam(model.codebook.parameters(), lr=0.03) if options["quantizer"] == "next_scale" else None
    for _ in range(60):
        loss = model.quantize(latents.clone().requires_grad_()).loss
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    indices = model.eval().quantize(latents).indices
    ends = torch.tensor([stage.tokens for stage in model.codebook.stages]).cumsum(0).tolist()
    errors = []
    for end, scale in zip(ends, options["scales"]):
        found = model.lookup(indices[:, :end])
        if options["quantizer"] == "next_scale":
            assert found.shape == latents.shape and model.decode(indices[:, :end]).sample.shape[-1] == 16
            errors.append((found - latents).square().mean())
        else:  # the latents of a smaller image
            assert found.shape[-1] == scale and model.decode(indices[:, :end]).sample.shape[-1] == 4 * scale
            small = torch.nn.functional.avg_pool2d(latents, 4 // scale)
            errors.append((torch.nn.functional.interpolate(found, size=4) - latents).square().mean())
            assert (found - small).square().mean() < small.square().mean() / 2
    assert all(later < earlier for earlier, later in zip(errors, errors[1:]))
    with pytest.raises(ValueError, match="sum of the first"):
        model.lookup(indices[:, : ends[0] + 1])
    with pytest.raises(ValueError, match="16x16"):
        model.encode(images(1, 32))
