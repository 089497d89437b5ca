import importlib

import pytest
from conftest import ROOT, run, tiny_tokenizer_recipe

from favae.errors import ConfigError
from favae.training.config import GeneratorConfig, TokenizerConfig, load_config, loss_at

RECIPES = sorted(file for kind in ("tokenizer", "generator") for file in ROOT.glob(f"configs/{kind}/*.yaml"))


@pytest.fixture
def recipe(tmp_path):
    return tiny_tokenizer_recipe(tmp_path, "photos")


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.stepz=3", r"unknown key train.stepz; train takes steps, batch_size"),
        ("trian.steps=3", r"unknown key trian; the top level takes output, seed"),
        ("loss.alignment.wieght=1", r"unknown key loss.alignment.wieght; loss.alignment takes weight, backbone"),
        ("model.latent_chanels=4", r"unknown key model.latent_chanels; AutoencoderKLFA takes in_channels"),
        ("model.name=VAE", r"model.name must be one of AutoencoderKLFA, VQModelFA, AutoencoderKL, got VAE"),
        ("train.steps=many", r"train.steps: .*many"),
        ("train.steps=0", r"train.steps must be at least 1, got 0"),
        ("train.resolution=18", r"train.resolution must be a multiple of 4"),
        ("train.mixed_precision=fp8", r"train.mixed_precision must be one of no, fp16, bf16, got fp8"),
        ("train.lr_scheduler=sine", r"train.lr_scheduler must be one of linear, cosine"),
        ("loss.reconstruction=l3", r"loss.reconstruction must be one of l1, l2, none, got l3"),
        ("loss.adversarial.weight=-1", r"loss.adversarial.weight must be at least 0"),
        ("loss.adversarial.num_layers=3", r"train.resolution must be at least 24 for a discriminator of 3 layers"),
        ("train.resolution=0", r"train.resolution must be at least 1"),
        ("train.betas=[0.9", r"train.betas=\[0.9: "),
        ("train.checkpoints_total_limit=0", r"train.checkpoints_total_limit must be at least 1"),
        ("train.mixed_precision=fp16", r"fp16 .*use bf16"),
        ("data.crop=left", r"data.crop must be one of random, center"),
        ("steps", r"'steps' is not of the form key=value"),
        ("loss.spectrum.weight=1", r"loss.spectrum.weight needs model.frequency_complement"),
        ("loss.spectrum.kind=learned", r"loss.spectrum.kind must be one of dynamic, fixed, none"),
        ("loss.spectrum.kernel_size=4", r"loss: kernel_size must be an odd number"),
        ("loss.reconstruction=none", r"loss.reconstruction=none .* the adaptive weights of .* loss.adversarial"),
        ("loss={reconstruction: none, adversarial: {weight: 0}}", r"loss.reconstruction=none leaves nothing to train"),
        ("loss.high_dropout=2", r"loss.high_dropout is a probability, got 2"),
        ("loss.stft={weight: 1, window: 32}", r"loss.stft.window must be at most train.resolution = 16, got 32"),
        ("loss.stft.stride=0", "stride"),
        ("loss.band={weight: 1, levels: 5}", r"loss.band.levels=5 does not fit train.resolution = 16"),
        ("loss.band.weights=[1]", r"loss.band takes four weights"),
        ("loss.band.weights=[1,1,1,-1]", r"loss.band takes four weights of at least 0"),
        ("loss.spectrum.learning_rate=-1", r"loss.spectrum.learning_rate must be at least 0"),
        ("loss.alignment.max_weight=-1", r"loss.alignment.max_weight must be at least 0"),
        ("train.lr_num_cycles=0", r"train.lr_num_cycles must be at least 1"),
        ("stages=[{start_step: 5, loss: {spectrum: {kernel_size: null}}}]", r"loss.spectrum.kernel_size holds for"),
        ("model.from_autoencoder_kl={subfolder: vae}", r"model.from_autoencoder_kl is a folder or hub name"),
        ("loss.band.wavelet=hair", r"loss: wavelet 'hair' is not a discrete pywt bank"),
        ("stages=[{start_step: 5}, {start_step: 5}]", r"stages\[1\].start_step must be above 5, got 5"),
        ("stages=[{start_step: 5, loss: {kl2: 1}}]", r"stages\[0\].loss.kl2"),
        ("stages=[{start_step: 5, loss: {spectrum: {sigma: 2}}}]", r"loss.spectrum.sigma holds for the whole run"),
        ("stages=[{start_step: 5, loss: {alignment: {backbone: x}}}]", r"loss.alignment.backbone holds for the whole"),
        ("stages=[{start_step: 5, loss: {kl: -1}}]", r"stages\[0\]: loss.kl must be at least 0"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(recipe, override, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_config(TokenizerConfig, recipe, [override])
    assert "\n" not in str(error.value)


def test_files_that_are_no_recipe(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_config(TokenizerConfig, tmp_path / "missing.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\nb: }")
    with pytest.raises(ConfigError, match="broken.yaml") as error:
        load_config(TokenizerConfig, tmp_path / "broken.yaml")
    assert "\n" not in str(error.value)
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="mapping"):
        load_config(TokenizerConfig, tmp_path / "list.yaml")


def test_defaults_then_file_then_command_line(recipe):
    config = load_config(TokenizerConfig, recipe, ["train.steps=5", "loss.kl=1e-4"])
    assert (config.train.steps, config.train.batch_size, config.loss.kl) == (5, 2, 1e-4)
    assert config.train.betas == [0.5, 0.9] and config.output == "runs/tokenizer"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_resolves_and_dry_runs(recipe, capsys, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    schema = TokenizerConfig if recipe.parent.name == "tokenizer" else GeneratorConfig
    script = importlib.import_module(f"train_{recipe.parent.name}")
    config = load_config(schema, recipe)
    if "from_autoencoder_kl" in config.model:
        pytest.skip(f"{config.model['from_autoencoder_kl']} is on the hub")
    script.main(schema, "", script.train, script.dry_run, [str(recipe), "--dry-run", "--processes", "8"])
    output = capsys.readouterr().out
    assert f"steps: {config.train.steps}" in output  # the resolved config
    assert "parameters" in output and "steps per epoch" in output
    assert "floats per" in output or "tokens of" in output  # of a codebook
    assert not (ROOT / config.output).exists() or config.output.startswith("runs/photos")


def test_recipes_are_comparable():
    """Equal latent, steps, data and losses; FLOPs within 5 % on the photographs."""
    import torch

    from favae.autoencoders import measure_budget
    from favae.training.models import TOKENIZERS, build_model

    for ours, baseline in (("photos_favae", "photos_vavae"), ("favae_f16d32", "vavae_f16d32")):
        a, b = (load_config(TokenizerConfig, ROOT / f"configs/tokenizer/{name}.yaml") for name in (ours, baseline))
        assert a.loss == b.loss and a.data == b.data
        assert (a.train.steps, a.train.batch_size) == (b.train.steps, b.train.batch_size)
        with torch.device("meta"):
            a, b = (build_model(config.model, TOKENIZERS) for config in (a, b))
        a, b = (measure_budget(model, model.config.sample_size) for model in (a, b))
        assert a.floats_per_image == b.floats_per_image
        ratio = a.flops / b.flops
        assert 0.95 <= ratio <= 1.05 if ours == "photos_favae" else ratio < 1


def test_command_line_errors_are_one_line(tmp_path):
    recipe = tiny_tokenizer_recipe(tmp_path, tmp_path / "nowhere")
    for arguments, message in (
        (["train.stepz=1"], "error: unknown key train.stepz"),
        ([f"output={tmp_path / 'run'}"], "nowhere: no such folder"),
        ([f"output={tmp_path / 'run'}", "loss.alignment.weight=1", "data.path=photos"], "vit_large_patch14_dinov2"),
    ):
        result = run("train_tokenizer.py", recipe, *arguments, check=False)
        assert result.returncode == 1
        last = result.stderr.strip().splitlines()[-1]
        assert message in last and "Traceback" not in result.stderr
    assert "loss.alignment.weights=FILE" in last and "loss.alignment.weight=0" in last
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "model, override, message",
    [
        ("{name: VQModelFA, block_out_channels: [8, 8, 16]}", "loss.high_dropout=0.1", "loss.high_dropout needs high"),
        ("{name: VQModelFA, block_out_channels: [8, 8, 16]}", "loss.latent_noise=0.1", "model.name=VQModelFA has none"),
        (
            "{name: AutoencoderKLFA, block_out_channels: [8, 8, 16], from_autoencoder_kl: somewhere}",
            "loss.alignment.weight=0.1",
            "loss.alignment.weight needs an encoder that learns, model.from_autoencoder_kl keeps it frozen",
        ),
        (
            "{name: AutoencoderKLFA, block_out_channels: [8, 8, 16], encoder_type: image, frequency_complement: conv}",
            "loss.spectrum.weight=0.1",
            "loss.spectrum.weight needs .* without model.encoder_type=image and model.from_autoencoder_kl",
        ),
        (
            "{name: VQModelFA, block_out_channels: [8, 8, 16], frequency_complement: null}",
            "loss.spectrum.weight=0.1",
            "loss.spectrum.weight needs model.frequency_complement",
        ),
        (
            "{name: VQModelFA, block_out_channels: [8, 8, 8, 8, 16]}",
            "loss.scale_equivariance=0.1",
            "loss.scale_equivariance needs train.resolution of at least 32",
        ),
    ],
)
def test_losses_that_a_model_does_not_allow(tmp_path, model, override, message):
    (tmp_path / "recipe.yaml").write_text(f"model: {model}\ntrain: {{resolution: 16}}\n")
    with pytest.raises(ConfigError, match=message):
        load_config(TokenizerConfig, tmp_path / "recipe.yaml", [override])


def test_stages_change_the_loss_at_their_step(recipe):
    stages = "stages=[{start_step: 3, loss: {alignment: {weight: 0.1}}}, {start_step: 5, loss: {kl: 0.5}}]"
    config = load_config(TokenizerConfig, recipe, ["loss.alignment.weight=0.5", stages])
    weights = [loss_at(config.losses(), step).alignment.weight for step in (0, 2, 3, 4, 5, 100)]
    assert weights == [0.5, 0.5, 0.1, 0.1, 0.1, 0.1]
    assert [loss_at(config.losses(), step).kl for step in (4, 5)] == [config.loss.kl, 0.5]
    assert config.adversarial_start == 3
    assert load_config(TokenizerConfig, recipe, ["loss.adversarial.weight=0"]).adversarial_start is None
    late = ["loss.adversarial.weight=0", "stages=[{start_step: 7, loss: {adversarial: {weight: 0.2}}}]"]
    assert load_config(TokenizerConfig, recipe, late).adversarial_start == 7
