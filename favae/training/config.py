"""What the schemas of both trainings share; how a recipe becomes settings: defaults <- YAML file <- `key=value`."""

import importlib.util
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass

from favae.errors import ConfigError
from favae.ranges import (
    Count,
    Decay,
    Positive,
    Rate,
    Seed,
    Step,
    Text,
    Weight,
    Workers,
)
from favae.training.recipes import read_settings
from favae.training.validation import STRICT, validate


@dataclass(config=STRICT)
class TrainConfig:
    """Step counts are optimizer steps; batch_size is per process and per micro-batch."""

    steps: Count = 100_000
    batch_size: Count = 8
    gradient_accumulation_steps: Count = 1
    learning_rate: Rate = 1e-4
    optimizer: Literal["adamw", "muon"] = "adamw"  # "muon": for matrices (see docs/methods.md), AdamW for the rest
    betas: Annotated[list[Decay], Field(min_length=2, max_length=2)] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: Weight = 0.0
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts"] = (
        "constant_with_warmup"
    )
    lr_warmup_steps: Step = 0
    lr_num_cycles: Count = 1  # of cosine_with_restarts
    max_grad_norm: Positive | None = None
    ema_decay: Decay = 0.0  # 0: no average is kept
    ema_warmup: bool = True  # the decay is at most t / (9 + t) in step t; false: constant, as in most published code
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    gradient_checkpointing: bool = False
    compile: bool = False  # each block with torch.compile
    shard: bool = False  # parameters, optimizer and EMA divided among the processes (FSDP)
    num_workers: Workers = 4
    log_every: Count = 100
    sample_every: Step = 5_000  # 0: never
    checkpoint_every: Count = 5_000
    checkpoints_total_limit: Count | None = 3
    max_skipped_steps: Step = 20  # non-finite steps in a row after which the run ends
    tracker: Literal["tensorboard", "wandb"] | None = "tensorboard"

    def __post_init__(self):
        if self.lr_scheduler == "constant" and self.lr_warmup_steps:
            raise ConfigError("train.lr_warmup_steps is not for train.lr_scheduler=constant: constant_with_warmup")
        if self.lr_num_cycles != 1 and self.lr_scheduler != "cosine_with_restarts":
            raise ConfigError("train.lr_num_cycles is for train.lr_scheduler=cosine_with_restarts")
        if self.tracker == "wandb" and importlib.util.find_spec("wandb") is None:
            raise ConfigError("train.tracker=wandb needs the package wandb: pip install wandb")
        if self.optimizer == "muon" and self.mixed_precision == "fp16":
            raise ConfigError(
                "train.mixed_precision=fp16 has one gradient scale, and train.optimizer=muon two optimizers; use bf16"
            )
        if self.shard and self.mixed_precision == "fp16":
            raise ConfigError("train.shard has no gradient scaler for train.mixed_precision=fp16; use bf16")


@dataclass(config=STRICT)
class RunConfig:
    output: Text | None = None  # run folder; None: runs/<name of the recipe>
    seed: Seed = 0
    resume: Text = "auto"  # "auto": continue from the newest complete checkpoint; "never"; or a checkpoint's folder
    model: dict[str, Any] = field(default_factory=dict)  # name, and the arguments of its constructor
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def milestones(self) -> dict[str, int]:
        """Optimizer steps by key: of `start_step` the one after which something begins, of others that of its end."""
        return {"train.lr_warmup_steps": self.train.lr_warmup_steps}

    @property
    def milestones_not_reached(self) -> dict[str, int]:
        """Those for which the training is too short."""
        last = self.train.steps
        return {key: step for key, step in self.milestones.items() if step + key.endswith("start_step") > last}


Config = TypeVar("Config", bound=RunConfig)


def load_config(schema: type[Config], file: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Defaults <- YAML file <- `key=value` overrides, as dataclasses.

    Raises:
        ConfigError: for a missing file, an unknown key, a wrong type or an impossible value.
    """
    settings, texts = read_settings(file, overrides)
    config = validate(schema, settings, texts=texts)
    config.output = config.output or f"runs/{Path(file).stem}"
    return config


def to_yaml(config: RunConfig) -> str:
    return yaml.safe_dump(TypeAdapter(type(config)).dump_python(config, mode="json"), sort_keys=False)
