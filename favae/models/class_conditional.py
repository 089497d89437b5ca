"""What our LightningDiT and diffusers' DiT call differently, for code that trains or samples either of them."""

from diffusers import DiTTransformer2DModel, ModelMixin


def num_classes(transformer: ModelMixin) -> int:
    """Number of classes, which is also the index of the null class."""
    config = transformer.config
    return config.num_embeds_ada_norm if isinstance(transformer, DiTTransformer2DModel) else config.num_classes


def time_scale(transformer: ModelMixin) -> float:
    """The factor from times in [0, 1] to the `timestep` of the transformer: DiT embeds 0 to 1,000."""
    return 1000.0 if isinstance(transformer, DiTTransformer2DModel) else 1.0
