#!/usr/bin/env python
"""Memory of training a tokenizer at 256 px with bf16, counted; on a GPU measured as well.

    python benchmarks/training_memory.py                                   (favae_f16d32, batch 8)

Counted: what autograd keeps of one forward pass of the trainee and the discriminator (each storage once, batch 1 times
the batch size), the weights, gradients and two Adam moments of both in float32, and the frozen networks' weights. Not
counted: what a convolution needs for the time it runs, the allocator's gaps, and what LPIPS keeps. Writes
docs/results/training_memory.json.
"""

import argparse
import json
from pathlib import Path

import timm
import torch
import torchvision
from torch import nn

from favae.losses.adversarial import PatchDiscriminator, adversarial_loss, hinge_discriminator_loss
from favae.training.config import TokenizerConfig, load_config
from favae.training.models import build_model
from favae.training.tokenizer_losses import TokenizerLossConfig
from favae.training.tokenizer_module import TokenizerTrainingModule

ROOT = Path(__file__).resolve().parent.parent


def frozen_bytes(config: TokenizerConfig) -> int:
    """The float32 weights of the alignment target and of VGG16."""
    with torch.device("meta"):
        backbone = timm.create_model(config.loss.alignment.backbone, num_classes=0)
        vgg = torchvision.models.vgg16(weights=None).features
    return 4 * sum(p.numel() for model in (backbone, vgg) for p in model.parameters())


LOSSES = TokenizerLossConfig(kl=0.0)  # L1 alone


class Kept:
    """Counts the bytes of the storages that autograd keeps for the backward pass, beyond the weights."""

    def __init__(self, *modules: nn.Module):
        self.known = {p.untyped_storage().data_ptr() for module in modules for p in module.parameters()}
        self.bytes = 0
        self.held = []  # so that no address is used twice

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.known.add(storage.data_ptr())
            self.bytes += storage.nbytes()
            self.held.append(tensor)
        return tensor


def count(trainee: nn.Module, discriminator: nn.Module, images: torch.Tensor, checkpointing: bool) -> dict[str, int]:
    if checkpointing:
        trainee.vae.enable_gradient_checkpointing()
    kept = {}
    with torch.autocast("cpu", torch.bfloat16):
        counter = Kept(trainee)
        with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda tensor: tensor):
            reconstruction = trainee(images, LOSSES)[2]
        kept["trainee"] = counter.bytes
        counter = Kept(discriminator)
        with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda tensor: tensor):
            value = adversarial_loss(discriminator(reconstruction))
        kept["discriminator"] = counter.bytes
    del reconstruction, value, counter
    return kept


def measure(trainee: nn.Module, discriminator: nn.Module, batch: int, size: int) -> int:
    """The allocator's peak over three steps of both optimisers on a GPU, without the frozen networks."""
    models = [trainee.to("cuda"), discriminator.to("cuda")]
    optimizers = [torch.optim.AdamW(model.parameters(), 1e-4) for model in models]
    images = torch.rand(batch, 3, size, size, device="cuda") * 2 - 1
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        with torch.autocast("cuda", torch.bfloat16):
            discriminator.requires_grad_(False)
            loss, _, reconstruction, _ = trainee(images, LOSSES)
            loss = loss + 0.1 * adversarial_loss(discriminator(reconstruction))
        loss.backward()
        discriminator.requires_grad_(True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = hinge_discriminator_loss(discriminator(images), discriminator(reconstruction.detach()))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return torch.cuda.max_memory_allocated()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "configs/tokenizer/favae_f16d32.yaml")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--output", type=Path, default=ROOT / "docs/results/training_memory.json")
    arguments = parser.parse_args()
    config = load_config(TokenizerConfig, arguments.recipe)
    size = config.train.resolution
    images = torch.rand(1, 3, size, size) * 2 - 1
    frozen = frozen_bytes(config)
    result = {"recipe": arguments.recipe.stem, "resolution": size, "batch_size": arguments.batch_size}
    for checkpointing in (False, True):
        trainee = TokenizerTrainingModule(build_model(config.model), [LOSSES])
        discriminator = PatchDiscriminator()
        kept = count(trainee, discriminator, images, checkpointing)
        states = 16 * sum(p.numel() for model in (trainee, discriminator) for p in model.parameters())
        activations = arguments.batch_size * sum(kept.values())
        name = "with_gradient_checkpointing" if checkpointing else "without"
        result[name] = {
            "weights_gradients_moments_gb": states / 1e9,
            "activations_gb": activations / 1e9,
            "frozen_networks_gb": frozen / 1e9,
            "counted_gb": (states + activations + frozen) / 1e9,
        }
        if torch.cuda.is_available():
            result[name]["measured_gb"] = measure(trainee, discriminator, arguments.batch_size, size) / 1e9
            result[name]["gpu"] = torch.cuda.get_device_name()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
