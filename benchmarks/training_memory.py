#!/usr/bin/env python
"""Memory of training a tokenizer at 256 px with bf16, counted; on a GPU measured as well.

    python -m benchmarks.training_memory                                   (favae_f16d32, batch 8)

Counted are: what autograd keeps of one forward pass of the tokenizer and the discriminator (each storage once, an image
times the batch size); weights, gradients and the two moments of Adam of both in float32; and the weights of the frozen
networks. Not counted are a convolution's workspace, gaps of the allocator, and what LPIPS keeps. Measured is the peak
of CUDA's allocator, without the frozen networks. Writes docs/results/training_memory.json.
"""

from pathlib import Path

import timm
import torch
import torchvision
from torch import nn

from benchmarks.timing import ROOT, environment, make_parser, parse_arguments, write_result
from favae.losses.adversarial import PatchDiscriminator, adversarial_loss, hinge_discriminator_loss
from favae.training.config import load_config
from favae.training.models import build_model
from favae.training.tokenizer_config import TokenizerConfig


def frozen_bytes(config: TokenizerConfig) -> int:
    """The float32 weights of the teacher of the alignment and of VGG16."""
    with torch.device("meta"):
        backbone = timm.create_model(config.loss.alignment.backbone, num_classes=0)
        vgg = torchvision.models.vgg16(weights=None).features
    return 4 * sum(p.numel() for model in (backbone, vgg) for p in model.parameters())


class SavedTensors:
    """Counts the bytes that autograd saves for the backward pass, without the weights of some modules."""

    def __init__(self, *modules: nn.Module):
        self.known = {p.untyped_storage().data_ptr() for module in modules for p in module.parameters()}
        self.bytes = 0
        self.held = []  # keeps the tensors, so that no address is used twice

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.known.add(storage.data_ptr())
            self.bytes += storage.nbytes()
            self.held.append(tensor)
        return tensor


def reconstruct(vae: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """A posterior sample, decoded: the forward pass of a training step."""
    return vae.decode(vae.encode(images).latent_dist.sample()).sample


def count_activations(vae: nn.Module, discriminator: nn.Module, images: torch.Tensor) -> int:
    """Bytes that a forward pass of both keeps for the backward pass."""
    total, values = 0, images
    for module, forward in ((vae, lambda x: reconstruct(vae, x)), (discriminator, discriminator)):
        counter = SavedTensors(module)
        with (
            torch.autocast("cpu", torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda tensor: tensor),
        ):
            values = forward(values)
        total += counter.bytes
    return total


def measure_peak(vae: nn.Module, discriminator: nn.Module, batch_size: int, size: int) -> int:
    """The peak of CUDA's allocator over three steps of both optimizers, without the frozen networks."""
    models = [vae.to("cuda"), discriminator.to("cuda")]
    optimizers = [torch.optim.AdamW(model.parameters(), 1e-4) for model in models]
    images = torch.rand(batch_size, 3, size, size, device="cuda") * 2 - 1
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        # The tokenizer's loss needs the discriminator, but no gradients of its weights.
        discriminator.requires_grad_(False)
        with torch.autocast("cuda", torch.bfloat16):
            reconstruction = reconstruct(vae, images)
            loss = (reconstruction.float() - images).abs().mean() + 0.1 * adversarial_loss(
                discriminator(reconstruction)
            )
        loss.backward()
        # The discriminator's own loss.
        discriminator.requires_grad_(True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = hinge_discriminator_loss(discriminator(images), discriminator(reconstruction.detach()))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return torch.cuda.max_memory_allocated()


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--recipe", type=Path, default=ROOT / "configs/tokenizer/favae_f16d32.yaml")
    parser.add_argument("--batch-size", type=int, default=8)
    arguments = parse_arguments(parser, "training_memory.json", argv)

    config = load_config(TokenizerConfig, arguments.recipe)
    size, batch_size = config.train.resolution, arguments.batch_size
    images = torch.rand(1, 3, size, size) * 2 - 1
    frozen = frozen_bytes(config)
    result = environment() | {"recipe": arguments.recipe.stem, "resolution": size, "batch_size": batch_size}
    for name in ("without_gradient_checkpointing", "with_gradient_checkpointing"):
        vae, discriminator = build_model(config.model), PatchDiscriminator()
        if name.startswith("with_"):
            vae.enable_gradient_checkpointing()
        weights = 16 * sum(p.numel() for model in (vae, discriminator) for p in model.parameters())
        activations = batch_size * count_activations(vae, discriminator, images)
        result[name] = {
            "weights_gradients_moments_gb": weights / 1e9,
            "activations_gb": activations / 1e9,
            "frozen_networks_gb": frozen / 1e9,
            "counted_gb": (weights + activations + frozen) / 1e9,
        }
        if torch.cuda.is_available():
            result[name]["measured_gb"] = measure_peak(vae, discriminator, batch_size, size) / 1e9
        for key, value in result[name].items():
            print(f"{name:32} {key:30} {value:6.2f}")
    write_result(arguments.output, result)


if __name__ == "__main__":
    main()
