"""Autoencoders as ONNX models, in the folders and with the names of `optimum`."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from favae.autoencoders import image_channels, spatial_compression_ratio, takes_frames
from favae.errors import ModelError
from favae.files import write_text

OPSET = 18
INLINE_BYTES = 1 << 30  # larger weights go into a file beside the model: protobuf's limit is twice this
FREE_AXES = {0: "batch", 2: "height", 3: "width"}
EXAMPLE_SIZE = (16, 24)  # height and width of the latents that the model is traced with


class EncoderToMoments(nn.Module):
    """`encode` as a network: (B, C, H, W) in [-1, 1] -> [mean | logvar], or the latents of one without a posterior."""

    def __init__(self, vae: ModelMixin):
        super().__init__()
        self.vae, self.frames = vae, takes_frames(vae)

    def forward(self, sample: Tensor) -> Tensor:
        output = self.vae.encode(sample.unsqueeze(2) if self.frames else sample)
        if hasattr(output, "latent_dist"):
            latents = output.latent_dist.parameters
        else:
            latents = output.latents if hasattr(output, "latents") else output.latent
        return latents.squeeze(2) if self.frames else latents


class DecoderToImages(nn.Module):
    """`decode` as a network: latents, as `encode` gives them -> images."""

    def __init__(self, vae: ModelMixin):
        super().__init__()
        self.vae, self.frames = vae, takes_frames(vae)

    def forward(self, latent_sample: Tensor) -> Tensor:
        images = self.vae.decode(latent_sample.unsqueeze(2) if self.frames else latent_sample).sample
        return images.squeeze(2) if self.frames else images


@torch.no_grad()
def save_onnx(vae: ModelMixin, folder: Path) -> None:
    """Writes `vae_encoder/` and `vae_decoder/`, each with model.onnx and config.json.

    Batch, height and width are free. The encoder takes `sample` and gives `latent_parameters`, mean and log-variance
    along the channels (`latent_sample` where there is no posterior); the decoder takes `latent_sample` and gives
    `sample`. Scaling and statistics are in the config, and left to pipelines.

    Args:
        vae: on the CPU. Its weights are exported in their dtype.
        folder: is created.
    Raises:
        ModelError: if the packages of the extra [export] are not installed, or the autoencoder cannot be exported.
    """
    _check_packages()
    ratio, (height, width) = spatial_compression_ratio(vae), EXAMPLE_SIZE
    images = torch.zeros(2, image_channels(vae), height * ratio, width * ratio, dtype=vae.dtype)
    encoder, decoder = EncoderToMoments(vae).eval(), DecoderToImages(vae).eval()
    try:
        latents = encoder(images)
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"this {type(vae).__name__} takes no images (B, C, H, W) and is not exported: {reason}"
        ) from error
    has_posterior = latents.shape[1] == 2 * vae.config.get("latent_channels", vae.config.get("z_dim", 0))
    config = onnx_config(vae)
    posterior = "latent_parameters" if has_posterior else "latent_sample"
    means = latents.chunk(2, dim=1)[0].contiguous() if has_posterior else latents
    for name, network, example, names, output_size in (
        ("vae_encoder", encoder, images, ("sample", posterior), f"{{}} // {ratio}"),
        ("vae_decoder", decoder, means, ("latent_sample", "sample"), f"{{}} * {ratio}"),
    ):
        file = folder / name / "model.onnx"
        file.parent.mkdir(parents=True)
        write_text(file.with_name("config.json"), json.dumps(config, indent=2) + "\n")
        _export(network, example, file, *names)
        _tidy(file, output_size)


def _tidy(file: Path, size: str) -> None:
    """Says how the output's height and width follow from the input's, in words separated by blanks, as optimum needs,
    and removes what the exporter has noted about source files on this machine.

    Args:
        size: such as "{} // 8".
    """
    import onnx

    model = onnx.load(file, load_external_data=False)
    (output,) = model.graph.output
    for axis, name in FREE_AXES.items():
        output.type.tensor_type.shape.dim[axis].dim_param = size.format(name) if axis > 0 else name
    for part in (*model.graph.node, *model.graph.value_info, *model.graph.input, output, *model.graph.initializer):
        del part.metadata_props[:]
    onnx.save(model, file)


def onnx_config(vae: ModelMixin) -> dict:
    """The autoencoder's config, with the types of blocks: from their number optimum knows the compression ratio."""
    config = {name: value for name, value in vae.config.items() if name not in ("_name_or_path", "auto_map")}
    levels = spatial_compression_ratio(vae).bit_length()
    config.setdefault("down_block_types", ["DownEncoderBlock2D"] * levels)
    config.setdefault("up_block_types", ["UpDecoderBlock2D"] * levels)
    config.setdefault("scaling_factor", 1.0)  # optimum would take the ratio
    return {"_class_name": type(vae).__name__, **config}


def _export(network: nn.Module, example: Tensor, file: Path, input_name: str, output_name: str) -> None:
    with _quiet():
        try:
            torch.onnx.export(
                network,
                (example,),
                file,
                input_names=[input_name],
                output_names=[output_name],
                dynamic_shapes={input_name: FREE_AXES},
                opset_version=OPSET,
                dynamo=True,
                external_data=sum(p.nbytes for p in network.parameters()) > INLINE_BYTES,
            )
        except RuntimeError as error:
            reason = str(error.__cause__ or error).strip().splitlines()[-1]
            raise ModelError(f"this {type(network.vae).__name__} cannot be exported to ONNX ({reason})") from error


def _check_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ModelError(f"--format onnx needs the package {error.name}: pip install 'favae[export]'") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's messages about its own progress."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
