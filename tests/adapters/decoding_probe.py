"""What a pipeline really does to latents: the end of its `__call__`, and its method that encodes, run on a listener."""

import ast
import inspect
import textwrap
from functools import cache
from types import SimpleNamespace

import torch
from diffusers import DiffusionPipeline

CHANNELS = 4
MEAN, STD = [1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 5.0, 7.0]
SCALE, SHIFT = 11.0, 13.0
EPS = 0.25
BN_MEAN = torch.arange(1.0, 17.0)
BN_STD = torch.arange(17.0, 33.0)
# slope and offset that latents have been given when they reach the decoder, at the first pixel
EXPECTED = {
    ("scaling_factor",): ([1 / SCALE] * 4, [0.0] * 4),
    ("scaling_factor", "shift_factor"): ([1 / SCALE] * 4, [SHIFT] * 4),
    ("latents_mean", "scaling_factor"): ([std / SCALE for std in STD], MEAN),
    ("latents_mean",): (STD, MEAN),
    ("bn",): (BN_STD[::4].tolist(), BN_MEAN[::4].tolist()),
}


class Decoded(Exception):
    """Carries the latents that reach the decoder."""


class Listener(torch.nn.Module):
    """An autoencoder whose `decode` ends the pipeline."""

    dtype = torch.float32
    device = torch.device("cpu")
    temperal_downsample = (False, True, True)
    config = SimpleNamespace(
        scaling_factor=SCALE,
        shift_factor=SHIFT,
        latents_mean=MEAN,
        latents_std=STD,
        latent_channels=CHANNELS,
        z_dim=CHANNELS,
        batch_norm_eps=EPS,
        force_upcast=False,
        block_out_channels=(1, 1, 1, 1),
        patch_size=(2, 2),
    )

    def __init__(self):
        super().__init__()
        self.bn = SimpleNamespace(running_mean=BN_MEAN, running_var=BN_STD**2 - EPS)

    def decode(self, latents, *_, **__):
        raise Decoded(latents)

    def encode(self, image, *_, **__):
        return SimpleNamespace(latents=image[:, :1].repeat_interleave(4, dim=1))

    def to(self, *_, **__):
        return self


def probe_encoding(pipeline: type[DiffusionPipeline]) -> tuple[str, ...] | None:
    """The settings by which a pipeline normalizes latents after it encodes them; None where that cannot be told."""
    method = getattr(pipeline, "_encode_vae_image", None)
    if method is None:
        return None
    zero, one = (_encoded(pipeline, method, value) for value in (0.0, 1.0))
    for settings, (slope, offset) in EXPECTED.items():
        slope, offset = torch.tensor(slope), torch.tensor(offset)
        if torch.allclose(one - zero, 1 / slope) and torch.allclose(zero, -offset / slope):
            return settings
    return None


def _encoded(pipeline, method, value: float) -> torch.Tensor:
    """What becomes of an image whose latents have this value, at the first pixel."""
    shape = (1, 3, 1, 4, 4) if "Qwen" in pipeline.__name__ else (1, 3, 4, 4)
    self = object.__new__(_without_device(pipeline))
    self.__dict__.update(vae=Listener(), latent_channels=CHANNELS)
    latents = method(self, torch.full(shape, value), torch.Generator())
    return latents[0, ::4, 0, 0] if latents.shape[1] == 16 else latents.reshape(4, -1)[:, 0]


LAYOUTS = {"BCHW": (1, 4, 4, 4), "packed": (1, 4, 16), "BCTHW": (1, 4, 1, 4, 4), "patches": (1, 16, 2, 2)}


def probe_decoding(pipeline: type[DiffusionPipeline]) -> tuple[str, ...] | None:
    """The settings by which a pipeline normalizes latents before it decodes them; None where that cannot be told."""
    for name in LAYOUTS:
        for code, own in _ways_to_decode(pipeline):
            zero, one = (_reach_decoder(pipeline, code, own, torch.full(LAYOUTS[name], value)) for value in (0.0, 1.0))
            if zero is None or one is None or zero.numel() != 64:
                continue
            zero, one = (latents.reshape(-1, 4, 16)[0, :, 0] for latents in (zero, one))
            for settings, (slope, offset) in EXPECTED.items():
                if torch.allclose(one - zero, torch.tensor(slope)) and torch.allclose(zero, torch.tensor(offset)):
                    return settings
    return None


@cache
def _ways_to_decode(pipeline: type[DiffusionPipeline]) -> list:
    """Code that ends in `vae.decode`: what comes after the denoising loop, or the innermost block; and its names."""
    found = []
    for method in ("__call__", "decode_latents", "_decode_latents"):
        function = getattr(pipeline, method, None)
        if not inspect.isfunction(function):
            continue
        function = inspect.unwrap(function)
        tree = _WithoutReturns().visit(ast.parse(textwrap.dedent(inspect.getsource(function))).body[0])
        blocks = list(_blocks_that_decode(tree.body))
        names = {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
        for body in blocks if method == "__call__" else blocks[:1]:
            code = compile(ast.fix_missing_locations(ast.Module(body, [])), "<end of the pipeline>", "exec")
            found.append((code, {**function.__globals__, **names}))
    return found


class _WithoutReturns(ast.NodeTransformer):
    """Makes the body of a function a program."""

    def visit_Return(self, node: ast.Return) -> ast.stmt:
        return ast.copy_location(ast.Expr(node.value or ast.Constant(None)), node)


def _blocks_that_decode(body: list[ast.stmt]):
    """The lists of statements that end in a decoding one, from the outermost, after its loops, to the innermost."""
    ends = [index for index, statement in enumerate(body) if "vae.decode(" in ast.unparse(statement)]
    if not ends:
        return
    last = body[ends[-1]]
    loops = [
        i for i, statement in enumerate(body[: ends[-1]]) if any(isinstance(n, ast.For) for n in ast.walk(statement))
    ]
    yield body[max(loops, default=-1) + 1 : ends[-1] + 1]
    for field in ("body", "orelse"):
        inner = getattr(last, field, None)
        if isinstance(inner, list):
            yield from _blocks_that_decode(inner)


def _reach_decoder(pipeline, code, names: dict, latents: torch.Tensor) -> torch.Tensor | None:
    size = {"height": 32, "width": 32, "orig_height": 32, "orig_width": 32, "latent_height": 4, "latent_width": 4}
    size |= {"grid_h": 2, "grid_w": 2, "padded_height": 32}
    values = {"output_type": "pil", "device": torch.device("cpu"), "batch_size": 1, "generator": None, **size}
    subclass = _without_device(pipeline)
    self = object.__new__(subclass)
    attributes = {"vae": Listener(), "vae_scale_factor": 8, "patch_size": 2, "latent_channels": CHANNELS}
    self.__dict__.update(attributes)
    for name in ("latents", "image", "z", "latent"):
        values[name] = latents.clone()
    values["latents_ids"] = values["latent_ids"] = _positions()
    try:
        with torch.no_grad():
            exec(code, {**names, **values, "self": self})
    except Decoded as decoded:
        return decoded.args[0]
    except Exception:  # names that only the rest of the pipeline sets
        return None
    return None


def _positions() -> torch.Tensor:
    """Of the packed latents of FLUX.2: (1, 4, 4) of time, row, column and number."""
    rows, columns = torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")
    zeros = torch.zeros(4, dtype=torch.long)
    return torch.stack([zeros, rows.flatten(), columns.flatten(), zeros], dim=1)[None]


@cache
def _without_device(pipeline: type) -> type:
    return type(
        pipeline.__name__, (pipeline,), {"_execution_device": torch.device("cpu"), "device": torch.device("cpu")}
    )
