import importlib
import re

import pytest
import torch
import yaml
from conftest import ROOT, TINY_LIGHTNINGDIT, command, refusal, tiny_tokenizer_recipe, train

from favae import LightningDiTTransformer2DModel
from favae.autoencoders import measure_budget
from favae.errors import ConfigError
from favae.training.config import load_config, to_yaml
from favae.training.generator_config import GeneratorConfig
from favae.training.models import build_model
from favae.training.tokenizer_config import TokenizerConfig, losses_at

RECIPES = sorted(
    file for folder in ("tokenizer", "compression", "generator") for file in ROOT.glob(f"configs/{folder}/*.yaml")
)


@pytest.fixture
def recipe(tmp_path):
    return tiny_tokenizer_recipe(tmp_path, "photos")


@pytest.mark.parametrize(
    "override, named",
    [
        # unknown keys, with what the section takes
        ("train.stepz=3", "unknown key train.stepz; train takes steps, batch_size"),
        ("trian.steps=3", "unknown key trian; the top level takes output, seed"),
        ("loss.alignment.wieght=1", "unknown key loss.alignment.wieght; loss.alignment takes weight, backbone"),
        ("model.latent_chanels=4", "unknown key model.latent_chanels; model takes in_channels"),
        # wrong types, of settings and of the model's arguments
        ("train.steps=many", "train.steps .*integer.*'many'"),
        ("train.steps=true", "train.steps .*integer.*True"),
        ("data.flip=maybe", "data.flip .*boolean.*'maybe'"),
        ("loss=3", "loss .*3"),
        ("train.betas=[0.9]", "train.betas"),
        ("loss.band.weights=[1]", "loss.band.weights"),
        ("model.latent_channels=abc", "model.latent_channels .*integer.*'abc'"),
        ("model.wavelet_levels=two", "model.wavelet_levels .*'two'"),
        ("model.block_out_channels=64", "model.block_out_channels .*64"),
        ("model.block_out_channels=[8,a,16]", "model.block_out_channels.1 .*'a'"),
        ("model.scaling_factor=abc", "model.scaling_factor .*'abc'"),
        ("model.shortcut=maybe", "model.shortcut .*'overlapping'.*'maybe'"),
        # one of several words
        ("model.name=VAE", "model.name .*AutoencoderKLFA, .*VAE"),
        ("model.name=no_package.VAE", "model.name: no_package.VAE"),
        ("model.name=.VAE", "model.name: .VAE"),
        ("model.name=os.path.join", "model.name: os.path.join is no class"),
        ("model.name=torch.nn.Linear", "model.name: torch.nn.Linear is no class"),
        ("train.mixed_precision=fp8", "train.mixed_precision .*'no', 'fp16' or 'bf16'.*'fp8'"),
        ("train.lr_scheduler=sine", "train.lr_scheduler .*'cosine'.*'sine'"),
        ("loss.reconstruction=l3", "loss.reconstruction .*'l1', 'l2' or 'none'.*'l3'"),
        ("loss.spectrum.type=learned", "loss.spectrum.type .*'dynamic', 'fixed' or 'none'"),
        ("data.crop=left", "data.crop .*'random', 'center' or 'window'"),
        # ranges
        ("train.steps=0", "train.steps .*greater than or equal to 1, got 0"),
        ("train.resolution=0", "train.resolution .*greater than or equal to 1"),
        ("train.checkpoints_total_limit=0", "train.checkpoints_total_limit"),
        ("train.ema_decay=1", "train.ema_decay"),
        ("train.lr_num_cycles=0", "train.lr_num_cycles"),
        ("loss.adversarial.weight=-1", "loss.adversarial.weight .*greater than or equal to 0"),
        ("loss.high_dropout=2", "loss.high_dropout"),
        ("loss.band.weights=[1,1,1,-1]", "loss.band.weights.3"),
        ("loss.spectrum.learning_rate=-1", "loss.spectrum.learning_rate"),
        ("loss.spectrum.kernel_size=4", "kernel_size"),
        ("loss.stft.stride=0", "loss.stft.stride"),
        ("loss.stft.window=5", "window"),
        ("loss.band.wavelet=hair", "loss.band.*hair"),
        # settings that do not go together
        ("loss.adversarial.num_layers=3", "train.resolution must be at least 24 for loss.adversarial.num_layers"),
        ("train.mixed_precision=fp16", "train.mixed_precision=fp16 .*use bf16"),
        ("train.shard=true", "train.shard .*loss.adversarial.adaptive=false"),
        ("train={lr_scheduler: constant, lr_warmup_steps: 9}", "train.lr_warmup_steps .*constant_with_warmup"),
        ("train.lr_num_cycles=3", "train.lr_num_cycles is for train.lr_scheduler=cosine_with_restarts"),
        ("train.tracker=wandb", "needs the package wandb"),
        ("loss.spectrum={type: none, sigma: 2}", "loss.spectrum.type=none blurs nothing"),
        ("loss.spectrum={type: fixed, learning_rate: 0.1}", "loss.spectrum.type=fixed learns no sigma"),
        ("model.name=1.5", "model.name"),
        ("train={optimizer: muon, mixed_precision: fp16}", "train.mixed_precision=fp16 .*train.optimizer=muon"),
        ("train.parts=encoder", "loss.adversarial.adaptive .*train.parts=encoder"),
        ("loss={reconstruction: none, adversarial: {adaptive: false, start_step: 4}}", "nothing is compared with what"),
        ("loss={perceptual: 1, equivariance: 0.5, adversarial: {weight: 0}}", "loss.perceptual .*16 px .* have 4"),
        ("loss={ssim: 1, equivariance: 0.5, adversarial: {weight: 0}}", "loss.ssim .*6 px .* have 4"),
        ("loss.spectrum.weight=1", "loss.spectrum.weight needs a VQModelFA"),
        ("train={shard: true, channels_last: true}", "train.shard .*train.channels_last=false"),
        ("teacher.normalize=true", "teacher.normalize needs teacher.autoencoder"),
        ("loss.reconstruction=none", "loss.reconstruction=none .*loss.adversarial"),
        ("loss.stft={weight: 1, window: 32}", "loss.stft.window .*train.resolution = 16, got 32"),
        ("loss.band={weight: 1, wavelet: db10}", "loss.band.wavelet=db10 .*20 .*train.resolution=16"),
        ("loss.band={weight: 1, levels: 3, wavelet: db4}", "loss.band.wavelet=db4 .*loss.band.levels=3"),
        ("loss.band={weight: 1, levels: 5}", "loss.band.levels=5 .*train.resolution = 16"),
        ("model.from_autoencoder_kl=somewhere", "unknown key model.from_autoencoder_kl"),
        # stages
        ("stages=[{start_step: 5}, {start_step: 5}]", r"stages\[1\].start_step must be above 5, got 5"),
        ("stages=[{start: 5}]", "unknown key stages.0.start; stages.0 takes start_step, loss"),
        ("stages=[{start_step: 5, loss: {kl2: 1}}]", r"unknown key stages\[0\].loss.kl2"),
        ("stages=[{start_step: 5, loss: {kl: -1}}]", r"stages\[0\].loss.kl "),
        ("stages=[{start_step: 5, loss: {spectrum: {sigma: 2}}}]", "loss.spectrum.sigma holds for the whole run"),
        ("stages=[{start_step: 5, loss: {alignment: {backbone: x}}}]", "loss.alignment.backbone holds for the whole"),
        # the command line itself
        ("steps", "'steps' is not of the form key=value"),
        ("train.betas=[0.9", r"train.betas must be a list, got '\[0.9"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(recipe, override, named):
    with pytest.raises(ConfigError, match=named) as error:
        load_config(TokenizerConfig, recipe, [override])
    assert "\n" not in str(error.value)


def test_files_that_are_no_recipe(tmp_path):
    (tmp_path / "broken.yaml").write_text("a: [1\nb: }")
    (tmp_path / "list.yaml").write_text("- 1")
    for name, message in (("missing", "no such file"), ("broken", "broken.yaml"), ("list", "mapping")):
        with pytest.raises(ConfigError, match=message) as error:
            load_config(TokenizerConfig, tmp_path / f"{name}.yaml")
        assert "\n" not in str(error.value)


def test_defaults_then_file_then_command_line(recipe, tmp_path):
    config = load_config(TokenizerConfig, recipe, ["train.steps=5", "loss.kl=1e-4"])
    assert (config.train.steps, config.train.batch_size, config.loss.kl) == (5, 2, 1e-4)
    assert config.train.betas == [0.5, 0.9] and config.output == "runs/tokenizer"
    assert load_config(TokenizerConfig, recipe, ["train.mixed_precision=no"]).train.mixed_precision == "no"
    written = tmp_path / "written.yaml"
    written.write_text(to_yaml(config))
    assert load_config(TokenizerConfig, written) == config


def test_a_class_may_be_named_by_its_path(recipe):
    path = "model.name=diffusers.models.autoencoders.autoencoder_kl.AutoencoderKL"
    settings = {"name": path.partition("=")[2], "block_out_channels": [32], "latent_channels": 6}
    assert type(build_model(settings)).__name__ == "AutoencoderKL"
    with pytest.raises(ConfigError, match="unknown key model.high_block_out_channels"):
        load_config(TokenizerConfig, recipe, [path])


def test_a_generator_of_ones_own_need_not_name_its_arguments(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_generator.py").write_text(
        "from favae import LightningDiTTransformer2DModel\n"
        "class Own(LightningDiTTransformer2DModel):\n"
        "    def __init__(self, **settings):\n        super().__init__(**settings)\n"
    )
    (tmp_path / "recipe.yaml").write_text("{output: run, model: {name: own_generator.Own}}")
    config = load_config(GeneratorConfig, tmp_path / "recipe.yaml", ["sampling.guidance_channels=3"])
    assert config.builds(LightningDiTTransformer2DModel)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_resolves_and_dry_runs(recipe, capsys, monkeypatch, tmp_path, caplog):
    monkeypatch.syspath_prepend(ROOT)
    script = "generator" if recipe.parent.name == "generator" else "tokenizer"
    config = load_config({"tokenizer": TokenizerConfig, "generator": GeneratorConfig}[script], recipe)
    for key in ("from_autoencoder_kl", "from_pretrained"):
        if key in config.model:
            pytest.skip(f"{config.model[key]} is on the hub")
    words = [str(recipe), f"output={tmp_path / 'run'}", "--dry-run", "--processes", "8"]
    importlib.import_module(f"train_{script}").main(words)
    output = capsys.readouterr().out
    assert f"steps: {config.train.steps}" in output  # the resolved config
    assert "parameters" in output and "steps per epoch" in output
    assert "floats per" in output or "tokens of" in output  # of a codebook
    assert not (tmp_path / "run").exists() and not caplog.text


@pytest.mark.parametrize(
    "script, settings",
    [
        ("tokenizer", ["loss.adversarial.weight=1", "loss.adversarial.start_step=10"]),
        ("tokenizer", ["stages=[{start_step: 10, loss: {kl: 0}}]"]),
        ("tokenizer", ["model.shortcut=overlapping", "train.fade_shortcut_steps=11"]),
        ("tokenizer", ["train.lr_warmup_steps=11"]),
        ("generator", ["loss.alignment={weight: 1, layer: 2}", "data.images=photos", "loss.alignment.stop_step=11"]),
        ("generator", ["data.warmup_latents=cache", "data.warmup_steps=11"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[-1],
)
def test_what_a_training_is_too_short_for_is_named(tmp_path, caplog, script, settings):
    recipe = {"tokenizer": "photos_favae", "generator": "photos_lightningdit"}[script]
    words = [str(ROOT / f"configs/{script}/{recipe}.yaml"), f"output={tmp_path / 'run'}", "--dry-run", *settings]
    key = "stages[0].start_step" if "stages" in settings[-1] else settings[-1].partition("=")[0]
    for steps, warned in ((10, True), (11, False)):
        caplog.clear()
        main = importlib.import_module(f"train_{script}").main
        main([*words, *([] if "lr_warmup" in key else ["train.lr_warmup_steps=0"]), f"train.steps={steps}"])
        assert (key in caplog.text) == warned


def test_a_dry_run_with_weights_warns_of_nothing(tmp_path, tiny_kl, recwarn):
    tiny_kl.save_pretrained(tmp_path / "vae")
    for key in ("from_pretrained", "from_autoencoder_kl"):
        model = {"name": "AutoencoderKL", key: str(tmp_path / "vae")}
        recipe = tmp_path / f"{key}.yaml"
        recipe.write_text(yaml.safe_dump({"model": model, "train": {"resolution": 16}, "loss": {"kl": 0.0}}))
        importlib.import_module("train_tokenizer").main([str(recipe), "--dry-run"])
    assert not [warning for warning in recwarn if "non-meta" in str(warning.message)]


def test_recipes_are_comparable():
    """Equal latent, steps, data and losses; FLOPs within 5 % on the photographs."""
    for ours, baseline in (("photos_favae", "photos_vavae"), ("favae_f16d32", "vavae_f16d32")):
        a, b = (load_config(TokenizerConfig, ROOT / f"configs/tokenizer/{name}.yaml") for name in (ours, baseline))
        assert a.loss == b.loss and a.data == b.data
        assert (a.train.steps, a.train.batch_size) == (b.train.steps, b.train.batch_size)
        with torch.device("meta"):
            a, b = (build_model(config.model) for config in (a, b))
        a, b = (measure_budget(model, model.config.sample_size) for model in (a, b))
        assert a.floats_per_image == b.floats_per_image
        ratio = a.flops / b.flops
        assert 0.95 <= ratio <= 1.05 if ours == "photos_favae" else ratio < 1


def test_command_line_errors_are_one_line(tmp_path):
    recipe = tiny_tokenizer_recipe(tmp_path, tmp_path / "nowhere")
    output = f"output={tmp_path / 'run'}"
    for arguments, named in (
        (["train.stepz=1"], "unknown key train.stepz"),
        ([output], "nowhere: no such folder"),
        ([output, "data.path=photos", "train.resolution=18"], "train.resolution must be a multiple of 4"),
        ([output, "data.path=photos", "model.wavelet=db10"], "model.wavelet=db10"),
        ([output, "data.path=photos", "model.latent_channels=2"], "model.high_latent_channels"),
        ([output, "data.path=photos", "resume=/not/there", "--dry-run"], "resume: /not/there"),
        ([output, "data.path=photos", "loss.alignment.weight=1"], "loss.alignment.weights=FILE"),
    ):
        assert named in refusal("train_tokenizer", recipe, *arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("start", [train, lambda script, *words: command(script.replace("_", "-"), *words)])
def test_bugs_keep_their_traceback(start, recipe, tmp_path, monkeypatch):
    def fail(*arguments):
        raise ValueError("a bug")

    monkeypatch.setattr("train_tokenizer.open_data", fail)
    with pytest.raises(ValueError, match="a bug"):
        start("train_tokenizer", recipe, f"output={tmp_path / 'run'}")


@pytest.mark.parametrize(
    "model, override, named",
    [
        ("{name: VQModelFA, block_out_channels: [8, 8, 16]}", "loss.high_dropout=0.1", "loss.high_dropout"),
        ("{name: VQModelFA, block_out_channels: [8, 8, 16]}", "loss.latent_noise=0.1", "loss.latent_noise"),
        (
            "{name: VQModelFA, num_quantizers: 8}",
            "seed=1",
            "num_quantizers is for model.quantizer=residual, not vq",
        ),
        ("{name: VQModelFA, quantizer: fsq, scales: [1, 2]}", "seed=1", "model.scales .*next_scale or next_band"),
        ("{name: AutoencoderTiny, encoder_block_out_channels: [8, 16]}", "seed=1", "one width each"),
        ("{name: AutoencoderTiny, upsampling_scaling_factor: 4}", "seed=1", "upsampling_scaling_factor must be 2"),
        (
            "{name: AsymmetricAutoencoderKLFA, from_autoencoder_kl: somewhere}",
            "loss.alignment.weight=0.1",
            "loss.alignment.weight.*model.from_autoencoder_kl",
        ),
        (
            "{name: VQModelFA, block_out_channels: [8, 8, 16], frequency_complement: null}",
            "loss.spectrum.weight=0.1",
            "loss.spectrum.weight needs .* model.frequency_complement",
        ),
        (
            "{name: AsymmetricAutoencoderKLFA, from_autoencoder_kl: {subfolder: vae}}",
            "seed=1",
            "model.from_autoencoder_kl.path is missing",
        ),
        (
            "{name: AsymmetricAutoencoderKLFA, from_autoencoder_kl: somewhere}",
            "model.from_pretrained=elsewhere",
            "model.from_pretrained and model.from_autoencoder_kl are two beginnings",
        ),
        (
            "{name: AsymmetricAutoencoderKLFA, from_autoencoder_kl: somewhere}",
            "train.parts=encoder",
            "train.parts=encoder leaves nothing to train: model.from_autoencoder_kl",
        ),
    ],
)
def test_losses_that_a_model_does_not_allow(tmp_path, model, override, named):
    (tmp_path / "recipe.yaml").write_text(f"model: {model}\ntrain: {{resolution: 16}}\n")
    with pytest.raises(ConfigError, match=named):
        load_config(TokenizerConfig, tmp_path / "recipe.yaml", [override])


def test_adaptive_weights_can_refer_to_the_mask_alone(recipe):
    words = ["loss.reconstruction=none", "loss.adversarial={weight: 0.5, adaptive: true}", "loss.perceptual=0"]
    with pytest.raises(ConfigError, match="leaves nothing"):
        load_config(TokenizerConfig, recipe, words)
    assert load_config(TokenizerConfig, recipe, [*words, "loss.mask=1"]).loss.mask == 1


def test_a_frozen_encoder_is_not_aligned(recipe):
    with pytest.raises(ConfigError, match="loss.alignment.weight .*train.parts=decoder"):
        load_config(TokenizerConfig, recipe, ["loss.alignment.weight=1", "train.parts=decoder"])


def test_stages_change_the_losses_at_their_step(recipe):
    stages = "stages=[{start_step: 3, loss: {alignment: {weight: 0.1}}}, {start_step: 5, loss: {kl: 0.5}}]"
    config = load_config(TokenizerConfig, recipe, ["loss.alignment.weight=0.5", stages])
    found = config.loss_stages
    assert [losses_at(found, step).alignment.weight for step in (0, 2, 3, 4, 5, 100)] == [0.5, 0.5, 0.1, 0.1, 0.1, 0.1]
    assert [losses_at(found, step).kl for step in (4, 5)] == [config.loss.kl, 0.5]
    assert config.adversarial_start == 3
    assert load_config(TokenizerConfig, recipe, ["loss.adversarial.weight=0"]).adversarial_start is None
    late = ["loss.adversarial.weight=0", "stages=[{start_step: 7, loss: {adversarial: {weight: 0.2}}}]"]
    assert load_config(TokenizerConfig, recipe, late).adversarial_start == 7


@pytest.mark.parametrize(
    "model, override, named",
    [
        ("LightningDiTTransformer2DModel", "loss.objective=ddpm", "needs model.name=DiTTransformer2DModel or UNet"),
        ("LightningDiTTransformer2DModel", "loss.objective=x", "loss.objective .*'flow_matching' or 'ddpm'"),
        ("LightningDiTTransformer2DModel", "evaluation.every=2", "evaluation.every needs evaluation.reference"),
        ("LightningDiTTransformer2DModel", "evaluation.num_images=0", "evaluation.num_images"),
        ("LightningDiTTransformer2DModel", "loss.alignment.weight=1", "loss.alignment.weight needs data.images"),
        ("LightningDiTTransformer2DModel", "loss.alignment={weight: 1, layer: 99}", "loss.alignment.layer"),
        ("LightningDiTTransformer2DModel", "model.class_dropout_prob=0", "sampling.guidance_scale must be 1"),
        ("LightningDiTTransformer2DModel", "model.num_layers=x", "model.num_layers .*'x'"),
        ("LightningDiTTransformer2DModel", "train={shard: true, mixed_precision: fp16}", "train.shard .*use bf16"),
        ("DiTTransformer2DModel", "model.out_channels=12", "model.out_channels must be 4 .*got 12"),
        (
            "DiTTransformer2DModel",
            "{model: {num_embeds_ada_norm: 3}, loss: {objective: ddpm}}",
            "model.num_embeds_ada_norm must be 1000, got 3",
        ),
        ("CATTransformerModel", "loss.alignment.weight=1", "loss.alignment.weight is not for a CATTransformerModel"),
        ("CATTransformerModel", "{model: {head: flow}, sampling: {top_k: 2}}", "sampling.top_k .*model.head"),
        ("CATTransformerModel", "evaluation={every: 2, reference: x}", "evaluation.every is for generators of classes"),
        ("CATTransformerModel", "evaluation.num_inference_steps=9", "evaluation.num_inference_steps is for model.head"),
        ("CATTransformerModel", "sampling.num_inference_steps=9", "sampling.num_inference_steps is for model.head"),
        ("CATTransformerModel", "data.warmup_steps=9", "data.warmup_steps is not for a CATTransformerModel"),
        ("CATTransformerModel", "model.head=x", "model.head .*'categorical' or 'flow'"),
        ("CATTransformerModel", "sampling.temperature=-1", "sampling.temperature"),
        ("CATTransformerModel", "sampling.top_p=2", "sampling.top_p"),
        ("CATTransformerModel", "loss.class_dropout_prob=0.2", "loss.class_dropout_prob is model.text_dropout_prob"),
        ("LightningDiTTransformer2DModel", "loss.class_dropout_prob=0.2", "is model.class_dropout_prob here"),
        ("CATTransformerModel", "loss.time_shift=3", "loss.time_shift is for flow matching"),
        ("LightningDiTTransformer2DModel", "sampling.top_p=0.9", "sampling.top_p is for a CATTransformerModel"),
        ("DiTTransformer2DModel", "loss.class_dropout_prob=0", "guidance_scale must be 1 with loss.class_dropout_prob"),
        ("DiTTransformer2DModel", "loss={objective: ddpm, cosine_weight: 0}", "loss.cosine_weight is for flow"),
        (
            "DiTTransformer2DModel",
            "{loss: {objective: ddpm}, evaluation: {guidance_scale: 0.5}}",
            "evaluation.guidance_scale must be at least 1 for DiTPipeline",
        ),
        (
            "CATTransformerModel",
            "{model: {num_classes: 3, text_dropout_prob: 0}}",
            "sampling.guidance_scale must be 1 with model.text_dropout_prob=0",
        ),
        ("LightningDiTTransformer2DModel", "sampling.prompts=[a]", "sampling.prompts is for generators of texts"),
        ("CATTransformerModel", "sampling={num_images: 1, prompts: [a, b]}", "sampling.prompts are 2, more than"),
        ("favae.CATTransformerModel", "loss.class_dropout_prob=0.2", "loss.class_dropout_prob is model.text_dropout"),
        ("favae.LightningDiTTransformer2DModel", "loss.class_dropout_prob=0.2", "is model.class_dropout_prob here"),
    ],
)
def test_mistakes_in_a_generators_recipe(tmp_path, model, override, named):
    import yaml
    from omegaconf import OmegaConf

    recipe = {"model": {"name": model}}
    if override.startswith("{"):
        recipe = OmegaConf.to_container(OmegaConf.merge(recipe, yaml.safe_load(override)))
        override = "seed=0"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(ConfigError, match=named):
        load_config(GeneratorConfig, tmp_path / "recipe.yaml", [override])


def test_what_a_generator_inherits_counts_as_its_own(tmp_path):
    texts = {**TINY_LIGHTNINGDIT, "num_classes": 0, "text_dim": 8}
    LightningDiTTransformer2DModel(**texts).save_pretrained(tmp_path / "other")
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{name: LightningDiTTransformer2DModel, from_pretrained: {tmp_path / 'other'}}}"
    )
    config = load_config(GeneratorConfig, tmp_path / "recipe.yaml")
    assert config.takes_texts and not config.takes_classes
    load_config(GeneratorConfig, tmp_path / "recipe.yaml", ["model.class_dropout_prob=0"])  # there are no classes
    assert load_config(GeneratorConfig, tmp_path / "recipe.yaml", ["model.text_dim=5"]).model["text_dim"] == 5


@pytest.mark.parametrize(
    "override, path",
    [
        ("data.path=007", "007"),
        ("data.path='007'", "007"),
        ("data.path=no", "no"),
        ("data.path=1e3", "1e3"),
        ("data.path=~", "~"),
        ("data.path=#1", "#1"),
        ("data.path=a #b", "a #b"),
        ("data.path=[x", "[x"),
        ("data.path=[x]", "[x]"),
        ("data.path={x}", "{x}"),
        ("data.path=*x", "*x"),
        ("data={path: 007}", "007"),
        ("data.path=null", None),
    ],
)
def test_a_path_is_the_text_that_was_typed(recipe, override, path):
    assert load_config(TokenizerConfig, recipe, [override]).data.path == path


def test_texts_of_a_recipe_are_as_typed(recipe, tmp_path):
    typed = recipe.read_text().replace("path: photos", "path: 007, split: no, label_column: 1.0")
    (tmp_path / "typed.yaml").write_text(typed.replace("train: {", "train: {mixed_precision: no, "))
    config = load_config(TokenizerConfig, tmp_path / "typed.yaml")
    assert (config.data.path, config.data.split, config.data.label_column) == ("007", "no", "1.0")
    assert config.train.mixed_precision == "no"


@pytest.mark.parametrize("override", ["data.path=", "=3", "train..steps=3", "model=[]", "train=[1]", "data.path=${x}"])
def test_overrides_that_fit_nowhere(recipe, override):
    with pytest.raises(ConfigError, match=re.escape(override)) as error:
        load_config(TokenizerConfig, recipe, [override])
    assert "\n" not in str(error.value)
