"""What both training scripts share: the run folder, resuming, logging, and steps that are skipped."""

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterable
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration, set_seed
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from favae.data.stream import TrainingStream
from favae.distributed import on_cpu
from favae.errors import ConfigError, FavaeError, NonFiniteError
from favae.files import atomic_path, write_text
from favae.training.checkpoints import STATE_FILE, Checkpointer, Ema, find_checkpoints
from favae.training.config import RunConfig, TrainConfig, to_yaml
from favae.training.sharding import is_sharded

logger = logging.getLogger(__name__)

# What may differ between a run and its continuation without making it another run.
FREE_KEYS = {"resume", "output", "evaluation"}
FREE_TRAIN_KEYS = {
    "steps",
    "num_workers",
    "log_every",
    "sample_every",
    "checkpoint_every",
    "checkpoints_total_limit",
    "max_skipped_steps",
    "tracker",
}


def make_accelerator(train: TrainConfig, folder: Path) -> Accelerator:
    # The discriminator's batch statistics are not used in training, and broadcasting them between its two forward
    # passes would change tensors that the backward pass still needs.
    parallel = DistributedDataParallelKwargs(broadcast_buffers=False)
    return Accelerator(
        cpu=on_cpu(),
        mixed_precision=train.mixed_precision,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        log_with=train.tracker,
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "logs")),
        kwargs_handlers=[parallel],
    )


class Run:
    """One training run and its folder: config.yaml, metrics.jsonl, checkpoints/, samples/, logs/, final/.

    Call order: create (seeds, refuses a folder that holds another run), `add` each model, `prepare`, `resume`; then for
    each batch `optimise` and `end_step`; at the end `finish`. The model that is the point of the run is "generator".

    Args:
        config: resolved.
    Raises:
        ConfigError: if the folder holds a run with other settings.
    """

    def __init__(self, config: RunConfig):
        self.config = config
        self.train: TrainConfig = config.train
        self.folder = Path(config.output)
        self.accelerator = make_accelerator(self.train, self.folder)
        self.step = 0
        self.seconds = 0.0
        self.skipped = 0
        self._skipped_in_a_row = 0
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self.ema: Ema | None = None
        self._trained: dict[str, tuple] = {}  # name: (model, optimisers, their schedules)
        self.checkpoint = self._checkpoint_to_resume()
        set_seed(config.seed)

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def _checkpoint_to_resume(self) -> Path | None:
        resume = self.config.resume
        checkpoints = find_checkpoints(self.folder / "checkpoints")
        if resume == "never":
            if checkpoints:
                raise ConfigError(f"{self.folder} holds a run already; choose another output, or resume=auto")
            return None
        if resume != "auto":
            if not (Path(resume) / STATE_FILE).is_file():
                raise ConfigError(f"resume: {resume} is not a checkpoint; it is auto, never, or a step-N folder")
            if checkpoints:
                raise ConfigError(
                    f"{self.folder} holds a run already: resume=auto goes on with it, another output with {resume}"
                )
            return Path(resume)
        if not checkpoints:
            return None
        changed = changed_settings(self.config, self.folder / "config.yaml")
        if changed:
            raise ConfigError(
                f"{self.folder} holds a run with other settings ({', '.join(changed)}); choose another output, "
                f"or go on from its last checkpoint elsewhere with resume={checkpoints[-1][1]} output=..."
            )
        return checkpoints[-1][1]

    # ------------------------------------------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        model: nn.Module,
        learning_rate: float,
        first_step: int = 0,
        groups: list[dict] | None = None,
        matrices: list[nn.Parameter] = (),
    ) -> None:
        """A model to train, with an AdamW optimiser and a schedule of its own, which begins at `first_step`.

        `groups` are the optimiser's parameter groups; None puts all parameters into one, but for `matrices`, which
        get Muon (Jordan et al., 2024), with updates of AdamW's size, so that the learning rate serves both.
        """
        train, left_out = self.train, {id(parameter) for parameter in matrices}
        rest = groups or [p for p in model.parameters() if id(p) not in left_out]
        optimizers = [torch.optim.AdamW(rest, learning_rate, betas=tuple(train.betas), weight_decay=train.weight_decay)]
        if matrices:
            optimizers.append(
                torch.optim.Muon(
                    matrices, learning_rate, weight_decay=train.weight_decay, adjust_lr_fn="match_rms_adamw"
                )
            )
        schedules = [
            get_scheduler(
                train.lr_scheduler,
                optimizer,
                num_warmup_steps=train.lr_warmup_steps,
                num_training_steps=max(1, train.steps - first_step),
                num_cycles=train.lr_num_cycles,
            )
            for optimizer in optimizers
        ]
        self._trained[name] = (model, optimizers, schedules)

    def prepare(self, modules: dict[str, nn.Module], averaged: nn.Module) -> dict[str, nn.Module]:
        """Distribution, averaging and checkpointing for the models that were added.

        Args:
            modules: what checkpoints hold in loadable form, by name.
            averaged: the model whose weights are averaged, if `train.ema_decay` is not 0.
        Returns:
            The models by name, wrapped for the processes there are.
        """
        prepare = self.accelerator.prepare
        # A prepared schedule would step once per process.
        sharded = {}
        for name, (model, optimizers, schedules) in self._trained.items():
            if is_sharded(model):  # autocast, but no second distribution
                model = self.accelerator.prepare_model(model, evaluation_mode=True)
                sharded[name] = (model, optimizers)
            else:
                model, *optimizers = prepare(model, *optimizers)
            self._trained[name] = (model, optimizers, schedules)
            self.accelerator.register_for_checkpointing(*schedules)
        if self.train.ema_decay:
            self.ema = Ema(averaged, self.train.ema_decay, self.device)
        self.checkpointer = Checkpointer(
            self.accelerator,
            self.folder / "checkpoints",
            modules,
            self.ema,
            self.train.checkpoints_total_limit,
            sharded,
        )
        return {name: model for name, (model, _, _) in self._trained.items()}

    def resume(self) -> None:
        """Restores the checkpoint there is, or seeds each process for itself; then opens the logs."""
        # Model weights were drawn from the same seed everywhere; what follows differs by process.
        set_seed(self.config.seed, device_specific=True)
        if self.checkpoint is not None:
            try:
                state = self.checkpointer.load(self.checkpoint)
            except FavaeError:
                raise
            except (OSError, RuntimeError, ValueError, KeyError) as error:
                reason = str(error).splitlines()[0]
                raise ConfigError(f"resume: {self.checkpoint} does not fit these settings ({reason})") from error
            self.step, self.seconds, self.skipped = state["step"], state["seconds"], state["skipped"]
        self.accelerator.wait_for_everyone()  # nobody writes before everybody has looked
        if self.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / "config.yaml", to_yaml(self.config))
            self._drop_metrics_after(self.step)
        if self.train.tracker:
            self.accelerator.init_trackers(self.folder.name)
        self._started = time.perf_counter() - self.seconds
        self._bar = tqdm(total=self.train.steps, initial=self.step, disable=not self.is_main, desc=self.folder.name)

    def _drop_metrics_after(self, step: int) -> None:
        """What a killed run logged beyond its last checkpoint will be logged again."""
        file = self.folder / "metrics.jsonl"
        if file.exists():
            lines = [line for line in file.read_text().splitlines() if line.endswith("}")]  # the last may be torn
            write_text(file, "".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step))

    def batches(self, dataset: Dataset, until: int | None = None) -> Iterable[dict]:
        """This process's micro-batches from the current step on, to step `until` or the last, on its device."""
        until = self.train.steps if until is None else min(until, self.train.steps)
        if self.step >= until:
            return
        stream = TrainingStream(dataset, self.config.seed)
        loader = stream.batches(
            self.train.batch_size,
            self.step * self.train.gradient_accumulation_steps,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.train.num_workers,
        )
        for batch in loader:
            if self.step >= until:
                return
            yield {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    def optimise(self, name: str, loss: Tensor) -> bool:
        """Backward, and at the end of an accumulation the optimiser's step, unless the gradient is not finite.

        Returns:
            False if the step was skipped. All processes decide alike: they look at the same summed gradient.
        """
        accelerator = self.accelerator
        model, optimizers, schedules = self._trained[name]
        accelerator.backward(loss)
        if not accelerator.sync_gradients:
            return True
        norm = accelerator.clip_grad_norm_(model.parameters(), self.train.max_grad_norm or math.inf)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        finite = bool(torch.isfinite(torch.as_tensor(norm)))
        for optimizer, schedule in zip(optimizers, schedules):
            if (
                finite or accelerator.scaler is not None
            ):  # a gradient scaler skips the step itself, and lowers its scale
                optimizer.step()
            if finite:
                schedule.step()
            optimizer.zero_grad(set_to_none=True)
        return finite

    def end_step(self, terms: dict[str, Tensor], finite: bool) -> bool:
        """Bookkeeping after each micro-step; True when an optimiser step is complete.

        Args:
            terms: what to log, detached scalars.
            finite: whether `optimise` took its step.
        Raises:
            NonFiniteError: after more than `train.max_skipped_steps` skipped steps in a row.
        """
        if not self.accelerator.sync_gradients:
            return False
        self.step += 1
        self._bar.update()
        if finite:
            self._skipped_in_a_row = 0
            if self.ema is not None:
                self.ema.step()
            self._count += 1
            for name, value in terms.items():
                self._sums[name] = self._sums.get(name, 0) + value.detach()
        else:
            self._skip(terms)
        if self.step % self.train.log_every == 0 or self.step == self.train.steps:
            self._log()
        return True

    def _skip(self, terms: dict[str, Tensor]) -> None:
        self.skipped += 1
        self._skipped_in_a_row += 1
        bad = [name for name, value in terms.items() if not torch.isfinite(value)]
        where = ", ".join(bad) or "the gradient"
        logger.warning("step %d skipped: %s is not finite (%d so far)", self.step, where, self.skipped)
        if self._skipped_in_a_row > self.train.max_skipped_steps:
            checkpoints = find_checkpoints(self.folder / "checkpoints")
            good = str(checkpoints[-1][1]) if checkpoints else "none was written"
            raise NonFiniteError(
                f"step {self.step}: {where} has not been finite for {self._skipped_in_a_row} steps; "
                f"the last good checkpoint: {good}"
            )

    def _log(self) -> None:
        self.seconds = time.perf_counter() - self._started
        names = sorted(self._sums)
        values = torch.stack([self._sums[name] / max(self._count, 1) for name in names]) if names else torch.zeros(0)
        values = self.accelerator.reduce(values.to(self.device), "mean").tolist()
        record = {name: value for name, value in zip(names, values)}
        record["learning_rate"] = self._trained["generator"][2][0].get_last_lr()[0]
        self._bar.set_postfix({name: f"{value:.3g}" for name, value in record.items()})
        record |= {"skipped": self.skipped, "seconds": round(self.seconds, 2)}
        if self.is_main:
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": self.step, **record}) + "\n")
        if self.train.tracker:
            self.accelerator.log(record, step=self.step)
        self._sums, self._count = {}, 0

    def epoch(self, dataset: Dataset) -> float:
        """Passes over the data so far."""
        images = self.step * self.train.batch_size * self.train.gradient_accumulation_steps
        return images * self.accelerator.num_processes / len(dataset)

    def averaged(self) -> contextlib.AbstractContextManager:
        """The averaged weights for the length of a block, if an average is kept."""
        return contextlib.nullcontext() if self.ema is None else self.ema

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps (0: never) is due now."""
        return every > 0 and (self.step % every == 0 or self.step == self.train.steps)

    def save_checkpoint(self) -> None:
        self.seconds = time.perf_counter() - self._started
        self.checkpointer.save(self.step, {"seconds": self.seconds, "skipped": self.skipped})

    def finish(self, save) -> None:
        """Writes final/ with `save(folder)` on the main process, complete or not at all, and closes the logs."""
        if self.is_main:
            with atomic_path(self.folder / "final") as folder:
                save(folder)
        self.accelerator.wait_for_everyone()
        self._bar.close()
        self.accelerator.end_training()


def changed_settings(config: RunConfig, file: Path) -> list[str]:
    """Keys in which a resolved config differs from the one a run folder holds, beyond those that may."""
    if not file.is_file():
        return []
    old, new = yaml.safe_load(file.read_text()), yaml.safe_load(to_yaml(config))
    changed = []
    for section in sorted(set(old) | set(new)):
        before, after = old.get(section), new.get(section)
        if section in FREE_KEYS or before == after:
            continue
        if not isinstance(before, dict) or not isinstance(after, dict):
            changed.append(section)
            continue
        keys = sorted(key for key in set(before) | set(after) if before.get(key) != after.get(key))
        changed += [f"{section}.{key}" for key in keys if not (section == "train" and key in FREE_TRAIN_KEYS)]
    return changed
