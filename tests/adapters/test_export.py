"""`favae export`: the files that other programs read hold the same model, or are refused in one line."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_FAVAE, command, command_error
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2
from original_layouts import LatentDiffusionAutoencoder, randomize
from safetensors.torch import load_file, save_file

from favae import AsymmetricAutoencoderKLFA, AutoencoderKLFA, PackedNormAutoencoder
from favae.adapters.export import differences_from_comfyui
from favae.adapters.flux2 import flux2_from_autoencoder_kl
from favae.adapters.onnx_files import onnx_config
from favae.autoencoders import spatial_compression_ratio
from favae.errors import CheckpointError
from favae.normalization import denormalize_latents, normalize_latents

IMAGES = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
SMALL = {**BLOCKS, "block_out_channels": (32, 32, 64), "layers_per_block": 1}


def make_kl(**settings) -> AutoencoderKL:
    return randomize(AutoencoderKL(**{**SMALL, **settings})).eval()


def make_flux2(**settings) -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(**{**SMALL, "latent_channels": 4, "decoder_block_out_channels": (32, 64, 32), **settings})
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return vae.eval()


@torch.no_grad()
def same_outputs(first, second) -> bool:
    latents = first.encode(IMAGES).latent_dist.mode()
    return torch.allclose(latents, second.encode(IMAGES).latent_dist.mode(), atol=1e-5) and torch.allclose(
        first.decode(latents).sample, second.decode(latents).sample, atol=1e-5
    )


# LDM


@torch.no_grad()
def test_ldm_is_a_flat_file_that_the_original_code_and_diffusers_read(tmp_path, caplog):
    vae = make_kl(scaling_factor=0.5)
    vae.save_pretrained(tmp_path / "vae")
    command("export", tmp_path / "vae", tmp_path / "vae.safetensors", "--format", "ldm")
    state = load_file(tmp_path / "vae.safetensors")
    assert {name.split(".")[0] for name in state} == {"encoder", "decoder", "quant_conv", "post_quant_conv"}
    assert state["decoder.mid.attn_1.q.weight"].ndim == 4
    assert "cannot read" in caplog.text and "encoder widths (32, 32, 64)" in caplog.text

    original = LatentDiffusionAutoencoder(down=(), up=(), widths=(32, 32, 64), channels=4, layers=1)
    original.load_state_dict(state)  # strict
    assert torch.allclose(original.encode(IMAGES), vae.encode(IMAGES).latent_dist.parameters, atol=1e-5)
    back = AutoencoderKL.from_single_file(str(tmp_path / "vae.safetensors"), config=str(tmp_path / "vae"))
    assert same_outputs(vae, back) and back.config.scaling_factor == 0.5

    # of a pipeline, and in a container
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    command("export", tmp_path / "pipeline", tmp_path / "vae.pt", "--format", "ldm")
    assert torch.load(tmp_path / "vae.pt", weights_only=True).keys() == {"state_dict"}


def test_what_comfyui_takes_for_another_network_is_named():
    stock = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16}

    def found(**settings) -> str:
        with torch.device("meta"):
            blocks = {name: values[:1] * 4 for name, values in BLOCKS.items()}
            vae_class = AutoencoderKLFlux2 if "decoder_block_out_channels" in settings else AutoencoderKL
            return "; ".join(differences_from_comfyui(vae_class(**{**blocks, **stock, **settings}).config))

    assert found() == found(use_quant_conv=False, use_post_quant_conv=False) == ""
    assert found(decoder_block_out_channels=(96, 192, 384, 384)) == ""  # FLUX.2's small decoder
    assert "decoder widths" in found(decoder_block_out_channels=(64, 64, 128, 128))
    assert "encoder widths" in found(block_out_channels=(64, 128, 256, 256))
    assert "layers" in found(layers_per_block=1)
    assert "no attention in the middle" in found(mid_block_add_attention=False)
    assert "one of quant_conv" in found(use_quant_conv=False)
    assert "in its levels" in found(up_block_types=("AttnUpDecoderBlock2D", *BLOCKS["up_block_types"]))
    assert "latent channels" in found(latent_channels=64)


# FLUX.2


def test_flux2_has_its_authors_names_and_comes_back(tmp_path):
    vae = make_flux2(batch_norm_eps=1e-3)
    vae.save_pretrained(tmp_path / "vae")
    command("export", tmp_path / "vae", tmp_path / "ae.safetensors", "--format", "flux2")
    names = load_file(tmp_path / "ae.safetensors").keys()
    assert {"encoder.quant_conv.weight", "decoder.post_quant_conv.weight", "bn.running_mean", "bn.running_var"} <= names
    assert {name.split(".")[0] for name in names} == {"encoder", "decoder", "bn"}
    assert "decoder.up.2.block.0.conv1.weight" in names

    command("convert", tmp_path / "ae.safetensors", tmp_path / "back", "--format", "flux2")
    back = AutoencoderKLFlux2.from_pretrained(tmp_path / "back")
    assert same_outputs(vae, back)
    assert tuple(back.config.decoder_block_out_channels) == (32, 64, 32) and back.config.batch_norm_eps == 1e-4
    latents = torch.randn(1, 4, 2, 6)
    assert torch.allclose(normalize_latents(vae, latents), normalize_latents(back, latents), atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"latents_mean": [1.0, 2.0, 3.0, 4.0], "latents_std": [1.0, 0.5, 2.0, 3.0], "scaling_factor": 2.0},
        {"scaling_factor": 0.3, "shift_factor": 0.1},
    ],
)
def test_statistics_of_an_autoencoder_kl_become_flux2_s_batch_norm(settings):
    vae = make_kl(**settings).half()
    vae.register_to_config(latent_rgb_factors=[[0.0] * 3] * 4, latent_rgb_factors_bias=[0.0] * 3)
    flux2 = flux2_from_autoencoder_kl(vae)
    assert (flux2.dtype, flux2.bn.running_var.dtype) == (torch.float16, torch.float32)
    assert same_outputs(vae.float(), flux2.float())
    latents = torch.randn(1, 4, 4, 6)
    normalized = normalize_latents(flux2, latents)
    assert torch.allclose(normalized, normalize_latents(vae, latents), atol=1e-5)
    assert torch.allclose(denormalize_latents(flux2, normalized), latents, atol=1e-5)
    # as the pipeline of FLUX.2 does it
    packed = latents.view(1, 4, 2, 2, 3, 2).permute(0, 1, 3, 5, 2, 4).reshape(1, 16, 2, 3)
    packed = (packed - flux2.bn.running_mean.view(-1, 1, 1)) / (flux2.bn.running_var + 1e-4).sqrt().view(-1, 1, 1)
    assert torch.allclose(torch.nn.functional.pixel_unshuffle(normalized, 2), packed, atol=1e-5)


def test_the_autoencoder_of_a_swapped_flux2_pipeline_is_exported(tmp_path):
    adapter = PackedNormAutoencoder.around(
        make_kl(), latent_channels=4, block_out_channels=(32, 32, 64), batch_norm_eps=1e-2
    )
    adapter.bn.running_mean.normal_()
    adapter.save_pretrained(tmp_path / "pipeline" / "vae")
    command("export", tmp_path / "pipeline", tmp_path / "ae.safetensors", "--format", "flux2")
    state = load_file(tmp_path / "ae.safetensors")
    assert torch.equal(state["bn.running_mean"], adapter.bn.running_mean)
    torch.testing.assert_close(state["bn.running_var"] + 1e-4, adapter.bn.running_var + 1e-2)  # FLUX.2's code adds 1e-4
    command("export", tmp_path / "pipeline", tmp_path / "vae.safetensors", "--format", "ldm")
    assert "bn.running_mean" not in load_file(tmp_path / "vae.safetensors")


def test_variances_that_flux2_cannot_hold_are_refused():
    with pytest.raises(CheckpointError, match="variance"):
        flux2_from_autoencoder_kl(make_kl(scaling_factor=1000.0))


# What is refused


@pytest.mark.parametrize(
    "arguments, match",
    [
        (["favae", "out.safetensors", "--format", "ldm"], "place for the networks of this AutoencoderKLFA"),
        (["asymmetric", "out.safetensors", "--format", "ldm"], "networks of this AsymmetricAutoencoderKLFA"),
        (["asymmetric", "out.safetensors", "--format", "flux2"], "--format onnx writes any"),
        (["flux2", "out.safetensors", "--format", "ldm"], "written from a stock AutoencoderKL"),
        (["kl", "out.safetensors", "--format", "taming-vq"], "written from a stock VQModel"),
        (["kl", "out.safetensors", "--format", "mar"], "format ldm"),
        (["bare", "out.safetensors", "--format", "flux2"], "needs quant_conv"),
        (["kl", "out.bin", "--format", "ldm"], "must end in .safetensors or .pt"),
        (["kl", "full", "--format", "ldm"], "full exists"),
        (["kl", "full", "--format", "onnx"], "full is not empty"),
        (["full", "out.safetensors", "--format", "ldm"], "no autoencoder could be opened"),
        (["full", "out", "--format", "lightningdit"], "no transformer could be opened"),
        (["kl", "out", "--format", "lightningdit"], "AutoencoderKL is no LightningDiTTransformer2DModel"),
    ],
)
def test_what_cannot_be_expressed_is_one_line_and_writes_nothing(arguments, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kl = make_kl()
    kl.save_pretrained("kl")
    make_kl(use_quant_conv=False).save_pretrained("bare")
    AsymmetricAutoencoderKLFA.from_autoencoder_kl(kl).save_pretrained("asymmetric")
    AutoencoderKLFA(**TINY_FAVAE).save_pretrained("favae")
    make_flux2().save_pretrained("flux2")
    Path("full").mkdir()
    Path("full/file").write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    assert match in command_error("export", *arguments)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("model_class", [AutoencoderKLFA, AsymmetricAutoencoderKLFA])
def test_from_single_file_of_our_classes_is_one_line(model_class, tmp_path):
    save_file({"encoder.conv_in.weight": torch.zeros(1)}, tmp_path / "file.safetensors")
    with pytest.raises(ValueError, match=f"no single-file layout is for {model_class.__name__}: .*from_pretrained"):
        model_class.from_single_file(str(tmp_path / "file.safetensors"))


# ONNX


def test_onnx_configs_have_what_optimum_reads(tiny_favae):
    config = onnx_config(tiny_favae)
    assert len(config["down_block_types"]) == len(config["up_block_types"]) == len(config["block_out_channels"])
    assert {"in_channels", "sample_size", "latent_channels", "scaling_factor", "shift_factor"} <= config.keys()
    assert config["_class_name"] == "AutoencoderKLFA" and "auto_map" not in config and json.dumps(config)
    kl = make_kl()
    assert onnx_config(kl)["down_block_types"] == kl.config.down_block_types


def test_onnx_without_its_packages_is_one_line(tmp_path, tiny_favae, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    tiny_favae.save_pretrained(tmp_path / "vae")
    assert "pip install 'favae[export]'" in command_error(
        "export", tmp_path / "vae", tmp_path / "onnx", "--format", "onnx"
    )
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize("kind", ["favae", "asymmetric", "dc"])
@torch.no_grad()
def test_onnx_gives_what_torch_gives_at_any_size(kind, tmp_path):
    reason = "needs the extra [export]: pip install 'favae[export]'"
    pytest.importorskip("onnx", reason=reason)
    pytest.importorskip("onnxscript", reason=reason)
    runtime = pytest.importorskip("onnxruntime", reason=reason)
    vae = {
        "favae": lambda: AutoencoderKLFA(**TINY_FAVAE),
        "asymmetric": lambda: AsymmetricAutoencoderKLFA.from_autoencoder_kl(
            make_kl(), wavelet="bior2.2", wavelet_levels=2
        ),
        "dc": lambda: AutoencoderDC(
            latent_channels=4,
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_block_types="ResBlock",
            decoder_block_types="ResBlock",
            encoder_qkv_multiscales=((), ()),
            decoder_qkv_multiscales=((), ()),
            downsample_block_type="Conv",
            upsample_block_type="interpolate",
        ),
    }[kind]()
    vae = vae.eval()
    vae.save_pretrained(tmp_path / "vae")
    command("export", tmp_path / "vae", tmp_path / "onnx", "--format", "onnx")
    assert sorted(str(path.relative_to(tmp_path / "onnx")) for path in (tmp_path / "onnx").rglob("*.*")) == [
        f"vae_{part}/{file}" for part in ("decoder", "encoder") for file in ("config.json", "model.onnx")
    ]
    assert str(ROOT).encode() not in (tmp_path / "onnx" / "vae_decoder" / "model.onnx").read_bytes()
    encoder, decoder = (
        runtime.InferenceSession(tmp_path / "onnx" / part / "model.onnx", providers=["CPUExecutionProvider"])
        for part in ("vae_encoder", "vae_decoder")
    )
    assert [value.name for value in encoder.get_inputs()] == ["sample"]
    assert encoder.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    output = "latent_sample" if kind == "dc" else "latent_parameters"
    assert [value.name for value in encoder.get_outputs()] == [output]
    ratio = spatial_compression_ratio(vae)
    # optimum computes these where it allocates outputs before it runs the model
    assert encoder.get_outputs()[0].shape[2:] == [f"height // {ratio}", f"width // {ratio}"]
    assert decoder.get_outputs()[0].shape == ["batch", 3, f"height * {ratio}", f"width * {ratio}"]
    assert [value.name for value in decoder.get_inputs()] == ["latent_sample"]
    assert [value.name for value in decoder.get_outputs()] == ["sample"]
    for batch, height, width in ((1, 48, 64), (3, 80, 32)):
        images = torch.rand(batch, 3, height, width) * 2 - 1
        encoded = vae.encode(images)
        expected = encoded.latent if kind == "dc" else encoded.latent_dist.parameters
        found = torch.from_numpy(encoder.run(None, {"sample": images.numpy()})[0])
        assert torch.allclose(found, expected, atol=1e-4)
        latents = expected if kind == "dc" else encoded.latent_dist.mode()
        found = torch.from_numpy(decoder.run(None, {"latent_sample": latents.numpy()})[0])
        assert torch.allclose(found, vae.decode(latents).sample, atol=1e-4)
