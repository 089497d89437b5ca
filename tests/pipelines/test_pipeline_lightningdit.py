import logging
from typing import get_args

import numpy as np
import pytest
import torch
from conftest import TINY_CAT, TINY_HYPERPRIOR, TINY_LIGHTNINGDIT, TINY_UNET, run
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from tiny_autoencoders import autoencoders
from tiny_text import save_bert

from favae import (
    CATPipeline,
    CATTransformerModel,
    HyperpriorModelFA,
    LightningDiTPipeline,
    LightningDiTTransformer2DModel,
)
from favae.adapters.latent_previews import latent_rgb
from favae.autoencoders import decode, encode
from favae.errors import NonFiniteError
from favae.eval.sampling import takes_prompts
from favae.pipelines.solvers import Solver, flow_scheduler, shift_of
from favae.text_encoder import TextEncoder

NAMES = {0: "cat", 1: "dog", 2: "fish"}


@pytest.fixture
def pipeline(tiny_favae) -> LightningDiTPipeline:
    transformer = LightningDiTTransformer2DModel(**TINY_LIGHTNINGDIT).eval()
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1 / 0.3)
    pipe = LightningDiTPipeline(transformer, tiny_favae, scheduler, None, None, id2label=NAMES)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", ["AutoencoderKLFlux2", "AutoencoderKLQwenImage", "HyperpriorModelFA"])
def test_autoencoders_of_other_latents_are_refused(pipeline, name):
    vae = HyperpriorModelFA(**TINY_HYPERPRIOR) if name == "HyperpriorModelFA" else autoencoders()[name]
    channels = vae.config.get("latent_channels", 4)
    transformer = LightningDiTTransformer2DModel(**TINY_LIGHTNINGDIT | {"in_channels": channels})
    with pytest.raises(ValueError, match=f"a {name} does not have the latents"):
        LightningDiTPipeline(transformer, vae, pipeline.scheduler, None, None)
    transformer = CATTransformerModel(**TINY_CAT | {"head": "flow", "latent_channels": channels, "head_width": 16})
    with pytest.raises(ValueError, match=f"a {name} does not have the latents"):
        CATPipeline(transformer, vae, None, None)


@pytest.mark.parametrize(
    "model, options, named",
    [
        ({}, {"guidance_interval": (0.8, 0.2)}, "guidance_interval must rise"),
        ({"class_dropout_prob": 0.0}, {}, "trained with class_dropout_prob > 0"),
        ({"num_classes": 0}, {"class_labels": None}, "neither classes nor texts"),
        ({}, {"class_labels": []}, "one or more whole numbers"),
        ({}, {"class_labels": [1.0]}, "one or more whole numbers"),
        ({}, {"num_inference_steps": 0}, "num_inference_steps must be 1 or more"),
        ({}, {"latents": torch.zeros(2, 6, 4, 4)}, "latents of 2 images for 1"),
    ],
)
def test_calls_that_cannot_work(pipeline, model, options, named):
    pipeline.register_modules(transformer=LightningDiTTransformer2DModel(**TINY_LIGHTNINGDIT | model))
    with pytest.raises(ValueError, match=named):
        pipeline(**{"class_labels": [0], "guidance_scale": 2.0, **options})


def test_a_pipeline_is_made_of_another_one(pipeline):
    other = LightningDiTPipeline.from_pipe(pipeline)
    assert other.components == pipeline.components and other.config.id2label == pipeline.config.id2label
    assert LightningDiTPipeline.from_pipe(pipeline, vae=None).vae is None
    published = DiTPipeline(pipeline.transformer, pipeline.vae, pipeline.scheduler)  # knows no texts
    assert LightningDiTPipeline.from_pipe(published).components == pipeline.components


def test_a_generator_of_means_and_variances_is_refused(pipeline):
    sizes = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "sample_size": 4}
    published = DiTTransformer2DModel(in_channels=6, out_channels=12, norm_num_groups=1, **sizes)
    with pytest.raises(ValueError, match="12 output channels"):
        LightningDiTPipeline(published, pipeline.vae, pipeline.scheduler, None, None)


def test_a_text_encoder_for_a_generator_of_diffusers_is_refused(pipeline, tmp_path):
    unet = UNet2DModel(**TINY_UNET)
    encoder = TextEncoder(str(save_bert(tmp_path / "bert")))
    with pytest.raises(ValueError, match="text_dim=None, the text encoder needs 8"):
        LightningDiTPipeline(unet, pipeline.vae, pipeline.scheduler, encoder.model, encoder.tokenizer)


def test_without_an_autoencoder_there_are_latents(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    bare = DiffusionPipeline.from_pretrained(tmp_path, vae=None)
    options = {"num_inference_steps": 2, "latents": torch.randn(1, 6, 4, 4), "output_type": "latent"}
    assert torch.equal(bare([0], **options).images, pipeline([0], **options).images)
    with pytest.raises(ValueError, match="without an autoencoder"):
        bare([0])


def test_a_compiled_generator_of_diffusers_is_known(pipeline):
    unet = UNet2DModel(**TINY_UNET | {"sample_size": (4, 8)}).eval()
    pipe = LightningDiTPipeline(unet, pipeline.vae, pipeline.scheduler, None, None)
    options = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 2.0}
    expected = pipe([0, 2], generator=torch.Generator().manual_seed(0), **options).images
    assert expected.shape == (2, 6, 4, 8)
    pipe.transformer = torch.compile(unet, backend="eager")
    assert torch.equal(pipe([0, 2], generator=torch.Generator().manual_seed(0), **options).images, expected)


def hand_written_euler(transformer, latents, labels, steps, shift, scale=1.0, channels=None, interval=(0.0, 1.0)):
    """LightningDiT's sampler: t from 0 (noise) to 1 (data), t' = s t / (1 + (s - 1) t), x += dt v."""
    t = np.linspace(0, 1, steps + 1)
    t = shift * t / (1 + (shift - 1) * t)
    null = torch.full_like(labels, 3)
    with torch.no_grad():
        for now, then in zip(t, t[1:]):
            time = torch.full((len(labels),), float(now))
            velocity = transformer(latents, time, labels).sample
            if scale != 1 and interval[0] - 1e-9 <= now <= interval[1] + 1e-9:
                unconditional = transformer(latents, time, null).sample
                guided = unconditional + scale * (velocity - unconditional)
                velocity = guided if channels is None else torch.cat([guided[:, :channels], velocity[:, channels:]], 1)
            latents = latents + float(then - now) * velocity
    return latents


@pytest.mark.parametrize(
    "steps, shift, guidance",
    [
        (10, 0.3, {}),
        (10, 1.0, {}),
        (50, 0.3, {}),
        (10, 0.3, {"scale": 4.0}),
        (10, 0.3, {"scale": 4.0, "channels": 3}),
        (10, 1.0, {"scale": 4.0, "interval": (0.25, 0.75)}),
        (5, 1.0, {"scale": 4.0, "interval": (0.2, 0.8)}),  # times that float32 rounds
    ],
)
def test_sampler_is_euler(pipeline, steps, shift, guidance):
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1 / shift)
    latents, labels = torch.randn(2, 6, 4, 4), torch.tensor([0, 2])
    names = {"scale": "guidance_scale", "channels": "guidance_channels", "interval": "guidance_interval"}
    arguments = {"guidance_scale": 1.0} | {names[key]: value for key, value in guidance.items()}
    output = pipeline(labels, num_inference_steps=steps, latents=latents, output_type="latent", **arguments).images
    expected = hand_written_euler(pipeline.transformer, latents, labels, steps, shift, **guidance)
    assert torch.allclose(output, expected, atol=1e-5)


def test_guidance_at_scale_one_is_none(pipeline):
    latents = torch.randn(2, 6, 4, 4)
    plain = pipeline([0, 1], guidance_scale=1.0, latents=latents, num_inference_steps=4, output_type="latent").images
    nearly = pipeline(
        [0, 1], guidance_scale=1 + 1e-7, latents=latents, num_inference_steps=4, output_type="latent"
    ).images
    strong = pipeline([0, 1], guidance_scale=3.0, latents=latents, num_inference_steps=4, output_type="latent").images
    assert torch.allclose(plain, nearly, atol=1e-5) and not torch.allclose(plain, strong, atol=1e-2)


def test_a_sample_does_not_depend_on_its_batch(pipeline):
    def sample(labels, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipeline(labels, generator=generators, num_inference_steps=3, output_type="pt").images

    together = sample([0, 1, 2], [5, 6, 7])
    assert together.shape == (3, 3, 16, 16) and together.min() >= 0 and together.max() <= 1
    assert torch.allclose(sample([1], [6])[0], together[1], atol=1e-5)
    with pytest.raises(ValueError, match="2 generators for 3 images"):
        sample([0, 1, 2], [5, 6])


def test_latent_statistics_are_undone(pipeline, tiny_favae):
    z = torch.randn(1, 6, 4, 4)
    mean, std = torch.arange(6.0), torch.arange(1.0, 7.0)
    pipeline.vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    expected = tiny_favae.decode(z * std.view(1, 6, 1, 1) + mean.view(1, 6, 1, 1)).sample
    assert torch.allclose(pipeline.decode_latents(z), expected, atol=1e-6)
    pipeline.vae.register_to_config(latents_mean=None, latents_std=None, scaling_factor=0.5, shift_factor=0.25)
    assert torch.allclose(pipeline.decode_latents(z), tiny_favae.decode(z / 0.5 + 0.25).sample, atol=1e-6)


def test_an_autoencoder_without_statistics(pipeline):
    tiny = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8), "latent_channels": 6}
    vae = AutoencoderTiny(**tiny, num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1)).eval()
    pipe = LightningDiTPipeline(pipeline.transformer, vae, pipeline.scheduler, None, None)
    pipe.set_progress_bar_config(disable=True)
    assert pipe([0], num_inference_steps=1, output_type="pt").images.shape == (1, 3, 16, 16)


@pytest.fixture
def overflowing(pipeline):
    """Half-precision weights whose images are finite in float32 alone: 600 times as large twice, then 1 / 360,000."""
    with torch.no_grad():
        layers = [torch.nn.Conv2d(6, 6, 1), torch.nn.Conv2d(6, 6, 1), torch.nn.Conv2d(6, 3, 1)]
        pipeline.vae.decoder = torch.nn.Sequential(*layers, torch.nn.Upsample(scale_factor=4))
        for layer, size in zip(layers, (600.0, 600.0, 1 / 360_000)):
            torch.nn.init.dirac_(layer.weight)
            layer.weight *= size
    return pipeline.to(torch.float16)


def test_an_autoencoder_that_overflows_in_half_precision(overflowing):
    options = {"latents": torch.randn(1, 6, 4, 4), "num_inference_steps": 2, "output_type": "pt"}
    with pytest.raises(NonFiniteError, match="AutoencoderKLFA are not finite in torch.float16; .*force_upcast=True"):
        overflowing([1], **options)
    overflowing.vae.register_to_config(force_upcast=True)
    images = overflowing([1], **options).images
    assert images.isfinite().all() and images.std() > 0
    assert {parameter.dtype for parameter in overflowing.vae.parameters()} == {torch.float16}  # as before
    latents = overflowing([1], **{**options, "output_type": "latent"}).images
    assert overflowing.decode_latents(latents).dtype == torch.float32
    with pytest.raises(NonFiniteError, match="the generator's latents"):
        overflowing.decode_latents(latents * torch.inf)


def test_saved_and_loaded_by_diffusers(pipeline, tmp_path, caplog):
    pipeline.vae.register_to_config(latents_mean=[0.1] * 6, latents_std=[2.0] * 6)
    pipeline.save_pretrained(tmp_path)
    latents = torch.randn(1, 6, 4, 4)
    expected = pipeline([1], latents=latents, num_inference_steps=3, output_type="np").images
    for cls in (DiffusionPipeline, LightningDiTPipeline):
        with caplog.at_level(logging.WARNING, logger="diffusers"):
            loaded = cls.from_pretrained(tmp_path)
        assert not caplog.records
        loaded.set_progress_bar_config(disable=True)
        assert isinstance(loaded, LightningDiTPipeline)
        assert loaded.get_label_ids(["fish", "cat"]) == [2, 0]
        output = loaded([1], latents=latents, num_inference_steps=3, output_type="np").images
        assert np.array_equal(output, expected)
    assert pipeline([0], num_inference_steps=2).images[0].size == (16, 16)  # PIL by default


def test_bad_arguments(pipeline, tiny_favae):
    with pytest.raises(ValueError, match="0 to 2"):
        pipeline([3])
    with pytest.raises(ValueError, match="bird"):
        pipeline.get_label_ids("bird")
    with pytest.raises(ValueError, match="shape"):
        pipeline([0], latents=torch.zeros(1, 6, 8, 8))
    other = LightningDiTTransformer2DModel(**{**TINY_LIGHTNINGDIT, "in_channels": 5})
    with pytest.raises(ValueError, match="latent channels"):
        LightningDiTPipeline(other, tiny_favae, pipeline.scheduler, None, None)


# Solvers --------------------------------------------------------------------------------------------------------------


MEAN, STD = 2.0, 0.3  # of the data of a flow that can be integrated


def exact_velocity(x, timestep, class_labels, return_dict=False):
    """Between standard normal noise and data of this mean and std."""
    t = timestep.view(-1, 1, 1, 1)
    slope = (t * STD**2 - (1 - t)) / ((t * STD) ** 2 + (1 - t) ** 2)
    return (MEAN + slope * (x - t * MEAN),)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_solvers_of_second_order_need_fewer_evaluations(pipeline, shift, monkeypatch):
    noise = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    errors, calls = {}, []

    def counted(*arguments, **options):
        calls.append(options["timestep"][0])
        return exact_velocity(*arguments, **options)

    monkeypatch.setattr(pipeline.transformer, "forward", counted)
    for solver, steps in (("euler", 20), ("heun", 10), ("dpm++", 20)):
        calls.clear()
        pipeline.scheduler = flow_scheduler(solver, shift)
        options = {"guidance_scale": 1.0, "num_inference_steps": steps, "output_type": "latent"}
        found = pipeline([0, 1], latents=noise, **options).images
        errors[solver] = (found - (MEAN + STD * noise)).abs().mean().item()
        assert len(calls) == (19 if solver == "heun" else 20)
        told = torch.stack(calls)
        sigmas = pipeline.scheduler.sigmas[: len(told)]
        torch.testing.assert_close(told, 1 - sigmas, rtol=0, atol=1e-6)  # also where time steps are rounded
    assert errors["heun"] < 0.5 * errors["euler"] and errors["dpm++"] < 0.7 * errors["euler"]


def test_other_schedulers_of_flows(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline.transformer, "forward", exact_velocity)
    noise = torch.randn(1, 6, 4, 4)
    options = {"guidance_scale": 1.0, "num_inference_steps": 20, "output_type": "latent", "latents": noise}
    config = pipeline.scheduler.config
    flows = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    pipeline.scheduler = UniPCMultistepScheduler.from_config(config, **flows)
    assert (pipeline([0], **options).images - (MEAN + STD * noise)).abs().mean() < 0.02
    for other in (DPMSolverMultistepScheduler.from_config(config), DDIMScheduler()):
        pipeline.scheduler = other
        with pytest.raises(ValueError, match="not set to integrate a flow"):
            pipeline([0], **options)


def test_the_sde_has_the_distribution_of_the_flow(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline.transformer, "forward", exact_velocity)
    pipeline.scheduler = flow_scheduler("sde")
    options = {"guidance_scale": 1.0, "num_inference_steps": 100, "output_type": "latent"}

    def sample(*seeds: int, **more) -> torch.Tensor:
        generator = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipeline([0] * len(seeds), generator=generator, **options, **more).images

    samples = sample(*range(64))
    assert samples.mean().item() == pytest.approx(MEAN, abs=0.01) and samples.std().item() == pytest.approx(
        STD, rel=0.04
    )
    noise = torch.randn(1, 6, 4, 4)
    apart = (sample(1, latents=noise) - sample(2, latents=noise)).abs().mean()
    assert apart > 0.5 * STD  # the noise of the start is forgotten
    assert torch.equal(sample(3), sample(3)) and torch.allclose(sample(3, 4)[1:], sample(4), atol=1e-5)


def test_solvers_are_saved_and_known_by_their_shift(pipeline, tmp_path):
    for solver in get_args(Solver):
        scheduler = flow_scheduler(solver, 3.0)
        scheduler.save_pretrained(tmp_path / solver)
        again = type(scheduler).from_pretrained(tmp_path / solver)
        assert shift_of(scheduler) == shift_of(again) == 3.0
    pipeline.register_modules(scheduler=scheduler)  # one of ours
    pipeline.save_pretrained(tmp_path / "pipeline")
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "pipeline").scheduler) is type(scheduler)
    assert shift_of(DDIMScheduler()) is None
    assert shift_of(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)) is None


@pytest.mark.parametrize("solver", get_args(Solver))
def test_many_steps_with_a_large_shift(pipeline, solver):
    """Whose first timesteps may be rounded to the same number."""
    pipeline.scheduler = flow_scheduler(solver, 6.0)
    assert torch.isfinite(pipeline([1], num_inference_steps=250, output_type="latent").images).all()


def test_steps_in_half_precision_are_those_of_float32(pipeline):
    """Rounded once at the end of a step, and not in its middle."""
    torch.manual_seed(0)
    velocity, sample = (torch.randn(1, 4, 32, 32, dtype=torch.bfloat16) for _ in range(2))
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        scheduler = flow_scheduler("sde")
        scheduler.set_timesteps(10)
        arguments = velocity.to(dtype), scheduler.timesteps[3], sample.to(dtype)
        found.append(scheduler.step(*arguments, generator=torch.Generator().manual_seed(0)).prev_sample)
    assert found[1].dtype == torch.bfloat16 and torch.equal(found[0].bfloat16(), found[1])


def test_a_pipeline_with_a_solver_of_ours_opens_in_another_process(pipeline, tmp_path):
    pipeline.scheduler = flow_scheduler("sde")
    pipeline.save_pretrained(tmp_path / "sde")
    code = "import sys, diffusers, favae; print(diffusers.DiffusionPipeline.from_pretrained(sys.argv[1]).scheduler)"
    assert "FlowMatchSDEScheduler" in run("-c", code, tmp_path / "sde").stdout


def test_several_images_of_a_class(pipeline):
    latents = torch.randn(4, 6, 4, 4)
    options = {"latents": latents, "num_inference_steps": 2, "output_type": "latent"}
    found = pipeline([0, 2], num_images_per_prompt=2, **options).images
    assert torch.equal(found, pipeline([0, 0, 2, 2], **options).images)


def test_a_callback_sees_and_changes_latents(pipeline):
    seen, previews = [], []
    factors = torch.eye(6)[:, :3]  # the colors are the first three channels
    pipeline.vae.register_to_config(latent_rgb_factors=factors.tolist(), latent_rgb_factors_bias=[0.0, 0.5, 0.0])

    def callback(pipe, step, timestep, given):
        seen.append((step, given["latents"].shape))
        previews.append(latent_rgb(pipe.vae, given["latents"], normalized=True))
        return {"latents": torch.zeros_like(given["latents"])}

    options = {"num_inference_steps": 3, "output_type": "latent"}
    found = pipeline([0, 1], callback_on_step_end=callback, **options).images
    assert seen == [(step, (2, 6, 4, 4)) for step in range(3)] and not found.any()
    assert previews[0].shape == (2, 3, 4, 4) and not torch.equal(previews[0], previews[-1])


def test_a_callback_ends_sampling(pipeline):
    seen = []

    def callback(pipe, step, timestep, given):
        seen.append(step)
        pipe._interrupt = step == 1
        return {}

    pipeline([0], num_inference_steps=5, callback_on_step_end=callback)
    assert seen == [0, 1] and pipeline.num_timesteps == 5
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs: no {'prompt_embeds'}"):
        pipeline([0], callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_prompts_do_not_take_the_place_of_classes(pipeline):
    with pytest.raises(ValueError, match="takes no prompt"):
        pipeline([0], prompt="a cat")
    with pytest.raises(ValueError, match="needs class_labels"):
        pipeline()
    assert not takes_prompts(pipeline)


@pytest.mark.parametrize("name", ["AsymmetricAutoencoderKL", "AutoencoderTiny", "AutoencoderDC", "VQModel"])
@torch.no_grad()
def test_other_autoencoders_keep_the_statistics_of_their_latents(name, tmp_path):
    vae = autoencoders()[name].eval()
    latents = encode(vae, torch.rand(2, 3, 16, 16) * 2 - 1)
    channels, side = latents.shape[1:3]
    statistics = {"latents_mean": [0.5] * channels, "latents_std": [2.0] * channels}
    vae.register_to_config(**statistics, scaling_factor=1.0, shift_factor=0.0)
    transformer = LightningDiTTransformer2DModel(
        **{**TINY_LIGHTNINGDIT, "in_channels": channels, "sample_size": side, "patch_size": 1}
    )
    LightningDiTPipeline(transformer, vae, FlowMatchEulerDiscreteScheduler(), None, None).save_pretrained(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert torch.allclose(pipe.decode_latents((latents - 0.5) / 2), decode(vae, latents), atol=1e-5)
    assert pipe([0], num_inference_steps=2, output_type="pt").images.shape == (1, 3, 16, 16)
