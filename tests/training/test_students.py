"""Models that learn to decode the latents of another one, and trainings that start from weights."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TINY_LIGHTNINGDIT, TINY_VQ, make_tiny_kl, refusal, train
from diffusers import AutoencoderKL, AutoencoderTiny, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from safetensors.torch import load_file
from tiny_autoencoders import autoencoders

from favae import AutoencoderTinyFA, VQModelFA
from favae.autoencoders import decode, encode, load_autoencoder
from favae.data.images import ImageDataset
from favae.data.latent_writing import write_latent_cache
from favae.data.sources import open_source
from favae.errors import ConfigError
from favae.normalization import normalize_latents
from favae.training.config import load_config
from favae.training.models import build_model, enable_gradient_checkpointing, lay_out_channels_last
from favae.training.sharding import blocks_of
from favae.training.tokenizer_config import TokenizerConfig
from favae.training.tokenizer_losses import TokenizerLossConfig
from favae.training.tokenizer_module import TokenizerTrainingModule
from train_tokenizer import build_tokenizer, build_training_module

WIDTHS = {"latent_channels": 6, "num_encoder_blocks": [1, 1, 1]}
STUDENT = {
    **WIDTHS,
    "name": "AutoencoderTinyFA",
    "block_out_channels": [8, 8, 8],
    "decoder_block_out_channels": [8, 8],
    "num_decoder_blocks": [1, 1],
}
STOCK_TINY = {
    **WIDTHS,
    "name": "AutoencoderTiny",
    "encoder_block_out_channels": [8, 8, 8],
    "decoder_block_out_channels": [8, 8, 8],
    "num_decoder_blocks": [1, 1, 1],
}
NARROW = {
    "name": "AutoencoderKL",
    "latent_channels": 6,
    "block_out_channels": [4, 4, 8],
    "norm_num_groups": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}


class OfSomebody(AutoencoderTinyFA):
    pass


def recipe_of(folder: Path, model: dict, steps: int, **sections: dict) -> Path:
    """A recipe for the tiny images in a folder."""
    train = {"resolution": 16, "batch_size": 4, "steps": steps, "num_workers": 0, "log_every": 1, "tracker": None}
    train |= {"sample_every": 0, "checkpoint_every": 100, "learning_rate": 0.003} | sections.pop("train", {})
    recipe = folder / "student.yaml"
    recipe.write_text(
        yaml.safe_dump({"model": model, "data": {"path": str(folder / "images")}, "train": train, **sections})
    )
    return recipe


@pytest.fixture
def existing(tmp_path) -> str:
    """A folder with an autoencoder whose latents somebody has a generator for."""
    make_tiny_kl().save_pretrained(tmp_path / "existing")
    return str(tmp_path / "existing")


@pytest.mark.parametrize("model", [STUDENT, STOCK_TINY, NARROW])
def test_a_student_decodes_its_teacher_s_latents(model, existing, tmp_path, image_folder):
    teacher = {"autoencoder": existing, "posterior": "mode"}
    losses = {"latent_noise": 0.1, "adversarial": {"weight": 0.01, "start_step": 39, "channels": 8, "num_layers": 1}}
    recipe = recipe_of(tmp_path, model, 40, teacher=teacher, loss=losses)
    train("train_tokenizer", recipe, f"output={tmp_path / 'run'}", "train.sample_every=40")
    log = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert "kl" not in log[0] and log[-1]["reconstruction"] < log[0]["reconstruction"]
    assert log[-1]["latents"] < log[0]["latents"]  # its own encoder comes closer to the teacher's
    student, teacher = load_autoencoder(str(tmp_path / "run/final")), load_autoencoder(existing)
    latents = encode(teacher, torch.rand(1, 3, 16, 16) * 2 - 1)
    assert decode(student, latents).shape == (1, 3, 16, 16)
    assert (tmp_path / "run/samples/step-0000040.png").exists()


def test_any_autoencoder_may_be_the_teacher(tmp_path):
    """One step each, on latents as they are and as generators see them."""
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    for name, teacher in autoencoders().items():
        if name.startswith("VQ"):
            continue
        resolution = 8 if name == "AutoencoderRAE" else 16  # it has one size
        crops = images[..., :resolution, :resolution]
        teacher.eval().save_pretrained(tmp_path / name)
        channels, side = encode(teacher, crops).shape[1:3]
        stages = (resolution // side).bit_length()
        student = {"latent_channels": channels, "block_out_channels": [8] * stages, "num_encoder_blocks": [1] * stages}
        decoder = {"decoder_block_out_channels": [8] * (stages - 1), "num_decoder_blocks": [1] * (stages - 1)}
        recipe = recipe_of(tmp_path, {"name": "AutoencoderTinyFA", **student, **decoder}, 1)
        for normalize in (False, True):
            options = [f"teacher={{autoencoder: {json.dumps(str(tmp_path / name))}, normalize: {normalize}}}"]
            config = load_config(TokenizerConfig, recipe, [*options, f"train.resolution={resolution}"])
            module = build_training_module(config, build_tokenizer(config))
            lay_out_channels_last(module)  # of teachers of videos, what can be
            loss, logs, reconstruction, _ = module(crops, config.loss)
            assert loss.isfinite() and logs.keys() == {"latents", "reconstruction"}, name
            assert reconstruction.shape == crops.shape
            expected = encode(teacher, crops)
            expected = normalize_latents(teacher, expected) if normalize else expected
            assert torch.allclose(module.latents_of(module.vae, crops), expected, atol=1e-5)
            if "bn" not in dict(teacher.named_modules()):  # which no config can hold
                generator_s = normalize_latents(module.vae, expected)
                assert torch.allclose(generator_s, normalize_latents(teacher, encode(teacher, crops)), atol=1e-4)


def test_flux2_s_own_class_with_a_narrower_decoder(tmp_path, image_folder):
    """Its encoder and batch norm stay, and the decoder begins anew."""
    flux2 = autoencoders()["AutoencoderKLFlux2"]
    flux2.bn.running_mean += 1.0
    flux2.save_pretrained(tmp_path / "flux2/vae")
    model = {"name": "diffusers.AutoencoderKLFlux2", "from_pretrained": f"{tmp_path / 'flux2'}:vae"}
    recipe = recipe_of(tmp_path, {**model, "decoder_block_out_channels": [4, 4]}, 2, train={"parts": "decoder"})
    train("train_tokenizer", recipe, f"output={tmp_path / 'run'}")
    student = load_autoencoder(str(tmp_path / "run/final"))
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    assert torch.equal(encode(student, images), encode(flux2.eval(), images))
    assert torch.equal(student.bn.running_mean, flux2.bn.running_mean)
    assert student.decoder.conv_out.in_channels == 4 and decode(student, encode(student, images)).shape == images.shape


def test_cached_latents_take_the_teacher_s_place(existing, tmp_path, image_folder, monkeypatch):
    """The first step is the same; a cache of other images, or at another size, is refused."""
    teacher = load_autoencoder(existing)
    images = ImageDataset(open_source(str(tmp_path / "images")), 16)
    options = {"cache": {}, "larger": {}, "packed": {"compress": True}, "smooth": {"low_pass": 0.2}}
    for name, how in options.items():
        own = ImageDataset(images.source, 32 if name == "larger" else 16)
        write_latent_cache(teacher, own, tmp_path / name, **how)
    sections = {"teacher": {"autoencoder": existing, "posterior": "mode"}, "loss": {"latents": 0.0}}
    recipe = recipe_of(tmp_path, STUDENT, 2, **sections, train={"batch_size": len(images)})
    with_path = recipe, f"data.path={tmp_path / 'images'}", "data.crop=center", "data.flip=false"
    train("train_tokenizer", *with_path, f"output={tmp_path / 'encoding'}")
    monkeypatch.setattr(type(teacher), "encode", None)  # nobody encodes any more
    monkeypatch.setattr("train_tokenizer.open_latent_teacher", lambda *_: teacher)
    cached = (*with_path, f"teacher.latents={tmp_path / 'cache'}")
    train("train_tokenizer", *cached, f"output={tmp_path / 'cached'}")
    first, second = (
        json.loads((tmp_path / run / "metrics.jsonl").read_text().splitlines()[0])["reconstruction"]
        for run in ("encoding", "cached")
    )
    assert first == pytest.approx(second, rel=1e-5)
    train("train_tokenizer", *cached, f"teacher.latents={tmp_path / 'packed'}", f"output={tmp_path / 'packed-run'}")
    for changes, named in (
        ((f"teacher.latents={tmp_path / 'larger'}",), "images of 32 px, and train.resolution is 16"),
        (("data.crop=random",), "set data.crop=center"),
        ((f"teacher.latents={tmp_path / 'smooth'}",), "written without --low-pass"),
        (("teacher.latents=nowhere",), "`favae cache-latents` writes teacher.latents"),
    ):
        assert named in refusal("train_tokenizer", *cached, *changes, f"output={tmp_path / 'refused'}")


def test_cached_tokens_are_no_latents_of_a_teacher(tmp_path, image_folder):
    teacher = VQModelFA(**TINY_VQ).eval()
    teacher.save_pretrained(tmp_path / "vq")
    images = ImageDataset(open_source(str(tmp_path / "images")), 16)
    write_latent_cache(load_autoencoder(str(tmp_path / "vq")), images, tmp_path / "tokens")
    section = {"autoencoder": str(tmp_path / "vq"), "latents": str(tmp_path / "tokens")}
    recipe = recipe_of(tmp_path, STUDENT, 2, teacher=section)
    refused = refusal("train_tokenizer", recipe, "data.crop=center", "data.flip=false", f"output={tmp_path / 'run'}")
    assert "teacher.latents must be moments" in refused


def test_a_teacher_is_not_trained_and_its_reconstruction_may_be_the_target(existing, tmp_path, image_folder):
    losses = {"reconstruction": "none", "distillation": 1.0, "latents": 0.0}
    losses["adversarial"] = {"weight": 0.1, "start_step": 1, "adaptive": False, "channels": 8, "num_layers": 1}
    teacher = {"autoencoder": existing, "posterior": "mode"}
    before = load_file(f"{existing}/diffusion_pytorch_model.safetensors")
    recipe = recipe_of(tmp_path, STUDENT, 3, teacher=teacher, loss=losses)
    train("train_tokenizer", recipe, f"output={tmp_path / 'run'}")
    after = load_file(f"{existing}/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    log = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert log["distillation"] > 0 and "reconstruction" not in log and "latents" not in log and "adversarial" in log
    module = build_training_module(config := load_config(TokenizerConfig, recipe), build_tokenizer(config))
    assert config.trained_parts == "decoder" and config.train.parts == "all"
    assert len(blocks_of(module.vae)) == 5  # of TinyBlocks, which train.compile would find


def test_what_is_decoded_may_have_to_have_the_latents_it_came_from(existing, tmp_path, image_folder):
    """The gradient goes through the teacher's encoder, which stays as it is."""
    losses = {"reconstruction": "none", "reencoding": 1.0, "latents": 0.0}
    teacher = {"autoencoder": existing, "posterior": "mode"}
    before = load_file(f"{existing}/diffusion_pytorch_model.safetensors")
    recipe = recipe_of(tmp_path, NARROW, 30, teacher=teacher, loss=losses, train={"learning_rate": 1e-2})
    train("train_tokenizer", recipe, f"output={tmp_path / 'run'}")
    after = load_file(f"{existing}/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    log = [json.loads(line)["reencoding"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert 0 < min(log[-3:]) < 0.8 * log[0]


def test_students_that_cannot_be(existing, tmp_path, image_folder):
    other, large = {**STUDENT, "latent_channels": 4}, tmp_path / "large"
    AutoencoderTinyFA(
        latent_channels=6,
        block_out_channels=(8,) * 6,
        num_encoder_blocks=(1,) * 6,
        decoder_block_out_channels=(8,) * 6,
        num_decoder_blocks=(1,) * 6,
        wavelet_levels=0,
    ).save_pretrained(large)  # of f32
    given = {"autoencoder": existing}
    for model, teacher, losses, named in (
        (STUDENT, {}, {}, "teacher.autoencoder is missing"),
        (NARROW, {}, {"distillation": 1.0}, "loss.distillation needs teacher.autoencoder"),
        (NARROW, {}, {"reencoding": 1.0}, "loss.reencoding needs teacher.autoencoder"),
        (NARROW, {"latents": "cache"}, {}, "teacher.latents needs teacher.autoencoder"),
        (other, given, {}, "the model has 3 channels and (4, 4, 4)"),
        (STUDENT, given, {"alignment": {"weight": 1.0}}, "loss.alignment.weight"),
        (STUDENT, {"autoencoder": str(large)}, {}, "teacher.autoencoder takes no images of 16 px"),
        (STUDENT, given, {"scale_equivariance": 1.0}, "loss.scale_equivariance"),
        (STUDENT, {"autoencoder": str(tmp_path)}, {}, "teacher.autoencoder is a folder"),
        ({**NARROW, "from_pretrained": str(tmp_path)}, {}, {}, "model.from_pretrained: no model at"),
    ):
        recipe = recipe_of(tmp_path, model, 1, teacher=teacher, loss=losses)
        assert named in refusal("train_tokenizer", recipe, f"output={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


def test_weights_are_taken_as_far_as_they_fit(tmp_path, caplog):
    pixels = {"decoder_block_out_channels": (8, 8, 8), "num_decoder_blocks": (1, 1, 1), "wavelet_levels": 0}
    small = AutoencoderTinyFA(**WIDTHS, block_out_channels=(8, 8, 8), **pixels)
    small.save_pretrained(tmp_path / "small/vae")
    settings = {"name": "AutoencoderTinyFA", "from_pretrained": f"{tmp_path / 'small'}:vae"}
    same = build_model(settings)
    assert all(torch.equal(a, b) for a, b in zip(same.state_dict().values(), small.state_dict().values()))
    assert not caplog.records
    cut = {"wavelet_levels": 1, "decoder_block_out_channels": (8, 8), "num_decoder_blocks": (1, 1)}
    shorter = build_model(settings | cut)
    assert torch.equal(shorter.decoder.layers[1].weight, small.decoder.layers[1].weight)
    assert torch.equal(shorter.encoder.layers[0].weight, small.encoder.layers[0].weight)
    assert "begin anew: decoder.layers." in caplog.text
    source = {"from_pretrained": str(tmp_path / "small/vae")}
    path = f"{OfSomebody.__module__}.OfSomebody"  # a name that neither favae nor diffusers has
    build_model({"name": path, **source}).save_pretrained(tmp_path / "own")
    own = build_model({"name": path, "from_pretrained": str(tmp_path / "own")})
    assert isinstance(own, OfSomebody) and torch.equal(own.decoder.layers[1].weight, small.decoder.layers[1].weight)
    with pytest.raises(ConfigError, match="no weight of the AutoencoderTinyFA"):
        build_model({"name": "LightningDiTTransformer2DModel", **TINY_LIGHTNINGDIT, **source})


def test_what_is_not_given_is_as_in_the_weights(tmp_path):
    wide = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    AutoencoderKL(**wide, block_out_channels=(8, 8), norm_num_groups=4).save_pretrained(tmp_path / "wide")
    model = {"name": "AutoencoderKL", "from_pretrained": str(tmp_path / "wide"), "block_out_channels": [8, 16]}
    build_tokenizer(load_config(TokenizerConfig, recipe_of(tmp_path, model, 1)))  # its types of blocks fit
    autoencoders()["AutoencoderDC"].save_pretrained(tmp_path / "dc")
    build_model({"name": "diffusers.AutoencoderDC", "from_pretrained": str(tmp_path / "dc")})


class WithoutParts(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self):
        super().__init__()

    def encode(self, x): ...

    decode = encode


def test_what_a_model_of_ones_own_must_have(tmp_path):
    recipe = recipe_of(tmp_path, {"name": f"{WithoutParts.__module__}.WithoutParts"}, 1)
    with pytest.raises(ConfigError, match="has no encoder, decoder, latent_channels in its config"):
        build_tokenizer(load_config(TokenizerConfig, recipe))


def test_models_that_cannot_be_trained_like_this(tmp_path, image_folder):
    model = {"name": "diffusers.AutoencoderDC", "from_pretrained": str(tmp_path / "dc")}
    autoencoders()["AutoencoderDC"].save_pretrained(tmp_path / "dc")
    recipe = recipe_of(tmp_path, model, 1)
    assert "gives no distribution of latents" in refusal("train_tokenizer", recipe, f"output={tmp_path / 'run'}")
    VQModelFA(**TINY_VQ, frequency_complement=None).save_pretrained(tmp_path / "vq")
    model = {"name": "VQModelFA", "from_pretrained": str(tmp_path / "vq")}
    recipe = recipe_of(tmp_path, model, 1, loss={"spectrum": {"weight": 0.1}})
    message = refusal("train_tokenizer", recipe, f"output={tmp_path / 'vq_run'}")
    assert "needs model.frequency_complement" in message and not (tmp_path / "vq_run").exists()
    words = (recipe_of(tmp_path, NARROW, 1), f"output={tmp_path / 'half'}", "train.mixed_precision=fp16")
    assert "train.mixed_precision=fp16 needs a GPU" in refusal("train_tokenizer", *words)


@pytest.mark.parametrize("part, frozen", [("decoder", "encoder"), ("encoder", "decoder")])
def test_a_part_is_tuned_and_the_other_kept(part, frozen, existing, tmp_path, image_folder):
    model = {"name": "AutoencoderKL", "from_pretrained": existing}
    recipe = recipe_of(tmp_path, model, 2, train={"parts": part, "resolution": 32})
    train("train_tokenizer", recipe, f"output={tmp_path / 'run'}")
    before, after = (AutoencoderKL.from_pretrained(path).state_dict() for path in (existing, tmp_path / "run/final"))
    changed = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert part in changed and frozen not in changed


def test_a_part_that_is_kept_drops_nothing(existing):
    vae = build_model({"name": "AutoencoderKL", "from_pretrained": existing})
    vae.decoder.requires_grad_(False)
    vae.post_quant_conv.requires_grad_(False)
    module = TokenizerTrainingModule(vae, [TokenizerLossConfig()]).train()
    assert module.training and vae.encoder.training and not vae.decoder.training


def test_a_tiny_encoder_sees_the_same_images_with_checkpointing():
    """That of diffusers forgets to scale them to [0, 1]."""
    vae = build_model(STOCK_TINY)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    expected = vae.encode(images).latents
    enable_gradient_checkpointing(vae)
    torch.testing.assert_close(vae.encode(images).latents, expected)


def test_a_teacher_without_a_posterior_leaves_that_of_the_student_alone(tmp_path):
    student, teacher = build_model(NARROW), AutoencoderTiny(**{k: v for k, v in STOCK_TINY.items() if k != "name"})
    losses = TokenizerLossConfig(latents=1.0)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    module = TokenizerTrainingModule(student, [losses], latent_teacher=teacher.eval())
    found = []
    for logvar in (-20.0, 2.0):
        with torch.no_grad():
            student.quant_conv.weight[6:] = 0
            student.quant_conv.bias[6:] = logvar
        torch.manual_seed(0)
        _, distance = module._decode_teacher_latents(teacher, images, losses, None).terms["latents"]
        found.append(distance.item())
    assert found[0] == pytest.approx(found[1])
