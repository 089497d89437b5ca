"""The networks of other programs as their descriptions have them, tiny, for what converters are compared with."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@torch.no_grad()
def randomize(network: nn.Module) -> nn.Module:
    """Weights that keep activations of order 1, with norms and biases that matter."""
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.normal_(std=0.3)
            if name.endswith("weight"):
                parameter.add_(1)
    return network.eval()


def group_norm(channels: int, eps: float = 1e-6) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=eps)


# The autoencoders of latent diffusion: VA-VAE, MAR, and the VQGAN of taming-transformers


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1, self.conv1 = group_norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = group_norm(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class ConvolutionalAttention(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))  # (B, C, N)
        weights = torch.einsum("bcn,bcm->bnm", q, k).mul(q.shape[1] ** -0.5).softmax(-1)
        return x + self.proj_out(torch.einsum("bnm,bcm->bcn", weights, v).unflatten(2, x.shape[-2:]))


class Resampling(nn.Module):
    def __init__(self, channels: int, down: bool):
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(channels, channels, 3, **({"stride": 2} if down else {"padding": 1}))

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 1, 0, 1)) if self.down else x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return self.conv(x)


def holder(**modules: nn.Module) -> nn.Module:
    module = nn.Module()
    for name, value in modules.items():
        setattr(module, name, value)
    return module


class Side(nn.Module):
    """Encoder or decoder; `attending` are the levels with attention, counted from the image."""

    def __init__(self, down: bool, ends: tuple[int, int], widths: tuple[int, ...], layers: int, attending: set[int]):
        super().__init__()
        self.is_down = down
        deepest, order = widths[-1], list(range(len(widths)))
        self.conv_in = nn.Conv2d(ends[0], widths[0] if down else deepest, 3, padding=1)
        self.mid = holder(
            block_1=Residual(deepest, deepest),
            attn_1=ConvolutionalAttention(deepest),
            block_2=Residual(deepest, deepest),
        )
        width, levels = widths[0] if down else deepest, {}
        self.order = order if down else order[::-1]
        for level in self.order:
            blocks, attentions = nn.ModuleList(), nn.ModuleList()
            for _ in range(layers if down else layers + 1):
                blocks.append(Residual(width, widths[level]))
                width = widths[level]
                if level in attending:
                    attentions.append(ConvolutionalAttention(width))
            levels[level] = holder(block=blocks, attn=attentions)
            if level != self.order[-1]:
                setattr(levels[level], "downsample" if down else "upsample", Resampling(width, down))
        setattr(self, "down" if down else "up", nn.ModuleList(levels[level] for level in order))
        self.norm_out, self.conv_out = group_norm(width), nn.Conv2d(width, ends[1], 3, padding=1)

    def middle(self, h: Tensor) -> Tensor:
        return self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        if not self.is_down:
            h = self.middle(h)
        for index in self.order:
            level = (self.down if self.is_down else self.up)[index]
            for i, block in enumerate(level.block):
                h = block(h)
                if len(level.attn):
                    h = level.attn[i](h)
            if index != self.order[-1]:
                h = (level.downsample if self.is_down else level.upsample)(h)
        if self.is_down:
            h = self.middle(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class LatentDiffusionAutoencoder(nn.Module):
    """(B, 3, H, W) -> moments (B, 2C, H/4, W/4); latents -> (B, 3, H, W)."""

    def __init__(self, channels=4, widths=(32, 32, 64), layers=1, down=frozenset({2}), up=frozenset({2})):
        super().__init__()
        self.encoder = Side(True, (3, 2 * channels), widths, layers, set(down))
        self.decoder = Side(False, (channels, 3), widths, layers, set(up))
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    def encode(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))


class VQGAN(nn.Module):
    """Two levels of attention; latents of 6 channels, entries of 4."""

    def __init__(self, widths=(32, 64, 64), layers=2, attending=frozenset({1, 2})):
        super().__init__()
        self.encoder = Side(True, (3, 6), widths, layers, set(attending))
        self.decoder = Side(False, (6, 3), widths, layers, set(attending))
        self.quant_conv, self.post_quant_conv = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 6, 1)
        self.quantize = holder(embedding=nn.Embedding(16, 4))

    def encode(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(x))

    def forward(self, x: Tensor) -> Tensor:
        z = self.encode(x).permute(0, 2, 3, 1)  # (B, h, w, 4)
        entries = self.quantize.embedding.weight
        nearest = (z.unsqueeze(-2) - entries).square().sum(-1).argmin(-1)
        return self.decoder(self.post_quant_conv(entries[nearest].permute(0, 3, 1, 2)))


# The codec of FA-VAE


class FlatResidual(nn.Module):
    """`inside` is False for Conv complements, whose input is added by the decoder."""

    def __init__(self, inputs: int, outputs: int, groups: int = 32, inside: bool = True):
        super().__init__()
        self.inside = inside
        self.block = nn.Sequential(
            nn.GroupNorm(groups, inputs),
            nn.SiLU(),
            nn.Conv2d(inputs, outputs, 3, padding=1),
            nn.GroupNorm(groups, outputs),
            nn.SiLU(),
            nn.Dropout(0.0),
            nn.Conv2d(outputs, outputs, 3, padding=1),
        )
        if inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.block(x)
        if not self.inside:
            return h
        return h + (self.shortcut(x) if hasattr(self, "shortcut") else x)


class TokenLayer(nn.Module):
    """Attention over positions, or, as a complement, a whole transformer layer in place of its input."""

    def __init__(self, channels: int, whole: bool = False):
        super().__init__()
        self.norm, self.whole = nn.GroupNorm(32, channels), whole
        if whole:
            self.attn = nn.TransformerEncoderLayer(channels, 8, batch_first=True)
        else:
            self.attn = nn.MultiheadAttention(channels, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        if self.whole:
            return self.attn(tokens).transpose(1, 2).unflatten(2, x.shape[-2:])
        attended = self.attn(tokens, tokens, tokens, need_weights=False)[0]
        return x + attended.transpose(1, 2).unflatten(2, x.shape[-2:])


def flat_middle(width: int) -> nn.Sequential:
    return nn.Sequential(FlatResidual(width, width), TokenLayer(width), FlatResidual(width, width))


def flat_levels(widths: tuple[int, ...], layers: int, attention: bool, down: bool) -> nn.Sequential:
    blocks: list[nn.Module] = []
    width, order = widths[0] if down else widths[-1], list(range(len(widths)))
    order = order if down else order[::-1]
    for level in order:
        for _ in range(layers if down else layers + 1):
            blocks.append(FlatResidual(width, widths[level]))
            width = widths[level]
            if attention and level == len(widths) - 1:
                blocks.append(TokenLayer(width))
        if level != order[-1]:
            blocks.append(Resampling(width, down))
    return nn.Sequential(*blocks)


class FrequencyAugmentedCodec(nn.Module):
    """`kind` of its complements: "conv", "res" or "attn"; a codebook of 16 entries, `dimension` wide."""

    def __init__(self, kind="conv", latents=32, dimension=32, attention=True, widths=(32, 32, 64), layers=1):
        super().__init__()
        self.kind, deepest, groups = kind, widths[-1], min(32, latents)

        def complement(channels: int, groups: int = 32) -> nn.Module:
            if kind == "attn":
                return TokenLayer(channels, whole=True)
            return FlatResidual(channels, channels, groups, inside=kind == "res")

        self.encoder = holder(
            conv_in=nn.Conv2d(3, widths[0], 3, padding=1),
            down=flat_levels(widths, layers, attention, down=True),
            mid=flat_middle(deepest),
            final=nn.Sequential(
                nn.GroupNorm(32, deepest),
                nn.SiLU(),
                nn.Conv2d(deepest, latents, 3, padding=1),
                nn.Conv2d(latents, latents, 1),
            ),
        )
        self.decoder = holder(
            fcm_1=complement(latents, groups),
            conv_in=nn.Conv2d(latents, deepest, 3, padding=1),
            fcm_2=complement(deepest),
            mid=flat_middle(deepest),
            fcm_3=complement(deepest),
            up=flat_levels(widths, layers, attention, down=False),
            fcm_4=FlatResidual(widths[0], widths[0], inside=kind != "conv"),
            final=nn.Sequential(nn.GroupNorm(32, widths[0]), nn.SiLU(), nn.Conv2d(widths[0], 3, 3, padding=1)),
        )
        self.quantizer = holder(_codebook=nn.Module())
        if dimension != latents:
            self.quantizer.project_in = nn.Linear(latents, dimension)
            self.quantizer.project_out = nn.Linear(dimension, latents)
        entries = torch.randn(1, 16, dimension)  # of different lengths, as moving averages leave them
        self.quantizer._codebook.register_buffer("initted", torch.Tensor([True]))
        self.quantizer._codebook.register_buffer("cluster_size", torch.rand(1, 16) * 3)
        self.quantizer._codebook.register_buffer("embed", entries)

    def encode(self, x: Tensor) -> Tensor:
        h = self.encoder.mid(self.encoder.down(self.encoder.conv_in(x)))
        return self.encoder.final(h)

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor]:
        tokens = z.permute(0, 2, 3, 1)
        projected = hasattr(self.quantizer, "project_in")
        if projected:
            tokens = self.quantizer.project_in(tokens)
        entries = self.quantizer._codebook.embed[0]
        indices = (F.normalize(tokens, dim=-1) @ F.normalize(entries, dim=-1).T).argmax(-1)
        found = entries[indices]
        if projected:
            found = self.quantizer.project_out(found)
        return found.permute(0, 3, 1, 2), indices

    def decode(self, z: Tensor) -> Tensor:
        decoder, outside = self.decoder, float(self.kind == "conv")
        h = decoder.fcm_1(z) + outside * z
        h = decoder.conv_in(h)
        h = decoder.fcm_2(h) + outside * h
        h = decoder.mid(h)
        h = decoder.fcm_3(h) + outside * h
        h = decoder.up(h)
        h = decoder.fcm_4(h) + outside * h
        return decoder.final(h)


# LightningDiT


class RootMeanSquare(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.weight


def sinusoids(positions: Tensor, size: int) -> Tensor:
    """sin first, then cos, of positions (N,) times 10000^(-2i / size)."""
    angles = positions[:, None].double() * 10_000 ** (-torch.arange(size // 2).double() / (size // 2))
    return torch.cat([angles.sin(), angles.cos()], 1)


class LightningDiT(nn.Module):
    def __init__(self, size=6, patch=2, channels=3, depth=2, heads=2, head_dim=8, classes=5, qk_norm=False, shift=True):
        super().__init__()
        width, grid, hidden = heads * head_dim, size // patch, int(2 / 3 * 4 * heads * head_dim)
        self.heads, self.patch, self.grid = heads, patch, grid
        self.x_embedder = holder(proj=nn.Conv2d(channels, width, patch, patch))
        self.t_embedder = holder(mlp=nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width)))
        self.y_embedder = holder(embedding_table=nn.Embedding(classes + 1, width))
        rows, columns = torch.arange(grid).repeat_interleave(grid), torch.arange(grid).repeat(grid)
        positions = torch.cat([sinusoids(columns, width // 2), sinusoids(rows, width // 2)], 1)
        self.register_buffer("pos_embed", positions.float()[None])  # a parameter there, but never trained
        frequencies = 10_000 ** (-torch.arange(0, head_dim // 2, 2).double() / (head_dim // 2))
        angles = torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], 1)
        self.rotation = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)  # (N, head_dim / 2)
        self.feat_rope = nn.Module()
        self.feat_rope.register_buffer("freqs_cos", angles.cos().repeat_interleave(2, 1).float())
        self.feat_rope.register_buffer("freqs_sin", angles.sin().repeat_interleave(2, 1).float())

        def block() -> nn.Module:
            attention = holder(qkv=nn.Linear(width, 3 * width), proj=nn.Linear(width, width))
            if qk_norm:
                attention.q_norm, attention.k_norm = RootMeanSquare(head_dim), RootMeanSquare(head_dim)
            return holder(
                norm1=RootMeanSquare(width),
                norm2=RootMeanSquare(width),
                attn=attention,
                mlp=holder(w12=nn.Linear(width, 2 * hidden), w3=nn.Linear(hidden, width)),
                adaLN_modulation=nn.Sequential(nn.SiLU(), nn.Linear(width, (6 if shift else 4) * width)),
            )

        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.final_layer = holder(
            norm_final=RootMeanSquare(width),
            linear=nn.Linear(width, patch * patch * channels),
            adaLN_modulation=nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width)),
        )

    def rotate(self, x: Tensor) -> Tensor:
        """(B, heads, N, head_dim): neighboring channels are the two parts of a complex number."""
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * self.rotation).flatten(-2)

    def attend(self, layer: nn.Module, x: Tensor) -> Tensor:
        q, k, v = layer.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if hasattr(layer, "q_norm"):
            q, k = layer.q_norm(q), layer.k_norm(k)
        q, k = self.rotate(q), self.rotate(k)
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        return layer.proj((weights @ v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        angles = t[:, None].double() * torch.exp(-math.log(10_000) * torch.arange(128).double() / 128)
        condition = self.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], 1).float())
        condition = condition + self.y_embedder.embedding_table(y)
        for block in self.blocks:
            parts = block.adaLN_modulation(condition).unsqueeze(1).unflatten(-1, (-1, h.shape[-1])).unbind(-2)
            b1, s1, g1, b2, s2, g2 = parts if len(parts) == 6 else (0, *parts[:2], 0, *parts[2:])  # wo_shift
            h = h + g1 * self.attend(block.attn, block.norm1(h) * (1 + s1) + b1)
            gate, linear = block.mlp.w12(block.norm2(h) * (1 + s2) + b2).chunk(2, -1)
            h = h + g2 * block.mlp.w3(gate * gate.sigmoid() * linear)
        shift, scale = self.final_layer.adaLN_modulation(condition).unsqueeze(1).chunk(2, -1)
        h = self.final_layer.linear(self.final_layer.norm_final(h) * (1 + scale) + shift)
        h = h.unflatten(1, (self.grid, self.grid)).unflatten(-1, (self.patch, self.patch, -1))  # (B, h, w, p, q, C)
        return torch.einsum("nhwpqc->nchpwq", h).flatten(4).flatten(2, 3)
