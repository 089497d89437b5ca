"""The compression model: what its files hold, that they are read exactly, and what is refused."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_HYPERPRIOR

from favae import HyperpriorModelFA, bitstream
from favae.errors import CompressedFileError, ModelError
from favae.hashing import hash_model
from favae.models.entropy import (
    FactorizedDensity,
    bits,
    gaussian_likelihood,
    lower_bound,
    scale_indices,
    scale_table,
)

pytest.importorskip("constriction", reason="the extra [compression] is not installed")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = HyperpriorModelFA(**TINY_HYPERPRIOR).eval()
    model.encoder.conv_out.weight.data *= 8  # symbols other than 0
    model.hyper_scales[-1].bias.data += 3  # that are probable
    model.update_table()
    return model


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 48, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1


# The entropy models ---------------------------------------------------------------------------------------------------


def test_a_symmetric_density_has_mass_at_zero():
    density = FactorizedDensity(2)
    for bias in density.biases:
        torch.nn.init.zeros_(bias)
    at_zero, beside = (density.likelihood(torch.full((1, 2, 1, 1), z)) for z in (0.0, 1e-3))
    torch.testing.assert_close(at_zero, beside, rtol=1e-2, atol=0)


def test_the_mass_of_a_gaussian_is_its_integral():
    x = torch.arange(-40, 41, dtype=torch.float64).view(1, 1, 1, -1)
    for scale in (0.11, 1.0, 7.0):
        mass = gaussian_likelihood(x, torch.full_like(x, scale))
        assert mass.sum().item() == pytest.approx(1, abs=1e-5)
        expected = torch.distributions.Normal(0, scale)
        inner = (expected.cdf(x + 0.5) - expected.cdf(x - 0.5)).float()
        torch.testing.assert_close(mass, inner.clamp_min(1e-9), rtol=1e-3, atol=1e-6)


def test_a_factorized_density_is_one_and_fits_data():
    torch.manual_seed(0)
    density = FactorizedDensity(2)
    grid = torch.arange(-600, 601, dtype=torch.float32).view(1, 1, 1, -1).expand(1, 2, 1, -1)
    assert density.likelihood(grid).sum(-1).flatten().tolist() == pytest.approx([1, 1], abs=1e-3)
    data = torch.stack([torch.randn(512) * 2 + 5, torch.randn(512) * 0.3], dim=0).view(1, 2, 1, -1).round()
    before = bits(density.likelihood(data)).item()
    optimizer = torch.optim.Adam(density.parameters(), 3e-2)
    for _ in range(300):
        optimizer.zero_grad()
        loss = bits(density.likelihood(data)).sum()
        loss.backward()
        optimizer.step()
    values, counts = zip(*(np.unique(channel.numpy(), return_counts=True) for channel in data[0]))
    entropy = sum(-(count * np.log2(count / 512)).sum() for count in counts)
    assert before > 1.2 * loss.item() and entropy < loss.item() < 1.15 * entropy + 20


def test_gradients_pass_a_bound_upwards_alone():
    x = torch.tensor([0.0, 0.0, 2.0, 2.0], requires_grad=True)
    (lower_bound(x, 1.0) * torch.tensor([1.0, -1.0, 1.0, -1.0])).sum().backward()
    assert x.grad.tolist() == [0, -1, 1, -1]


def test_scales_are_rounded_to_their_table():
    table = scale_table()
    assert torch.equal(table.float().double(), table)  # whatever the last bits of a machine's logarithms
    assert scale_indices(table).tolist() == list(range(64)) and table[0] == pytest.approx(0.11)
    between = (table[3] * table[4]).sqrt()
    assert scale_indices(torch.stack([between * 0.999, between * 1.001])).tolist() == [3, 4]
    assert scale_indices(torch.tensor([0.0, 1e9])).tolist() == [0, 63]


# Latents --------------------------------------------------------------------------------------------------------------


def test_quantized_latents_are_near_and_carry_gradients(model, images):
    latents = model.encode(images[..., :32]).latents.detach().requires_grad_()
    found = model.quantize(latents)
    assert found.latents.shape == latents.shape and (found.latents - latents).abs().max() <= 0.5 + 1e-5
    found.latents.sum().backward()
    assert latents.grad.abs().sum() > 0
    assert found.bits.shape == (2,) and (found.bits > 0).all() and torch.equal(found.bits, found.rounded_bits)


def test_noisy_bits_are_learned_from(model, images):
    model.train()
    try:
        found = model.quantize(model.encode(images[..., :32]).latents)
        model.zero_grad()
        found.bits.sum().backward()
    finally:
        model.eval()
    parts = (model.encoder, model.hyper_encoder, model.hyper_means, model.hyper_scales, model.density)
    for part in parts:
        assert all(p.grad is not None and p.grad.isfinite().all() for p in part.parameters())
        assert any(p.grad.abs().sum() > 0 for p in part.parameters())
    assert not torch.equal(found.bits, found.rounded_bits) and not found.rounded_bits.requires_grad
    model.zero_grad()


def test_what_a_spectrum_loss_compares(model, images):
    shapes = {}
    for pair, modules in enumerate(model.compared_modules):
        for module in modules:
            module.register_forward_hook(lambda m, i, out, pair=pair: shapes.setdefault(pair, set()).add(out.shape))
    model(images[..., :32])
    for modules in model.compared_modules:
        for module in modules:
            module._forward_hooks.clear()
    assert shapes == {0: {(2, 8, 48, 32)}, 1: {(2, 8, 24, 16)}}
    shallow = HyperpriorModelFA(**{**TINY_HYPERPRIOR, "block_out_channels": (8, 8)})
    assert len(shallow.compared_modules) == len(shallow.decoder.complements) == 1  # each is run


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(48, 40), (8, 8), (1, 1), (17, 31), (64, 5)])
def test_files_are_read_exactly(model, size):
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    (data,) = model.compress(image)
    (decoded,) = model.decompress([data])
    height, width = (4 * side for side in model.latent_size(*size))
    padded = torch.nn.functional.pad(image, (0, width - size[1], 0, height - size[0]), mode="replicate")
    with torch.no_grad():
        latents = model.quantize(model.encode(padded).latents).latents
        expected = model.decode(latents, force_not_quantize=True).sample[0, :, : size[0], : size[1]]
    assert decoded.shape == (3, *size)
    torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-4)  # means in float64 and in float32
    assert torch.equal(decoded, model.decompress([data])[0])


def test_real_size_is_the_estimate(model, images):
    with torch.no_grad():
        estimate = model.quantize(model.encode(images).latents).bits
    for i, (data, expected) in enumerate(zip(model.compress(images), estimate.tolist())):
        assert data == model.compress(images[i : i + 1])[0]  # whatever the batch is
        assert abs(8 * (len(data) - bitstream.HEADER_SIZE) - expected) < 0.02 * expected + 64


def test_another_process_reads_the_same(model, images, tmp_path):
    model.save_pretrained(tmp_path / "model")
    data = HyperpriorModelFA.from_pretrained(tmp_path / "model").compress(images[:1])[0]
    (tmp_path / "image.fav").write_bytes(data)
    program = (
        "import sys, torch; from favae import HyperpriorModelFA\n"
        f"model = HyperpriorModelFA.from_pretrained({str(tmp_path / 'model')!r})\n"
        f"files, images = [open({str(tmp_path / 'image.fav')!r}, 'rb').read()], []\n"
        f"for threads in ({torch.get_num_threads()}, 3 - {torch.get_num_threads()}):\n"
        " torch.set_num_threads(max(1, threads)); images += model.decompress(files)\n"
        f"torch.save(images, {str(tmp_path / 'images.pt')!r})"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
    (expected,) = model.decompress([data])
    same, other_threads = torch.load(tmp_path / "images.pt", weights_only=True)
    assert torch.equal(same, expected)
    torch.testing.assert_close(other_threads, expected, rtol=0, atol=1e-5)  # the generator's sums have another order


def test_networks_are_moved_before_they_are_cast(model, monkeypatch):
    """Apple's GPUs have no float64."""
    from favae.models.hyperprior_model_fa import LatentCoder

    to = torch.nn.Module.to

    def refuse_both(self, *arguments, **keywords):
        assert len(arguments) + len(keywords) == 1
        return to(self, *arguments, **keywords)

    monkeypatch.setattr(torch.nn.Module, "to", refuse_both)
    assert LatentCoder(model).means[-1].weight.dtype == torch.float64


def test_stale_tables_are_refused(images):
    model = HyperpriorModelFA(**TINY_HYPERPRIOR).eval()
    with pytest.raises(ModelError, match="update_table"):
        model.compress(images)
    model.update_table()
    (data,) = model.compress(images[:1])
    model.density.biases[0].data += 0.1
    with pytest.raises(ModelError, match="update_table"):
        model.decompress([data])
    model.update_table()
    with pytest.raises(CompressedFileError, match="another model"):
        model.decompress([data])
    with pytest.raises(ModelError, match="float32, and the model is in torch.bfloat16"):
        model.bfloat16().compress(images)


def test_damaged_and_foreign_files_are_refused(model, images):
    (data,) = model.compress(images[:1])
    for position in [*range(bitstream.HEADER_SIZE), *range(bitstream.HEADER_SIZE, len(data), 31)]:
        flipped = bytearray(data)
        flipped[position] ^= 16
        with pytest.raises(CompressedFileError):
            model.decompress([bytes(flipped)])
    for wrong in (b"", data[:10], data[:-4], data[:-1], data + b"more", b"\x89PNG" + data):
        with pytest.raises(CompressedFileError):
            model.decompress([wrong])


@pytest.mark.parametrize("change", [{"height": 0}, {"largest": 0}, {"height": 65_535, "width": 65_535}])
def test_impossible_headers_are_refused_before_anything_is_computed(change, model, images):
    """Checksums are no secret: anybody can write them."""
    header, payload = bitstream.read(model.compress(images[:1])[0])
    with pytest.raises(CompressedFileError, match="damaged|65535 x 65535 pixels, which"):
        model.decompress([bitstream.write(replace(header, **change), b"")])
    with pytest.raises(CompressedFileError, match="damaged"):
        model.decompress([bitstream.write(header, payload + b"x")])


def test_images_that_are_not_finite_are_refused(images):
    model = HyperpriorModelFA(**TINY_HYPERPRIOR).eval()
    model.update_table()
    for part, call in ((model.decoder.conv_out, model.decompress), (model.hyper_scales[-1], model.compress)):
        files = model.compress(images[:1])
        kept = part.bias.data.clone()
        part.bias.data.fill_(torch.nan)
        header, payload = bitstream.read(files[0])
        own = replace(header, model=bytes.fromhex(hash_model(model))[:8])  # as if its weights had been so
        with pytest.raises(ModelError, match="not finite"):
            call([bitstream.write(own, payload)] if call == model.decompress else images[:1])
        part.bias.data = kept


def test_other_scales_are_noticed(model, images, monkeypatch):
    (data,) = model.compress(images[:1])
    monkeypatch.setattr("favae.models.hyperprior_model_fa.scale_indices", lambda scales: scale_indices(scales * 1.5))
    with pytest.raises(CompressedFileError, match="computes otherwise"):
        model.decompress([data])


def test_large_values_are_written(model):
    y = torch.zeros(1, 6, 4, 4)
    y[0, 0, 0, 0], y[0, 1, 1, 1] = 1e6, -3000
    from favae.models.hyperprior_model_fa import LatentCoder

    coder = LatentCoder(model)
    latents, size = coder.read(coder.write(y, (16, 16)))
    assert size == (16, 16) and abs(latents[0, 1, 1, 1] + 3000) <= 0.5
    assert latents[0, 0, 0, 0] > 60_000


def test_no_image_is_no_file(model):
    assert model.compress(torch.zeros(0, 3, 16, 16)) == [] == model.decompress([])


def test_impossible_sizes(model):
    with pytest.raises(ValueError, match="multiples of 4"):
        model.encode(torch.zeros(1, 3, 18, 16))
    with pytest.raises(ValueError, match="8 pixels"):
        model.encode(torch.zeros(1, 3, 4, 16))
    with pytest.raises(ValueError, match="block_out_channels"):
        HyperpriorModelFA(**{**TINY_HYPERPRIOR, "block_out_channels": (8,)})
