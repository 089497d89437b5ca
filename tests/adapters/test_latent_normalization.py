"""What is read from the pipelines of diffusers, against what they do, and that all of them work or are refused."""

import importlib
import inspect
import re

import diffusers
import pytest
import torch
from decoding_probe import probe_decoding, probe_encoding
from diffusers import AutoencoderKL, DiffusionPipeline
from test_swap_packed_and_video import flux2_autoencoder, qwen, wan
from tiny_pipelines import ours, stock

from favae import AutoencoderTinyFA, LightningDiTPipeline
from favae.adapters.latent_normalization import read_normalization
from favae.adapters.pipelines import fold_latent_statistics, swap_vae

SCALE, SHIFT, MEAN, PACKED = {"scaling_factor"}, {"scaling_factor", "shift_factor"}, {"latents_mean"}, {"bn"}
XL = SCALE | MEAN
NOT_UNIFORM = {"latents_mean": [0.5, 1.0, 1.0, 2.0], "latents_std": [0.5, 1.0, 1.0, 2.0]}
IMAGES = r"AutoencoderKL(Flux2|QwenImage|QwenImage21)?\b|AutoencoderDC|AutoencoderTiny|AutoencoderKLWan"
# These consist of other pipelines, or compute their numbers elsewhere.
SAY_NOTHING = {"VisualClozePipeline", "VersatileDiffusionPipeline", "Cosmos3OmniPipeline"}
# Of each kind one or a few, and the pipelines of which diffusers forgets something.
PROBED = {
    "StableDiffusionPipeline": SCALE,
    "StableDiffusionXLControlNetInpaintPipeline": SCALE,
    "StableDiffusionXLAdapterPipeline": SCALE,
    "AuraFlowPipeline": SCALE,
    "CogView4Pipeline": SCALE,
    "HunyuanDiTPipeline": SCALE,
    "OmniGenPipeline": SCALE,
    "SanaPipeline": SCALE,
    "StableDiffusionXLPipeline": XL,
    "StableDiffusionXLInpaintPipeline": XL,
    "StableDiffusion3Pipeline": SHIFT,
    "StableDiffusion3InpaintPipeline": SCALE,
    "FluxFillPipeline": SHIFT,
    "ChromaPipeline": SHIFT,
    "ZImagePipeline": SHIFT,
    "HiDreamImagePipeline": SHIFT,
    "PRXPipeline": SHIFT,
    "GlmImagePipeline": MEAN,
    "Flux2Pipeline": PACKED,
    "QwenImagePipeline": MEAN,
    "QwenImageEditPipeline": MEAN,
    "WanPipeline": MEAN,
    "Krea2Pipeline": MEAN,
    "MotifVideoPipeline": MEAN,
}


def pipelines() -> dict[str, type[DiffusionPipeline]]:
    """All with a component called `vae` that is an autoencoder of images, or of videos that may have one frame."""
    found = {}
    for name in dir(diffusers):
        value = getattr(diffusers, name, None) if "Pipeline" in name else None  # one of ONNX's is a name alone
        if inspect.isclass(value) and issubclass(value, DiffusionPipeline):
            parameter = inspect.signature(value.__init__).parameters.get("vae")
            if parameter is not None and re.search(IMAGES, str(parameter.annotation)):
                found[name] = value
    for module, name in (("kolors.pipeline_kolors_img2img", "KolorsImg2ImgPipeline"),):  # needs sentencepiece
        found[name] = getattr(importlib.import_module(f"diffusers.pipelines.{module}"), name)
    return found


@pytest.fixture(scope="module")
def read():
    return {name: read_normalization(pipeline) for name, pipeline in pipelines().items()}


def test_every_pipeline_of_diffusers_gives_an_answer(read):
    assert len(read) > 180 and {name for name, found in read.items() if not found.decoding} == SAY_NOTHING
    kinds = {frozenset(kind) for kind in (SCALE, SHIFT, MEAN, XL, PACKED)}
    assert {found.decoding for found in read.values()} - {frozenset()} == kinds


def test_where_encoding_and_decoding_differ(read):
    """Mistakes of diffusers, and pipelines that give images to their generators without a scale."""
    one_sided = {
        name: found.decoding ^ found.encoding
        for name, found in read.items()
        if found.encodes and found.decoding != found.encoding and name not in SAY_NOTHING
    }
    raw = {"StableDiffusionInstructPix2PixPipeline", "DreamLitePipeline", "DreamLiteMobilePipeline"}
    assert raw == {name for name, found in read.items() if found.has_raw_conditions}
    assert {name: kind for name, kind in one_sided.items() if name not in raw} == {
        "StableDiffusion3InpaintPipeline": {"shift_factor"},
        "KolorsImg2ImgPipeline": {"latents_mean"},
        "StableDiffusionXLInpaintPipeline": {"latents_mean"},
        "StableDiffusionXLPAGInpaintPipeline": {"latents_mean"},
        "StableDiffusionXLInstructPix2PixPipeline": {"latents_mean"},
    }
    assert read["StableDiffusion3InpaintPipeline"].applied == SCALE == read["KolorsImg2ImgPipeline"].applied
    assert read["StableDiffusionXLPipeline"].channels == 4 and read["GlmImagePipeline"].channels is None


@pytest.mark.parametrize("name", PROBED)
def test_what_is_read_is_what_is_done(read, name):
    """The end of the pipeline runs, on latents of zeros and ones."""
    assert read[name].decoding == PROBED[name] == set(probe_decoding(getattr(diffusers, name)) or ())


def test_what_is_read_of_encoding_is_what_is_done(read):
    """Of all pipelines whose method takes an image and nothing else."""
    done = {name: probe_encoding(pipeline) for name, pipeline in pipelines().items()}
    done = {name: set(settings) for name, settings in done.items() if settings is not None}
    assert done == {name: read[name].encoding for name in done} and len(done) > 30


def empty(pipeline: type[DiffusionPipeline], vae) -> DiffusionPipeline | None:
    """A pipeline whose only component is an autoencoder; None if its constructor wants more."""
    parameters = inspect.signature(pipeline.__init__).parameters
    arguments = {name: None for name, parameter in parameters.items() if parameter.default is parameter.empty}
    arguments = {**arguments, "vae": vae, "requires_safety_checker": False}
    try:
        return pipeline(**{name: arguments[name] for name in parameters if name in arguments and name != "self"})
    except (AttributeError, ImportError):
        return None


def test_every_pipeline_is_swapped_or_refused():
    """The new autoencoder has twice the compression ratio."""
    families = {"Flux2": flux2_autoencoder(), "Qwen": qwen()[0].vae, "Wan": wan()[0].vae, "": stock()}
    new = stock(octaves=3)
    swapped, refused = [], {}
    for name, pipeline in pipelines().items():
        annotation = str(inspect.signature(pipeline.__init__).parameters["vae"].annotation)
        pipe = empty(pipeline, next(vae for family, vae in families.items() if family in annotation))
        if pipe is None:
            continue
        scale = 1.0 if "Flux2" in annotation else 0.5  # batch norm has none
        new.register_to_config(scaling_factor=scale, shift_factor=0.0, latents_mean=None, latents_std=None)
        before = {key: value for key, value in vars(pipe).items() if key.startswith("vae_scale_factor")}
        try:
            swap_vae(pipe, new)
        except ValueError as error:
            refused[name] = str(error)
            continue
        assert getattr(pipe.vae, "autoencoder", pipe.vae) is new
        swapped.append(name)
        for key, value in before.items():
            assert key.endswith("temporal") or getattr(pipe, key) == 2 * value, name
    upscaler = refused.pop("StableDiffusionUpscalePipeline")
    assert "is for autoencoders with {'scaling_factor': 0.08333}" in upscaler and new.config.scaling_factor == 0.5
    assert refused.keys() <= SAY_NOTHING and all("nothing in its source" in line for line in refused.values())
    assert len(swapped) > 160


def test_settings_are_written_as_the_pipeline_reads_them():
    statistics = {"latents_mean": [0.5, 0.0, 0.0, -0.5], "latents_std": [2.0, 1.0, 1.0, 3.0]}
    glm = empty(diffusers.GlmImagePipeline, stock(**statistics))
    config = swap_vae(glm, stock(octaves=3, scaling_factor=0.5, shift_factor=0.25)).vae.config
    assert (config.scaling_factor, config.latents_mean, config.latents_std) == (1.0, [0.25] * 4, [2.0] * 4)
    flux = empty(diffusers.FluxPipeline, stock())
    uniform = {"latents_mean": [0.25] * 4, "latents_std": [2.0] * 4, "scaling_factor": 1}
    config = swap_vae(flux, stock(octaves=3, **uniform)).vae.config
    assert (config.scaling_factor, config.shift_factor, config.latents_mean) == (0.5, 0.25, None)


@pytest.mark.parametrize(
    "pipeline, config, message",
    [
        ("StableDiffusion3InpaintPipeline", {"shift_factor": 0.5}, "shift_factor only when it encodes; fold"),
        (
            "StableDiffusionXLInpaintPipeline",
            NOT_UNIFORM,
            "only when it decodes; fold",
        ),
        ("StableDiffusionXLControlNetInpaintPipeline", NOT_UNIFORM, "does not apply"),
    ],
)
def test_what_diffusers_forgets_is_refused(pipeline, config, message):
    with pytest.raises(ValueError, match=message):
        swap_vae(empty(getattr(diffusers, pipeline), stock(**config)), stock(**config))


def test_conditions_without_a_scale_must_be_the_old_latents(caplog):
    pipe = empty(diffusers.StableDiffusionInstructPix2PixPipeline, stock())
    swap_vae(pipe, stock())
    assert "favae" not in str(caplog.record_tuples)
    swap_vae(pipe, fold_latent_statistics(stock()))
    assert "trained on its latents" in caplog.text


def test_the_upscaler_takes_autoencoders_of_its_scale():
    pipe = empty(diffusers.StableDiffusionUpscalePipeline, stock(scaling_factor=0.08333))
    vae = stock(octaves=3, scaling_factor=0.08333)
    assert swap_vae(pipe, vae).vae is vae and vae.config.scaling_factor == 0.08333
    with pytest.raises(ValueError, match="whenever it is made"):
        swap_vae(pipe, stock(scaling_factor=1.0))
    assert pipe.vae is vae


def test_small_autoencoders_cannot_encode_where_a_posterior_is_wanted(read, caplog):
    tiny = AutoencoderTinyFA(
        block_out_channels=(8, 8, 8), num_encoder_blocks=(1, 1, 1), decoder_block_out_channels=(8, 8),
        num_decoder_blocks=(1, 1),
    )  # fmt: skip
    for name, warns in (("FluxControlPipeline", True), ("FluxImg2ImgPipeline", False)):
        caplog.clear()
        swap_vae(empty(getattr(diffusers, name), stock()), tiny)
        assert ("by a posterior, which an AutoencoderTinyFA lacks" in caplog.text) == warns
        assert read[name].needs_posterior == warns


def test_what_pipelines_upcast_by_must_be_there(read):
    pipe = empty(diffusers.AnimateDiffSDXLPipeline, stock(force_upcast=True))
    with pytest.raises(ValueError, match="upcasts by decoder.mid_block, which this autoencoder lacks"):
        swap_vae(pipe, ours(force_upcast=True))
    assert swap_vae(pipe, ours(force_upcast=False)).vae.config.force_upcast is False
    assert {name for name, found in read.items() if "decoder.mid_block" in found.upcast_parts} == {
        "AnimateDiffSDXLPipeline"
    }


def test_pipelines_of_ours_and_of_users():
    assert read_normalization(LightningDiTPipeline).decoding == {"scaling_factor", "shift_factor", "latents_mean"}

    class Mine(DiffusionPipeline):
        def __init__(self, vae: AutoencoderKL):
            super().__init__()
            self.register_modules(vae=vae)
            self.scale = getattr(vae.config, "scaling_factor", 1.0)

        def __call__(self, latents: torch.Tensor) -> torch.Tensor:
            config = self.vae.config
            latents = latents.div_(config.scaling_factor) + (config.shift_factor or 0.0)
            return self.vae.decode(latents).sample

    found = read_normalization(Mine)
    assert found.decoding == SHIFT and not found.encodes and found.applied == SHIFT


def test_a_pipeline_without_a_source_says_nothing():
    namespace = {"DiffusionPipeline": DiffusionPipeline}
    typed = "class Typed(DiffusionPipeline):\n  def __call__(self, z): return z / self.vae.config.scaling_factor"
    exec(typed, namespace)
    assert not read_normalization(namespace["Typed"]).decoding
