"""What our LightningDiT and diffusers' DiT and UNet do differently, for code that trains or samples any of them."""

from diffusers import DiTTransformer2DModel, ModelMixin, UNet2DModel
from torch import nn

from favae.models.lightningdit_transformer_2d import xavier_uniform_of_rows


def num_classes(generator: ModelMixin) -> int:
    """Number of classes, which is also the index of the null class; 0 without classes."""
    generator, config = _uncompiled(generator), generator.config
    if isinstance(generator, UNet2DModel):
        return (config.num_class_embeds or 1) - 1
    return config.num_embeds_ada_norm if isinstance(generator, DiTTransformer2DModel) else config.num_classes


def time_scale(generator: ModelMixin) -> float:
    """The factor from times in [0, 1] to the `timestep` of the generator: DiT and UNet embed 0 to 1,000."""
    return 1000.0 if isinstance(_uncompiled(generator), DiTTransformer2DModel | UNet2DModel) else 1.0


def _uncompiled(model: nn.Module) -> nn.Module:
    """The module inside what `torch.compile` gives."""
    return getattr(model, "_orig_mod", model)


def initialize_dit(transformer: DiTTransformer2DModel) -> None:
    """Gives diffusers' DiT the weights that DiT starts with, where diffusers leaves torch's defaults.

    Every block starts as the identity and the output as zero (adaLN-Zero). Queries, keys and values are rows of one
    matrix, as published.

    Source: Peebles and Xie, ICCV 2023 (arXiv 2212.09748), and its code.
    """
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    patches = transformer.pos_embed.proj
    nn.init.xavier_uniform_(patches.weight.view(patches.out_channels, -1))
    nn.init.zeros_(patches.bias)
    for block in transformer.transformer_blocks:
        xavier_uniform_of_rows(block.attn1.to_q, block.attn1.to_k, block.attn1.to_v)
        time, label = block.norm1.emb.timestep_embedder, block.norm1.emb.class_embedder
        for weight in (time.linear_1.weight, time.linear_2.weight, label.embedding_table.weight):
            nn.init.normal_(weight, std=0.02)
        nn.init.zeros_(block.norm1.linear.weight)
    for layer in (transformer.proj_out_1, transformer.proj_out_2):
        nn.init.zeros_(layer.weight)
