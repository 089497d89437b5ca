"""Tiny models and data that many tests share."""

import importlib
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks; the tests compare with the CPU's numbers

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from PIL import Image

from favae import AutoencoderKLFA, cli
from favae.data.images import ImageDataset
from favae.data.latent_writing import write_latent_cache
from favae.data.sources import open_source
from favae.eval import features
from favae.training.run import Run

ROOT = Path(__file__).resolve().parent.parent

TINY_FAVAE = {
    "block_out_channels": (8, 8, 16),
    "high_block_out_channels": (8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 6,
    "high_latent_channels": 2,
    "shortcut": None,  # it would silence the networks at the start
    "sample_size": 16,
}
TINY_VQ = {
    "block_out_channels": (8, 8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 6,
    "codebook_size": 32,
    "sample_size": 16,
}
TINY_HYPERPRIOR = {
    "block_out_channels": (8, 8, 16),
    "num_residual_blocks": 1,
    "latent_channels": 6,
    "hyper_channels": 8,
}
TINY_UNET = {
    "sample_size": 4,
    "in_channels": 6,
    "out_channels": 6,
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "num_class_embeds": 4,
}
TINY_LIGHTNINGDIT = {
    "sample_size": 4,
    "in_channels": 6,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_classes": 3,
}


TINY_CAT = {
    "sample_size": 4,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "hidden_size": 16,
    "text_dim": 8,
    "codebook_size": 32,
}


torch.set_num_threads(1)  # tiny tensors; threads would only wait for each other
features.FEATURE_SIZE = 64  # instead of 224: a twelfth of the work


def pytest_collection_modifyitems(items):
    # The longest first, so that no worker waits.
    items.sort(key=lambda item: item.path.parent.name not in ("training", "tests"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def tiny_favae() -> AutoencoderKLFA:
    return AutoencoderKLFA(**TINY_FAVAE).eval()


@pytest.fixture
def tiny_kl() -> AutoencoderKL:
    return make_tiny_kl()


def make_tiny_kl() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        norm_num_groups=4,
        latent_channels=6,
        sample_size=16,
    ).eval()


def write_images(folder: Path, classes: int = 3, per_class: int = 4, size: tuple[int, int] = (24, 20)) -> Path:
    """An ImageFolder of smooth random images."""
    rng = np.random.default_rng(0)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for i in range(per_class):
            small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            small.resize(size, Image.Resampling.BICUBIC).save(folder / f"class{label}" / f"{i}.png")
    return folder


@pytest.fixture
def image_folder(tmp_path) -> Path:
    return write_images(tmp_path / "images")


def tiny_tokenizer_recipe(folder: Path, images: str | Path) -> Path:
    """A recipe that trains in seconds, with every term that needs no weights."""
    file = folder / "tokenizer.yaml"
    file.write_text(
        f"""
model: {{name: AutoencoderKLFA, block_out_channels: [8, 8, 16], high_block_out_channels: [8, 8], layers_per_block: 1,
  norm_num_groups: 4, latent_channels: 6, high_latent_channels: 2, sample_size: 16}}
data: {{path: {images}}}
loss: {{adversarial: {{weight: 0.1, start_step: 3, channels: 8, num_layers: 1}}}}
train: {{resolution: 16, batch_size: 2, steps: 8, learning_rate: 1.0e-3, num_workers: 0, log_every: 1, sample_every: 4,
  checkpoint_every: 2, ema_decay: 0.9, lr_scheduler: cosine, lr_warmup_steps: 2, tracker: null}}
"""
    )
    return file


def tiny_generator_recipe(folder: Path, latents: str | Path, tokenizer: str | Path) -> Path:
    file = folder / "generator.yaml"
    file.write_text(
        f"""
model: {{name: LightningDiTTransformer2DModel, sample_size: 4, in_channels: 6, num_layers: 2, num_attention_heads: 2,
  attention_head_dim: 8, num_classes: 3}}
data: {{latents: {latents}, tokenizer: {tokenizer}}}
sampling: {{num_inference_steps: 3, num_images: 6}}
train: {{batch_size: 4, steps: 6, num_workers: 0, log_every: 1, sample_every: 3, checkpoint_every: 2, ema_decay: 0.9,
  tracker: null}}
"""
    )
    return file


class Payload:
    """Its pickle writes a file when it is opened as pickles are."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "executed")


@pytest.fixture
def tiny_cache(tmp_path, image_folder, tiny_favae):
    """A folder with tokenizer/ and its latents in cache/."""
    tiny_favae.save_pretrained(tmp_path / "tokenizer")
    write_latent_cache(tiny_favae, ImageDataset(open_source(str(image_folder)), 16), tmp_path / "cache")
    return tmp_path


def run(*command: str | Path, processes: int = 1, check: bool = True) -> subprocess.CompletedProcess:
    """Runs a script or `-m module` of the project as a user would, on one thread per process."""
    result = subprocess.run(
        launched(command, processes), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert not check or result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result


def command(*words: str | Path) -> None:
    """Runs a subcommand of `favae` in this process, which is much quicker than `run`."""
    AcceleratorState._reset_state(reset_partial_state=True)  # as a new process would find it
    cli.main([str(word) for word in words])


def command_error(*words: str | Path) -> str:
    """The line that a subcommand of `favae` prints when it fails."""
    with pytest.raises(SystemExit) as error:
        command(*words)
    message = str(error.value.code)
    assert message.startswith("error: ") and len(message.splitlines()) == 1
    return message


def command_in_processes(count: int, *words: str | Path) -> list[str | int]:
    """Runs a subcommand of `favae` in processes that share the work, as torchrun starts them, and returns what each
    exits with: 0 or its message. They are forks of this process, which has imported everything already."""
    return _in_processes(multiprocessing.get_context("fork"), count, words)


def _in_processes(context: Any, count: int, words: tuple) -> list[str | int]:
    processes, results = _start_processes(context, count, words)
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0, f"a process ended with {process.exitcode}"
    return [code for _, code in sorted(results.get() for _ in processes)]


def _start_processes(context: Any, count: int, words: tuple) -> tuple[list, Any]:
    """The processes, and a queue with (rank, what it exits with) of each that has ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = context.SimpleQueue()
    arguments = (count, port, [str(word) for word in words], results)
    processes = [context.Process(target=_be_one_of, args=(rank, *arguments), daemon=True) for rank in range(count)]
    for process in processes:
        process.start()
    return processes, results


def _be_one_of(rank: int, count: int, port: int, words: list[str], results) -> None:
    if count > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["OMP_NUM_THREADS"] = "1"  # as in the other tests, or accelerate gives each process all cores
    AcceleratorState._reset_state(reset_partial_state=True)  # of the process this one is a fork of
    try:
        cli.main(words)
        code = 0
    except SystemExit as error:
        code = error.code
    results.put((rank, code))
    if torch.distributed.is_initialized():  # trainings end it themselves
        torch.distributed.destroy_process_group()


def train_in_processes(count: int, script: str, *arguments: str | Path) -> list[str | int]:
    """Runs "train_tokenizer" or "train_generator" as `command_in_processes` does."""
    return _in_processes(_forkserver(), count, (script.replace("_", "-"), *arguments))


def kill_when(appears: Path, script: str, *arguments: str | Path, processes: int = 1) -> None:
    """Starts a training and kills all its processes, without warning, as soon as a path is there."""
    started, _ = _start_processes(_forkserver(), processes, (script.replace("_", "-"), *arguments))
    try:
        wait_for(appears, lambda: all(process.is_alive() for process in started))
    finally:
        for process in started:
            process.kill()
            process.join()


def wait_for(path: Path, alive: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 180
    while not path.exists():
        assert alive() and time.monotonic() < deadline, "it ended before it could be killed"
        time.sleep(0.001)


def _forkserver() -> Any:
    """Processes that are forks of one that has imported everything and computed nothing: autograd does not survive a
    fork."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["favae.cli", "train_tokenizer", "train_generator", "conftest"])
    return context


def train(script: str, *arguments: str | Path) -> None:
    """Runs "train_tokenizer" or "train_generator" in this process, which is much quicker than `run`."""
    AcceleratorState._reset_state(reset_partial_state=True)  # as a new process would find it
    importlib.import_module(script).main([str(argument) for argument in arguments])


def checkpointed_blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Enables gradient checkpointing. The list gets each block that will be computed twice."""
    model.enable_gradient_checkpointing()
    blocks = []
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is not None:
            module._gradient_checkpointing_func = lambda block, *inputs, function=function: (
                blocks.append(block) or function(block, *inputs)
            )
    return blocks


def weights(folder: Path) -> dict[str, bytes]:
    """All files of weights below a folder, of which there is at least one."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}
    assert found
    return found


def steps_trained(script: str, *arguments: str | Path) -> int:
    """Trains, and says how many steps that took: a run that begins anew ends as one that goes on does."""
    with mock.patch.object(Run, "end_step", autospec=True, side_effect=Run.end_step) as ended:
        train(script, *arguments)
    return ended.call_count


def train_whole_and_in_parts(script: str, folder: Path, *arguments: str | Path, steps: int, first: int) -> Path:
    """Trains in one go, and in two; both end with the same weights. Returns the run folder of the former."""
    whole, parts = folder / "whole", folder / "parts"
    train(script, *arguments, f"output={whole}", f"train.steps={steps}")
    train(script, *arguments, f"output={parts}", f"train.steps={first}")
    assert steps_trained(script, *arguments, f"output={parts}", f"train.steps={steps}") == steps - first
    assert weights(whole / "final") == weights(parts / "final")
    return whole


def refusal(script: str, *arguments: str | Path) -> str:
    """What a training script says when it refuses its arguments: one line."""
    with pytest.raises(SystemExit) as error:
        train(script, *arguments)
    message = str(error.value.code)
    assert message.startswith("error: ") and len(message.splitlines()) == 1
    return message


def launched(command: tuple, processes: int) -> list[str]:
    """The command line of a script or `-m module`, with torchrun where there are several processes."""
    launcher = [sys.executable]
    if processes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        launcher += ["--master_port", "0", "--standalone"]
        if command[0] != "-m":
            command = (ROOT / command[0], *command[1:])
    return [*launcher, *map(str, command)]


def environment() -> dict[str, str]:
    """That of a user's process, on one thread, without a network."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
