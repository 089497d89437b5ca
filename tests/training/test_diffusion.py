"""LightningDiT and DiT, velocities and noise: one training script, pipelines that diffusers opens."""

import json

import diffusers
import numpy as np
import pytest
import torch
import yaml
from conftest import (
    TINY_FAVAE,
    TINY_LIGHTNINGDIT,
    TINY_UNET,
    command,
    command_error,
    refusal,
    tiny_generator_recipe,
    train,
    train_whole_and_in_parts,
)
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    UNet2DModel,
)

from favae import AutoencoderKLFA, LightningDiTPipeline, LightningDiTTransformer2DModel
from favae.data.images import ImageDataset, without_high_frequencies
from favae.data.latents import load_tokenizer, open_latents
from favae.data.sources import open_source
from favae.errors import ConfigError
from favae.eval.sampling import classes_of, sample_to_folder
from favae.models.class_conditional import initialize_dit
from favae.normalization import denormalize_latents
from favae.pipelines.solvers import flow_scheduler
from favae.training.config import load_config
from favae.training.diffusion import DIFFUSION_SCHEDULE, DiffusionModule, GeneratorLossConfig
from favae.training.generator_config import GeneratorConfig
from train_generator import build_pipeline

TINY_DIT = {
    "sample_size": 4,
    "patch_size": 1,
    "in_channels": 6,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_embeds_ada_norm": 3,
}


class Recorder:
    """Stands for the transformer's forward pass, and keeps what it was called with."""

    def __init__(self, channels: int = 6):
        self.channels, self.calls = channels, []

    def __call__(self, hidden_states, timestep, class_labels, return_dict):
        self.calls.append((hidden_states, timestep, class_labels))
        return (torch.zeros(len(hidden_states), self.channels, 4, 4),)


def recorded(module: DiffusionModule, latents: torch.Tensor, label: int, channels: int = 6):
    """Losses, and what the transformer was called with."""
    module.transformer.forward = recorder = Recorder(channels)
    result = module(latents, {"label": torch.full((len(latents),), label)})
    return (*result, *recorder.calls[0])


def test_the_class_is_dropped_once_for_all_blocks_of_a_dit():
    transformer = DiTTransformer2DModel(**TINY_DIT)
    module = DiffusionModule(transformer, GeneratorLossConfig())
    assert module.class_dropout == 0.1 and module.null_class == 3
    for parameter in transformer.parameters():  # its own dropping is off: the same labels, the same output
        torch.nn.init.normal_(parameter, std=0.2)
    inputs = torch.randn(64, 6, 4, 4), torch.full((64,), 500.0), torch.ones(64, dtype=torch.long)
    assert torch.equal(transformer.train()(*inputs).sample, transformer(*inputs).sample)
    *_, times, seen = recorded(module, torch.zeros(4000, 6, 4, 4), label=1)
    assert 0.08 < (seen == 3).float().mean() < 0.12 and set(seen.tolist()) == {1, 3}
    assert DiffusionModule(transformer, GeneratorLossConfig(class_dropout_prob=0.5)).class_dropout == 0.5
    assert times.min() + times.max() > 100 and times.max() <= 1000


def test_a_dit_without_biases_of_attention_starts():
    size = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "patch_size": 1}
    dit = DiTTransformer2DModel(sample_size=4, attention_bias=False, **size)
    initialize_dit(dit)
    assert dit.transformer_blocks[0].attn1.to_q.bias is None and not dit.proj_out_2.weight.any()


@torch.no_grad()
def test_a_new_dit_starts_as_dit_does():
    """With LightningDiT's distributions where both have the same layers: diffusers leaves torch's defaults."""
    size = {"num_layers": 1, "num_attention_heads": 4, "attention_head_dim": 32, "in_channels": 6, "patch_size": 1}
    dit = DiTTransformer2DModel(sample_size=4, num_embeds_ada_norm=50, **size)
    other = LightningDiTTransformer2DModel(sample_size=4, num_classes=50, **size)
    initialize_dit(dit)
    assert not dit(torch.randn(1, 6, 4, 4), torch.ones(1), torch.ones(1, dtype=torch.long)).sample.any()
    block, theirs = dit.transformer_blocks[0], other.blocks[0]
    assert not block.norm1.linear.weight.any()
    pairs = [(getattr(block.attn1, name), getattr(theirs.attn, name)) for name in ("to_q", "to_k", "to_v")]
    pairs += [(block.attn1.to_out[0], theirs.attn.to_out), (dit.pos_embed.proj, other.patch_embed.proj)]
    pairs += [(block.norm1.emb.class_embedder.embedding_table, other.class_embedding.embedding_table)]
    pairs += [(block.norm1.emb.timestep_embedder.linear_1, other.time_embedding.linear_1)]
    for ours, published in pairs:
        assert ours.weight.std().item() == pytest.approx(published.weight.std().item(), rel=0.05)
    biases = [parameter for name, parameter in dit.named_parameters() if name.endswith("bias")]
    assert biases and not any(bias.any() for bias in biases)


def test_lightningdit_drops_its_labels_itself():
    module = DiffusionModule(LightningDiTTransformer2DModel(**TINY_LIGHTNINGDIT), GeneratorLossConfig())
    *_, times, seen = recorded(module, torch.zeros(500, 6, 4, 4), label=1)
    assert (seen == 1).all() and times.min() > 0 and times.max() < 1


def test_diffusion_adds_noise_like_the_scheduler():
    transformer = DiTTransformer2DModel(**TINY_DIT, out_channels=12)
    module, data = (
        DiffusionModule(transformer, GeneratorLossConfig(objective="ddpm")),
        torch.full((256, 6, 4, 4), 3.0),
    )
    _, logs, noisy, timesteps, _ = recorded(module, data, label=0, channels=12)
    assert timesteps.dtype == torch.int64 and timesteps.min() >= 0 and 900 < timesteps.max() <= 999
    alpha = module.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noise = (noisy - alpha.sqrt() * data) / (1 - alpha).sqrt()
    assert noise.std() == pytest.approx(1, abs=0.05)
    assert float(logs["noise"]) == pytest.approx(float(noise.square().mean()), rel=1e-3)
    assert logs["variance"] > 0


class Teacher(torch.nn.Module):
    """Stands for a frozen network of 5 channels."""

    channels = 5

    def forward(self, images, grid):
        return torch.randn(len(images), self.channels, *grid, generator=torch.Generator().manual_seed(0))


def test_the_projector_sees_the_block_and_the_alignment_is_added():
    transformer = LightningDiTTransformer2DModel(**TINY_LIGHTNINGDIT)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    config = GeneratorLossConfig(alignment={"weight": 0.5, "layer": 1})
    module = DiffusionModule(transformer, config, Teacher()).eval()
    assert list(module.trained_parts()) == ["transformer", "projector"]  # the teacher is in no checkpoint
    latents, batch = torch.randn(2, 6, 4, 4), {"label": torch.tensor([0, 1])}
    with_images = {**batch, "image": torch.zeros(2, 3, 16, 16)}

    def losses(batch):
        torch.manual_seed(0)
        module.zero_grad(set_to_none=True)
        loss, logs = module(latents, batch)
        loss.backward()
        return loss, logs, [parameter.grad.clone() for parameter in module.parameters()]

    plain, logs, gradients = losses(batch)
    projector = [module.projector.weight.grad, module.projector.bias.grad]
    assert all(gradient is not None and not gradient.any() for gradient in projector)  # DDP waits for them
    first, later = transformer.blocks[0].ff.linear_out.weight.grad, transformer.blocks[1].ff.linear_out.weight.grad
    total, all_logs, _ = losses(with_images)
    assert "alignment" not in logs and all_logs["velocity"] == logs["velocity"]
    assert torch.allclose(total, plain + 0.5 * all_logs["alignment"])
    assert module.projector.weight.grad.abs().sum() > 0
    assert not torch.equal(first, transformer.blocks[0].ff.linear_out.weight.grad)
    assert torch.allclose(later, transformer.blocks[1].ff.linear_out.weight.grad, atol=1e-6)  # after what is aligned


def test_alignment_stops_at_its_step(tiny_cache):
    recipe = tiny_generator_recipe(tiny_cache, tiny_cache / "cache", tiny_cache / "tokenizer")
    alignment = "loss.alignment={weight: 0.5, layer: 2, backbone: efficientnet-lite0, stop_step: 4}"
    images = f"data.images={tiny_cache / 'images'}"
    missing = f"data.images={tiny_cache / 'mistyped'}"
    assert "mistyped: no such folder" in refusal(
        "train_generator", recipe, f"output={tiny_cache / 'r'}", alignment, missing
    )
    assert not (tiny_cache / "r").exists()  # it was found before anything was begun
    train("train_generator", recipe, f"output={tiny_cache / 'run'}", alignment, images)
    records = [json.loads(line) for line in (tiny_cache / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "alignment" in record] == [1, 2, 3, 4]
    assert (tiny_cache / "run/checkpoints/step-6/projector.safetensors").exists()


@pytest.mark.parametrize("objective, out_channels", [("flow_matching", 6), ("ddpm", 12)])
def test_a_dit_trains_and_its_pipeline_opens(tiny_cache, objective, out_channels):
    recipe = tiny_generator_recipe(tiny_cache, tiny_cache / "cache", tiny_cache / "tokenizer")
    model = {"name": "DiTTransformer2DModel", **TINY_DIT, "out_channels": out_channels}
    if objective == "ddpm":
        model["num_embeds_ada_norm"] = 1000
    settings = {**yaml.safe_load(recipe.read_text()), "model": model, "loss": {"objective": objective}}
    recipe.write_text(yaml.safe_dump(settings))
    start = "train.learning_rate=1e-9"
    train("train_generator", recipe, f"output={tiny_cache / 'start'}", start, "train.steps=1", "train.sample_every=0")
    first = DiffusionPipeline.from_pretrained(tiny_cache / "start/final").transformer
    assert first.transformer_blocks[0].norm1.linear.weight.abs().max() < 1e-6  # as `initialize_dit` leaves it
    for steps in (4, 6):  # the second resumes
        train("train_generator", recipe, f"output={tiny_cache / 'run'}", f"train.steps={steps}")
    assert (tiny_cache / "run/samples/step-0000006.png").exists()

    # Weights to begin with are not replaced by those of a new model.
    weights = first.proj_out_2.weight.data.fill_(0.5).clone()
    first.save_pretrained(tiny_cache / "old")
    source = f"model.from_pretrained={tiny_cache / 'old'}"
    more = (source, start, "train.steps=1", "train.sample_every=0", f"model.num_layers={TINY_DIT['num_layers'] + 1}")
    train("train_generator", recipe, f"output={tiny_cache / 'more'}", *more)
    found = DiffusionPipeline.from_pretrained(tiny_cache / "more/final").transformer
    torch.testing.assert_close(found.proj_out_2.weight, weights)
    assert found.transformer_blocks[-1].norm1.linear.weight.abs().max() < 1e-6  # a new block begins as they all do
    pipe = DiffusionPipeline.from_pretrained(tiny_cache / "run/final")
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.transformer, DiTTransformer2DModel)
    images = pipe([0, 2], num_inference_steps=3, guidance_scale=2.0, output_type="np").images
    assert images.shape == (2, 16, 16, 3)
    if objective == "ddpm":
        widths = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
        blocks = {"num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1)}
        tiny = diffusers.AutoencoderTiny(latent_channels=6, **widths, **blocks)
        with pytest.raises(ConfigError, match="loss.objective=ddpm .* AutoencoderTiny"):
            build_pipeline(
                load_config(GeneratorConfig, recipe), pipe.transformer, tiny, open_latents(tiny_cache / "cache")
            )
        sphere = AutoencoderKLFA(**TINY_FAVAE, latent_norm="rms")
        with pytest.raises(ConfigError, match="loss.objective=ddpm: .* on a sphere"):
            build_pipeline(
                load_config(GeneratorConfig, recipe), pipe.transformer, sphere, open_latents(tiny_cache / "cache")
            )
        assert type(pipe) is diffusers.DiTPipeline and pipe.vae.config.latents_std is None
        assert pipe.get_label_ids(["class2"]) == [2]
        assert list(classes_of(pipe).values()) == ["class0", "class1", "class2"]  # of the 1,000 it could have
    else:
        assert type(pipe).__name__ == "LightningDiTPipeline" and pipe.vae.config.latents_std is not None


def test_a_dit_has_the_channels_that_its_pipeline_looks_for(tiny_cache):
    """diffusers' model takes `None` for those of the input, and its pipeline does not."""
    recipe = tiny_generator_recipe(tiny_cache, tiny_cache / "cache", tiny_cache / "tokenizer")
    model = {"name": "DiTTransformer2DModel", **TINY_DIT, "num_embeds_ada_norm": 1000}
    for given in ({}, {"out_channels": None}):
        recipe.write_text(yaml.safe_dump({"model": {**model, **given}, "loss": {"objective": "ddpm"}}))
        assert load_config(GeneratorConfig, recipe).model["out_channels"] == 6
    with pytest.raises(ConfigError, match="sampling.num_inference_steps must be at most 1000 for loss.objective=ddpm"):
        load_config(GeneratorConfig, recipe, ["sampling.num_inference_steps=1001"])


def unet_recipe(tiny_cache):
    recipe = tiny_generator_recipe(tiny_cache, tiny_cache / "cache", tiny_cache / "tokenizer")
    recipe.write_text(
        yaml.safe_dump({**yaml.safe_load(recipe.read_text()), "model": {"name": "UNet2DModel", **TINY_UNET}})
    )
    return recipe


@pytest.mark.parametrize("objective", ["flow_matching", "ddpm"])
def test_a_unet_trains_resumes_and_is_sampled_with_guidance(tiny_cache, objective):
    recipe, loss = unet_recipe(tiny_cache), f"loss.objective={objective}"
    whole = train_whole_and_in_parts("train_generator", tiny_cache, recipe, loss, steps=6, first=4)
    pipe = DiffusionPipeline.from_pretrained(whole / "final")
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.transformer, UNet2DModel) and len(classes_of(pipe)) == 3
    sample_to_folder(pipe, recipe.parent / "samples", 3, num_inference_steps=2, guidance_scale=2.0)
    options = {"latents": torch.randn(2, 6, 4, 4), "num_inference_steps": 3, "output_type": "latent"}
    plain, guided = (pipe([0, 2], guidance_scale=scale, **options).images for scale in (1.0, 3.0))
    assert not torch.equal(plain, guided)
    with pytest.raises(ValueError, match=r"0 to 2"):
        pipe([3])
    pipe.scheduler = flow_scheduler("heun") if objective == "ddpm" else DDIMScheduler()
    with pytest.raises(ValueError, match="takes no epsilon" if objective == "ddpm" else "not set to integrate a flow"):
        pipe([0], **options | {"latents": None})


@pytest.mark.parametrize(
    "setting, named",
    [
        ("model.sample_size=5", "model.sample_size=5 cannot be halved 1 times"),
        ("model.time_embedding_type=fourier", "model.time_embedding_type must be 'positional'"),
    ],
)
def test_unets_that_could_not_be_sampled_are_refused(tiny_cache, setting, named):
    with pytest.raises(ConfigError, match=named):
        load_config(GeneratorConfig, unet_recipe(tiny_cache), [setting])


def test_noise_is_taken_away_by_schedulers_of_diffusion(tiny_favae):
    """Sampling of the exact noise of Gaussian data, by DDIM and by DPM-Solver++."""
    unet, std = UNet2DModel(**TINY_UNET), 0.5
    scheduler = DDIMScheduler(**DIFFUSION_SCHEDULE, clip_sample=False, timestep_spacing="trailing")

    def noise_in(x, timestep, class_labels, return_dict=False):
        a = scheduler.alphas_cumprod[timestep.long()].view(-1, 1, 1, 1)
        return ((1 - a).sqrt() * x / (a * std**2 + 1 - a),)

    unet.forward = noise_in
    pipe = LightningDiTPipeline(unet, tiny_favae, scheduler, None, None, prediction_type="epsilon")
    noise = torch.randn(2, 6, 4, 4)
    options = {"latents": noise, "guidance_scale": 1.0, "num_inference_steps": 100, "output_type": "latent"}
    for other in (scheduler, DPMSolverMultistepScheduler.from_config(scheduler.config)):
        pipe.scheduler = other
        assert torch.allclose(pipe([0, 1], **options).images, std * noise, rtol=0.04)


def test_a_unet_sees_times_of_diffusion_and_no_class_now_and_then():
    module = DiffusionModule(UNet2DModel(**TINY_UNET), GeneratorLossConfig(class_dropout_prob=0.2))
    *_, times, seen = recorded(module, torch.zeros(4000, 6, 4, 4), label=1)
    assert 0.17 < (seen == 3).float().mean() < 0.23 and set(seen.tolist()) == {1, 3}
    assert times.min() + times.max() > 100 and times.max() <= 1000


@pytest.mark.parametrize(
    "override, named",
    [
        ("model.num_class_embeds=null", "model.num_class_embeds"),
        ("model.out_channels=3", "model.out_channels"),
        ("model.num_class_embeds=3", "model.num_class_embeds"),
        ("model.num_class_embeds=1", "model.num_class_embeds must be one more than the classes"),
        ("model.class_embed_type=identity", "model.class_embed_type"),
        ("model.sample_size=[4,4]", "model.sample_size must be one number"),
        ("loss.alignment.weight=1", "loss.alignment.weight"),
        ("model.down_block_types=[DownEncoderBlock2D,DownBlock2D]", "model.down_block_types"),
    ],
)
def test_a_unet_that_does_not_fit_is_refused(tiny_cache, override, named):
    assert named in refusal("train_generator", unet_recipe(tiny_cache), override)


def test_muon_takes_the_matrices_and_compiled_blocks_train(tiny_cache):
    recipe = tiny_generator_recipe(tiny_cache, tiny_cache / "cache", tiny_cache / "tokenizer")
    options = ("train.optimizer=muon", "train.compile=true", "train.sample_every=0")
    for steps in (2, 4):  # the second resumes
        train("train_generator", recipe, f"output={tiny_cache / 'run'}", f"train.steps={steps}", *options)
    state = tiny_cache / "run/checkpoints/step-4"
    adamw, muon = torch.load(state / "optimizers-0.pt", weights_only=True)
    assert {tuple(entry) for entry in muon["state"].values()} == {("use_muon", "momentum_buffer")}
    assert all(entry["momentum_buffer"].ndim == 2 for entry in muon["state"].values())
    model = LightningDiTTransformer2DModel.from_pretrained(state / "transformer")
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    assert len(muon["state"]) == len(matrices)
    assert len(adamw["state"]) == len(list(model.parameters())) - len(matrices)
    assert (
        DiffusionPipeline.from_pretrained(tiny_cache / "run/final").transformer.blocks[0].modulation.weight.abs().sum()
        > 0
    )


def test_all_channels_may_be_normalized_by_one_std(tiny_cache, monkeypatch):
    seen = []
    plain = DiffusionModule.forward
    monkeypatch.setattr(DiffusionModule, "forward", lambda self, z, b: seen.append((z, b)) or plain(self, z, b))
    recipe = tiny_generator_recipe(tiny_cache, tiny_cache / "cache", tiny_cache / "tokenizer")
    train("train_generator", recipe, "data.normalization=global", f"output={tiny_cache / 'run'}")
    vae = DiffusionPipeline.from_pretrained(tiny_cache / "run/final").vae
    manifest = open_latents(tiny_cache / "cache").manifest
    stds = torch.tensor(manifest["latents_std"])
    assert stds.max() > 1.01 * stds.min()
    expected = stds.square().mean().sqrt().item()
    dataset = open_latents(tiny_cache / "cache")
    dataset.std[0] = 1.0  # what a constant channel has
    dataset.share_std()
    assert dataset.std.flatten().tolist() == pytest.approx([stds[1:].square().mean().sqrt().item()] * 6)
    assert vae.config.latents_std == pytest.approx([expected] * 6) and vae.config.scaling_factor == 1
    assert vae.config.latents_mean == pytest.approx(manifest["latents_mean"])
    noise = [  # what is learned is what the pipeline takes for normalized latents
        (denormalize_latents(vae, latents) - batch["mean"].float()) / (0.5 * batch["logvar"].float()).exp()
        for latents, batch in seen
    ]
    assert torch.cat(noise).std().item() == pytest.approx(1, abs=0.1)


def test_latents_of_smooth_images_are_learned_first(tiny_cache, monkeypatch):
    words = ("--tokenizer", tiny_cache / "tokenizer", "--data", tiny_cache / "images", "--resolution", "16")
    command("cache-latents", *words, "--low-pass", "0.25", "--output", tiny_cache / "smooth")
    exact, smooth = (open_latents(tiny_cache / name, flip=False) for name in ("cache", "smooth"))
    whole, low = (dataset.read(np.arange(12), np.zeros(12, int))["mean"] for dataset in (exact, smooth))
    tokenizer = load_tokenizer(str(tiny_cache / "tokenizer"))
    image = ImageDataset(open_source(str(tiny_cache / "images")), 16)[3]["image"][None]
    with torch.no_grad():
        expected = tokenizer.encode(without_high_frequencies(image, 0.25)).latent_dist.mean
    assert torch.allclose(low[3], expected[0], atol=1e-4) and not torch.allclose(low, whole, atol=1e-2)

    seen = []
    plain = DiffusionModule.forward
    monkeypatch.setattr(DiffusionModule, "forward", lambda self, z, b: seen.append(b["mean"]) or plain(self, z, b))
    recipe = tiny_generator_recipe(tiny_cache, tiny_cache / "cache", tiny_cache / "tokenizer")
    settings = [f"data.warmup_latents={tiny_cache / 'smooth'}", "data.warmup_steps=2", f"output={tiny_cache / 'run'}"]
    train("train_generator", recipe, "data.flip=false", *settings)
    smooth_rows, exact_rows = ({row.numpy().tobytes() for row in rows} for rows in (low, whole))
    from_smooth = [all(row.numpy().tobytes() in smooth_rows for row in batch) for batch in seen]
    from_exact = [all(row.numpy().tobytes() in exact_rows for row in batch) for batch in seen]
    assert from_smooth == [True] * 2 + [False] * 4 and from_exact == [False] * 2 + [True] * 4

    command("cache-latents", *words[:-1], "32", "--low-pass", "0.25", "--output", tiny_cache / "large")
    for setting, named in (
        (["data.warmup_steps=2"], "data.warmup_latents"),
        ([f"data.warmup_latents={tiny_cache / 'smooth'}"], "data.warmup_steps"),
        ([f"data.warmup_latents={tiny_cache / 'large'}", "data.warmup_steps=2"], "another latent_shape"),
        ([*settings[:2], "loss.alignment={weight: 0.5, layer: 1}"], "loss.alignment.weight"),
    ):
        assert named in refusal("train_generator", recipe, *setting, f"output={tiny_cache / 'refused'}")
    assert "another low_pass" in command_error("cache-latents", *words, "--output", tiny_cache / "smooth")
