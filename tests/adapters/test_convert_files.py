"""Reading files of other programs, opening them as models, and the command."""

import argparse
import pickle
from pathlib import Path

import pytest
import torch
from conftest import Payload, command, command_error
from diffusers import AutoencoderKL
from original_layouts import VQGAN, FrequencyAugmentedCodec, LatentDiffusionAutoencoder, LightningDiT, randomize
from safetensors.torch import load_file, save_file

from favae import LightningDiTPipeline, LightningDiTTransformer2DModel
from favae.adapters import from_single_file, read_checkpoint, to_single_file
from favae.errors import CheckpointError

IMAGES = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
MEAN, STD = torch.linspace(-1, 1, 4).view(1, 4, 1, 1), torch.linspace(0.5, 2, 4).view(1, 4, 1, 1)


@pytest.fixture
def vavae(tmp_path) -> Path:
    state = randomize(LatentDiffusionAutoencoder()).state_dict() | {"loss.logvar": torch.zeros(())}
    torch.save({"state_dict": state, "epoch": 3, "callbacks": {}}, tmp_path / "vavae.pt")
    return tmp_path / "vavae.pt"


@pytest.fixture
def lightningdit(tmp_path) -> Path:
    network = randomize(LightningDiT(size=4, channels=4)).state_dict()
    average = {f"module._orig_mod.{name}": tensor for name, tensor in network.items()}
    old = {name: torch.zeros_like(tensor) for name, tensor in network.items()}
    content = {"model": old, "ema": average, "opt": {"state": {}, "param_groups": [{"lr": 2e-4}]}, "config": {"a": [1]}}
    torch.save(content, tmp_path / "lightningdit.pt")
    return tmp_path / "lightningdit.pt"


# Reading


def test_containers_and_prefixes(tmp_path):
    ones, twos = torch.ones(2), torch.full((2,), 2.0)
    file = tmp_path / "a.pt"
    torch.save(
        {"model": {"module.a": ones}, "ema": {"_orig_mod.a": twos, "blocks.0._orig_mod.b": ones}, "step": 3}, file
    )
    assert torch.equal(read_checkpoint(file)["a"], ones)
    average = read_checkpoint(file, containers=("ema", "model"))
    assert torch.equal(average["a"], twos) and average.keys() == {"a", "blocks.0.b"}
    torch.save({"module._orig_mod.module.a": ones, "version": "1.0", "steps": 3}, file)
    assert read_checkpoint(file).keys() == {"a"}
    torch.save({"module.a": ones, "a": twos}, file)
    with pytest.raises(CheckpointError, match="has a twice"):
        read_checkpoint(file)
    save_file({"module.a": ones}, tmp_path / "a.safetensors")
    assert torch.equal(read_checkpoint(tmp_path / "a.safetensors")["a"], ones)


@pytest.mark.parametrize("zipped", [True, False])
def test_objects_in_a_pickle_are_refused_and_not_executed(zipped, tmp_path):
    written, file = tmp_path / "written", tmp_path / "evil.pt"
    torch.save(
        {"state_dict": {"a": torch.ones(1)}, "hook": Payload(written)}, file, _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(
        CheckpointError, match=r"evil\.pt holds objects \(\S+\) that only foreign code can build"
    ) as error:
        read_checkpoint(file)
    assert "\n" not in str(error.value) and not written.exists()
    pickle.loads(pickle.dumps(Payload(written)))
    assert written.read_text() == "executed"  # the payload works

    torch.save({"model": {"a": torch.ones(1)}, "args": argparse.Namespace(lr=1)}, file)
    with pytest.raises(CheckpointError, match=r"\(argparse\.Namespace\)"):
        read_checkpoint(file)


def test_files_that_are_no_checkpoints(tmp_path, vavae):
    def refused(match: str, name: str, content: bytes | None = None) -> None:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=match) as error:
            read_checkpoint(tmp_path / name)
        assert "\n" not in str(error.value)

    refused("none.pt: no such file", "none.pt")
    refused("no such file", ".")
    for name, length in [("half.pt", 0.5), ("almost.pt", 0.99), ("start.pt", 0.001)]:
        content = vavae.read_bytes()
        refused(f"{name} is damaged", name, content[: int(len(content) * length)])
    for name in ("empty.pt", "empty.safetensors"):
        refused("is damaged", name, b"")
    refused("is damaged", "words.pt", b"<html>404: not found</html>")
    refused("is damaged", "words.safetensors", b"<html>404: not found</html>")
    torch.save({"epoch": 3}, tmp_path / "numbers.pt")
    refused("holds no tensors", "numbers.pt")
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    refused("holds no tensors", "tensor.pt")


# Models


@pytest.mark.parametrize("format, other, up", [("ldm", "mar", (2,)), ("mar", "ldm", ())])
def test_vavae_and_mar_are_told_apart(format, other, up, tmp_path):
    """Both have the same names, and different scaling factors."""
    state = LatentDiffusionAutoencoder(up=up).state_dict()
    torch.save({"model": state}, tmp_path / "file.pt")
    vae = from_single_file(tmp_path / "file.pt", format)
    with pytest.raises(CheckpointError, match=rf"file\.pt is not a {other} checkpoint: .*format {format}"):
        from_single_file(tmp_path / "file.pt", other)
    with pytest.raises(CheckpointError, match=f"format {format}"):
        to_single_file(vae, tmp_path / "out.pt", other)
    to_single_file(vae, tmp_path / "out.pt", format)
    assert state.keys() == read_checkpoint(tmp_path / "out.pt").keys()


def test_no_attention_in_any_level_is_not_mar(tmp_path):  # but Stable Diffusion
    torch.save({"model": LatentDiffusionAutoencoder(down=(), up=()).state_dict()}, tmp_path / "sd.pt")
    assert from_single_file(tmp_path / "sd.pt", "ldm").config.scaling_factor == 1
    with pytest.raises(CheckpointError, match="format ldm"):
        from_single_file(tmp_path / "sd.pt", "mar")


def test_a_latent_diffusion_model_s_own_scaling_factor_is_kept(tmp_path, caplog):
    def opened(format: str, state: dict, **more: torch.Tensor) -> float:
        torch.save({f"first_stage_model.{name}": tensor for name, tensor in state.items()} | more, tmp_path / "ldm.pt")
        return from_single_file(tmp_path / "ldm.pt", format).config.scaling_factor

    kl, vq, own = LatentDiffusionAutoencoder().state_dict(), VQGAN().state_dict(), torch.tensor(0.75)
    assert opened("ldm", kl, scale_factor=own) == opened("taming-vq", vq, scale_factor=own[None]) == 0.75
    assert from_single_file(tmp_path / "ldm.pt", "taming-vq", scaling_factor=0.5).config.scaling_factor == 0.5
    assert not caplog.records
    for wrong in (torch.nan, 0.0, [1.0, 2.0]):
        with pytest.raises(CheckpointError, match="scale_factor is not a positive number"):
            opened("ldm", kl, scale_factor=torch.tensor(wrong))
    assert opened("ldm", kl) == 1 and "does not say its scaling factor" in caplog.text

    # Statistics are of latents that nothing scales.
    torch.save({"mean": MEAN, "std": STD}, tmp_path / "stats.pt")
    torch.save(LatentDiffusionAutoencoder(up=()).state_dict(), tmp_path / "mar.pt")
    assert from_single_file(tmp_path / "mar.pt", "mar", tmp_path / "stats.pt").config.scaling_factor == 1


@torch.no_grad()
def test_from_single_file_opens_every_format(tmp_path, vavae, lightningdit):
    vae = from_single_file(vavae, "ldm")
    original = LatentDiffusionAutoencoder()
    original.load_state_dict(read_checkpoint(vavae), strict=False)
    assert torch.allclose(vae.encode(IMAGES).latent_dist.parameters, original.encode(IMAGES), atol=1e-5)
    assert not vae.training and vae.config.latents_mean is None

    network = randomize(LatentDiffusionAutoencoder(up=()))
    torch.save({"model": network.half().state_dict()}, tmp_path / "kl16.ckpt")
    mar = from_single_file(tmp_path / "kl16.ckpt", "mar")
    assert (mar.config.scaling_factor, mar.dtype) == (0.2325, torch.float16)
    assert from_single_file(tmp_path / "kl16.ckpt", "mar", scaling_factor=0.5).config.scaling_factor == 0.5

    network = randomize(LightningDiT(size=4, channels=4))
    network.load_state_dict(read_checkpoint(lightningdit, ("ema",)))
    latents, times, labels = torch.randn(2, 4, 4, 4), torch.tensor([0.2, 0.9]), torch.tensor([1, 5])
    velocity = from_single_file(lightningdit, "lightningdit")(latents, times, labels).sample
    assert torch.allclose(velocity, network(latents, times, labels), atol=1e-5)

    network = randomize(VQGAN())
    save_file(network.state_dict(), tmp_path / "vqgan.safetensors")
    assert torch.allclose(
        from_single_file(tmp_path / "vqgan.safetensors", "taming-vq")(IMAGES).sample, network(IMAGES), atol=1e-5
    )

    network = randomize(FrequencyAugmentedCodec())
    torch.save({"model": network.state_dict(), "step": 0}, tmp_path / "favae.pt")
    images = network.decode(network.quantize(network.encode(IMAGES))[0])
    codec = from_single_file(tmp_path / "favae.pt", "favae-vq")
    assert torch.allclose(codec(IMAGES).sample, images, atol=1e-5)
    with pytest.raises(CheckpointError, match="format must be one of .* got 'sdxl'"):
        to_single_file(codec, tmp_path / "back.pt", "sdxl")
    with pytest.raises(CheckpointError, match="no way back to favae-vq"):
        to_single_file(codec, tmp_path / "back.pt", "favae-vq")


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"format": "sd3"}, "format must be one of ldm, flux2, lightningdit, mar, taming-vq, favae-vq, got 'sd3'"),
        ({"format": "taming-vq"}, r"vavae\.pt is not a taming-vq checkpoint: lacks quantize\.embedding\.weight"),
        ({"format": "lightningdit"}, r"is not a lightningdit checkpoint: lacks x_embedder\.proj\.weight"),
        ({"format": "lightningdit", "latents_stats": "stats.pt"}, "statistics are for an AutoencoderKL"),
        ({"format": "lightningdit", "scaling_factor": 1.0}, "a LightningDiTTransformer2DModel has no scaling factor"),
        ({"format": "ldm", "latents_stats": "other.pt"}, "lacks mean and std"),
        ({"format": "ldm", "latents_stats": "three.pt"}, "statistics of 3 channels, the autoencoder has 4"),
        ({"format": "ldm", "latents_stats": "zero.pt"}, "std above 0"),
    ],
)
def test_what_does_not_fit_is_refused(settings, match, vavae, tmp_path):
    torch.save({"mean": MEAN[:, :3], "std": STD[:, :3]}, tmp_path / "three.pt")
    torch.save({"mean": MEAN, "std": STD * 0}, tmp_path / "zero.pt")
    torch.save({"mean": MEAN}, tmp_path / "other.pt")
    if "latents_stats" in settings:
        settings = settings | {"latents_stats": tmp_path / settings["latents_stats"]}
    with pytest.raises(CheckpointError, match=match):
        from_single_file(vavae, **settings)


# The command


def test_convert_an_autoencoder_with_its_statistics_and_back(vavae, tmp_path):
    torch.save({"mean": MEAN, "std": STD}, tmp_path / "latents_stats.pt")
    folder = tmp_path / "out" / "vae"
    options = ("--format", "ldm", "--latents-stats", tmp_path / "latents_stats.pt")
    command("convert", vavae, folder, *options)
    vae = AutoencoderKL.from_pretrained(folder)
    assert torch.allclose(torch.tensor(vae.config.latents_mean), MEAN.flatten())
    assert torch.allclose(torch.tensor(vae.config.latents_std), STD.flatten())
    assert {path.name for path in folder.parent.iterdir()} == {"vae"}

    expected = {name: t for name, t in read_checkpoint(vavae).items() if not name.startswith("loss.")}
    for name in ("back.pt", "back.safetensors"):
        command("export", folder, tmp_path / name, "--format", "ldm")
        back = read_checkpoint(tmp_path / name, containers=("state_dict",))
        assert back.keys() == expected.keys() and all(torch.equal(back[key], expected[key]) for key in back)
    assert load_file(tmp_path / "back.safetensors").keys() == expected.keys()
    assert torch.load(tmp_path / "back.pt", weights_only=True).keys() == {"state_dict"}


def test_convert_a_transformer_alone_and_into_a_pipeline(vavae, lightningdit, tmp_path):
    command("convert", vavae, tmp_path / "vae", "--format", "ldm")
    (tmp_path / "transformer").mkdir()  # an empty folder is no obstacle
    command("convert", lightningdit, tmp_path / "transformer", "--format", "lightningdit")
    transformer = LightningDiTTransformer2DModel.from_pretrained(tmp_path / "transformer")
    assert transformer.config.num_classes == 5

    options = ["--format", "lightningdit", "--vae", str(tmp_path / "vae")]
    command("convert", lightningdit, tmp_path / "pipeline", *options)
    pipe = LightningDiTPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe.scheduler.config.shift == pytest.approx(1 / 0.3)
    pipe.set_progress_bar_config(disable=True)
    assert pipe([1, 2], num_inference_steps=2, output_type="pt").images.shape == (2, 3, 16, 16)

    expected = read_checkpoint(lightningdit, ("ema",))
    for source in ("transformer", "pipeline"):
        file = tmp_path / f"{source}.pt"
        command("export", tmp_path / source, file, "--format", "lightningdit")
        for container in ("model", "ema"):
            back = read_checkpoint(file, (container,))
            assert back.keys() == expected.keys()
            assert all(torch.allclose(back[name], expected[name], atol=1e-6) for name in back)


@pytest.mark.parametrize(
    "arguments, match",
    [
        (["none.pt", "out", "--format", "ldm"], "none.pt: no such file"),
        (["evil.pt", "out", "--format", "ldm"], "only foreign code can build"),
        (["vavae.pt", "out", "--format", "favae-vq"], "not a favae-vq checkpoint: lacks encoder.down.0.block"),
        (["vavae.pt", "full", "--format", "ldm"], "full is not empty"),
        (["vavae.pt", "vavae.pt", "--format", "ldm"], "vavae.pt is a file; name a new folder"),
        (["vavae.pt", "out", "--format", "ldm", "--vae", "full"], "--vae makes a pipeline of a lightningdit"),
        (["full", "out", "--format", "taesd", "--scaling-factor", "2"], "taesd takes neither"),
        (["vavae.pt", "out", "--format", "flux2", "--scaling-factor", "2"], "Flux2 has no scaling factor"),
        (["lightningdit.pt", "out", "--format", "lightningdit", "--vae", "full"], "no autoencoder could be opened"),
        (["lightningdit.pt", "out", "--format", "lightningdit", "--vae", "wide"], "4 latent channels"),
    ],
)
def test_errors_are_one_line_and_write_nothing(arguments, match, vavae, lightningdit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"a": torch.ones(1)}, "hook": Payload(tmp_path / "written")}, "evil.pt")
    Path("full").mkdir()
    Path("full/file").write_text("kept")
    AutoencoderKL(latent_channels=6, block_out_channels=(32,)).save_pretrained("wide")
    before = sorted(tmp_path.rglob("*"))
    assert match in command_error("convert", *arguments)
    assert sorted(tmp_path.rglob("*")) == before
