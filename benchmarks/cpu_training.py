#!/usr/bin/env python
"""What makes a tokenizer's training step faster on a CPU: memory format, threads, batch size, precision.

    python -m benchmarks.cpu_training               (the demo's two recipes at 64 px: about ten minutes)
    python -m benchmarks.cpu_training --only threads processes --rounds 40

A step is the forward pass, L1 + KL, the backward pass and AdamW; the slice `parts` adds the other parts of the demo's
step. Every variant takes one step in turn in every round, and is compared with the first variant of its slice: by CPU
time where all variants have one thread, by the clock elsewhere; fastest rounds are what other work on the machine
disturbs least. Unless its name says otherwise, a variant has one thread, batches of 4 and float32. The slice
`processes` compares two ways to train both models: one after the other with two threads, and side by side, each in a
process of its own with one thread. Its time is that until both have taken their steps.
Writes docs/results/cpu_training.json.
"""

import json
import statistics

import torch
import torch.nn.functional as F
from torch import multiprocessing

from benchmarks.timing import (
    ROOT,
    environment,
    make_parser,
    parse_arguments,
    speedup,
    time_paired,
    with_range,
    write_result,
)
from favae.foundation import FoundationModel
from favae.losses.adversarial import PatchDiscriminator, adversarial_loss, hinge_discriminator_loss
from favae.losses.alignment import vision_foundation_alignment
from favae.training.config import load_config
from favae.training.models import build_model
from favae.training.tokenizer_config import TokenizerConfig

RECIPES = ("photos_favae", "photos_vavae")
RESOLUTION = 64


class Trainer:
    """One model with its optimizer, and training steps on random images.

    Args:
        recipe: a name in configs/tokenizer.
        threads: of torch, for this trainer's steps.
        fused: AdamW with one kernel for all parameters.
        alignment, adversarial: whether the step has the demo's other losses.
    """

    def __init__(
        self,
        recipe: str,
        batch_size: int = 4,
        *,
        threads: int = 1,
        channels_last: bool = False,
        bf16: bool = False,
        fused: bool = False,
        alignment: bool = False,
        adversarial: bool = False,
    ):
        torch.manual_seed(0)
        config = load_config(TokenizerConfig, ROOT / f"configs/tokenizer/{recipe}.yaml")
        self.threads, self.bf16 = threads, bf16
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.vae = build_model(config.model).to(memory_format=memory_format)
        self.images = (torch.rand(batch_size, 3, RESOLUTION, RESOLUTION) * 2 - 1).to(memory_format=memory_format)
        self.teacher = self.projector = self.discriminator = None
        parameters = [*self.vae.parameters()]
        if alignment:
            self.teacher = FoundationModel("efficientnet-lite0")
            self.projector = torch.nn.Conv2d(config.model["latent_channels"], self.teacher.channels, 1, bias=False)
            parameters += self.projector.parameters()
        if adversarial:
            self.discriminator = PatchDiscriminator(channels=config.loss.adversarial.channels)
            self.discriminator_optimizer = torch.optim.AdamW(self.discriminator.parameters(), fused=fused)
        self.optimizer = torch.optim.AdamW(parameters, fused=fused)

    def forward(self, images: torch.Tensor) -> tuple:
        posterior = self.vae.encode(images).latent_dist
        latents = posterior.sample()
        return latents, posterior.kl(), self.vae.decode(latents).sample

    def step(self) -> None:
        torch.set_num_threads(self.threads)
        images = self.images
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            # Forward pass and losses.
            latents, kl, reconstruction = self.forward(images)
            loss = F.l1_loss(reconstruction.float(), images) + 1e-6 * kl.mean() / images[0].numel()
            if self.teacher is not None:
                features = self.teacher(images, latents.shape[-2:])
                loss = loss + 0.05 * vision_foundation_alignment(self.projector(latents), features)
            if self.discriminator is not None:
                self.discriminator.requires_grad_(False)
                loss = loss + 0.05 * adversarial_loss(self.discriminator(reconstruction))
        # Backward pass and step.
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        # Step of the discriminator.
        if self.discriminator is not None:
            self.discriminator.requires_grad_(True)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                logits = self.discriminator(images), self.discriminator(reconstruction.detach())
            hinge_discriminator_loss(*logits).backward()
            self.discriminator_optimizer.step()
            self.discriminator_optimizer.zero_grad()


SLICES: dict[str, dict[str, dict]] = {
    "memory_format": {"contiguous": {}, "channels_last": {"channels_last": True}},
    "threads": {"one": {}, "two": {"threads": 2}, "two_channels_last": {"threads": 2, "channels_last": True}},
    "batch_size": {str(size): {"batch_size": size, "channels_last": True} for size in (4, 1, 2, 8, 16, 32)},
    "precision": {"float32": {}, "bf16": {"bf16": True}, "bf16_channels_last": {"bf16": True, "channels_last": True}},
    "optimizer": {"foreach": {}, "fused": {"fused": True}},
    "parts": {"l1_and_kl": {}, "with_alignment": {"alignment": True}, "with_discriminator": {"adversarial": True}},
}  # fmt: skip


def compare(recipe: str, variants: dict[str, dict], rounds: int) -> dict[str, dict]:
    """Each variant's seconds per image, and its speed relative to the first variant's."""
    trainers = {name: Trainer(recipe, **options) for name, options in variants.items()}
    timings = time_paired({name: trainer.step for name, trainer in trainers.items()}, rounds=rounds, warmup=2)
    # Threads that wait count as CPU time, too; with one thread, other programs change it less than time on the clock.
    one_thread = all(trainer.threads == 1 for trainer in trainers.values())
    seconds = {name: timing.cpu_seconds if one_thread else timing.seconds for name, timing in timings.items()}
    return summarize({name: [s / len(trainers[name].images) for s in values] for name, values in seconds.items()})


def summarize(per_image: dict[str, list[float]]) -> dict[str, dict]:
    """What is written of each variant, from its seconds per image in each round."""
    reference = next(iter(per_image.values()))
    return {
        name: {
            "milliseconds_per_image": 1e3 * statistics.median(values),
            **speedup(values, reference),
            "speedup_of_fastest_round": min(reference) / min(values),
        }
        for name, values in per_image.items()
    }


def compare_processes(rounds: int, threads: int) -> dict[str, dict]:
    """Both models one after the other with all threads, against both at the same time with one thread each."""
    context = multiprocessing.get_context("spawn")
    workers = {}
    for recipe in RECIPES:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(recipe, theirs), daemon=True)
        process.start()
        workers[recipe] = (process, ours)
    trainers = [Trainer(recipe, threads=threads) for recipe in RECIPES]

    def one_process() -> None:
        for trainer in trainers:
            trainer.step()

    def side_by_side() -> None:
        for _, pipe in workers.values():
            pipe.send(True)
        for _, pipe in workers.values():
            pipe.recv()

    names = (f"one_process_of_{threads}_threads", f"{len(RECIPES)}_processes_of_1_thread")
    timings = time_paired(dict(zip(names, (one_process, side_by_side))), rounds=rounds, warmup=2)
    for process, pipe in workers.values():
        pipe.send(False)
        process.join()
    images = len(RECIPES) * len(trainers[0].images)
    return summarize({name: [s / images for s in timing.seconds] for name, timing in timings.items()})


def _work(recipe: str, pipe) -> None:
    """Takes a step whenever it is told True, and ends when it is told False."""
    trainer = Trainer(recipe)
    while pipe.recv():
        trainer.step()
        pipe.send(True)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--only", nargs="*", choices=[*SLICES, "processes"], default=[*SLICES, "processes"])
    parser.add_argument("--recipes", nargs="*", choices=RECIPES, default=RECIPES)
    arguments = parse_arguments(parser, "cpu_training.json", argv, rounds=20)

    # Slices that were measured before and are not asked for now stay in the file.
    result = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    result |= environment() | {"resolution": RESOLUTION}
    for name in arguments.only:
        if name == "processes":
            found = {"both": compare_processes(arguments.rounds, threads=len(RECIPES))}
        else:
            found = {recipe: compare(recipe, SLICES[name], arguments.rounds) for recipe in arguments.recipes}
        result[name] = {"rounds": arguments.rounds, "results": found}
        for recipe, variants in found.items():
            for variant, values in variants.items():
                print(
                    f"{name:14} {recipe:13} {variant:26} {values['milliseconds_per_image']:7.2f} ms per image, "
                    f"{with_range(values)}; fastest round {values['speedup_of_fastest_round']:.2f} times",
                    flush=True,
                )
        write_result(arguments.output, result)


if __name__ == "__main__":
    main()
