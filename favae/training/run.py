"""The folder of a training run: settings, logs and checkpoints, and whether it can be continued."""

import contextlib
import itertools
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    gather_object,
    set_seed,
)
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from favae.data.sources import PHOTOS
from favae.data.stream import StreamedDataset, TrainingStream
from favae.distributed import LONGEST_WAIT, main_process_does, on_cpu
from favae.errors import CheckpointError, ConfigError, FolderInUse, NonFiniteError
from favae.files import append_text, atomic_path, lock_folder, read_json_lines, sync, write_text
from favae.precision import fast_dtype
from favae.signals import DeferredSignals, exception_of
from favae.training.checkpoints import (
    STATE_FILE,
    Checkpointer,
    find_checkpoints,
    find_damage,
    tidy,
)
from favae.training.config import RunConfig, to_yaml
from favae.training.optimization import Ema
from favae.training.sharding import is_sharded
from favae.training.validation import validate

logger = logging.getLogger(__name__)

OTHER_WAYS_TO_SHARD = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
# A run may be continued with other values of these.
SECTIONS_FREE_TO_CHANGE = {"resume", "output", "evaluation", "sampling"}
KEYS_FREE_TO_CHANGE = {
    "train.steps",
    "train.num_workers",
    "train.log_every",
    "train.sample_every",
    "train.checkpoint_every",
    "train.checkpoints_total_limit",
    "train.max_skipped_steps",
    "train.tracker",
    "data.num_images",
    "data.text_encoder",  # its weights are compared instead
}


def find_checkpoint_to_resume(config: RunConfig) -> Path | None:
    """The checkpoint that a run with these settings would continue from; None for a new run.

    Raises:
        ConfigError: if there is no such checkpoint, or if the output folder holds another run.
        CheckpointError: if it is damaged, or, with resume=auto, if all are.
    """
    folder = Path(str(config.output))
    checkpoints = find_checkpoints(folder / "checkpoints")
    holds_run = bool(checkpoints) or (folder / "final").exists()
    if config.resume == "auto" or (checkpoints and began_with(config, folder / "config.yaml")):
        changed = changed_settings(config, folder / "config.yaml") if holds_run else []
        if changed:
            advice = "choose another output"
            if checkpoints:
                advice += (
                    f", or continue from its last checkpoint elsewhere with resume={checkpoints[-1][1]} output=..."
                )
            raise ConfigError(f"{folder} holds a run with other settings ({', '.join(changed)}); {advice}")
        if holds_run and not checkpoints:
            raise ConfigError(f"{folder} holds a finished run without checkpoints; delete it, or choose another output")
        return newest_whole_checkpoint([path for _, path in checkpoints])
    if holds_run:
        raise ConfigError(f"{folder} holds a run already; resume=auto continues it, and another output begins anew")
    if config.resume == "never":
        return None
    if not (Path(config.resume) / STATE_FILE).is_file():
        raise ConfigError(f"resume: {config.resume} is not a checkpoint; it is auto, never, or a step-N folder")
    return newest_whole_checkpoint([Path(config.resume)])


def began_with(config: RunConfig, file: Path) -> bool:
    """Whether the same command has begun a run folder from a checkpoint elsewhere: it goes on like any other."""
    if config.resume == "never" or not file.is_file() or changed_settings(config, file):
        return False
    return yaml.safe_load(file.read_text()).get("resume") == config.resume


def newest_whole_checkpoint(checkpoints: Sequence[Path]) -> Path | None:
    """The last of these checkpoints whose files are as they were written; None if there are no checkpoints.

    A warning names damaged ones. Raises `CheckpointError` if all of them are.
    """
    damage = ""
    for path in reversed(checkpoints):
        found = find_damage(path)
        if found is None:
            return path
        damage = f"{path} is damaged ({found})"
        logger.warning("%s; the checkpoint before it is used", damage)
    if damage:
        raise CheckpointError(f"{damage}, and no whole checkpoint is before it; another output begins anew")
    return None


def changed_settings(config: RunConfig, file: Path) -> list[str]:
    """Keys in which a config differs from the one a run folder holds, except for those that are free to change."""
    if not file.is_file():
        return []
    try:
        old = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        old = None
    if not isinstance(old, dict):
        raise ConfigError(f"{file} is damaged; without it, the run continues with the settings that are given")
    with contextlib.suppress(ConfigError):  # of a setting that is no more
        old = yaml.safe_load(to_yaml(validate(type(config), old)))  # with the defaults of settings that are newer
    new = yaml.safe_load(to_yaml(config))
    changed = []
    for section in sorted((set(old) | set(new)) - SECTIONS_FREE_TO_CHANGE):
        before, after = old.get(section), new.get(section)
        if not isinstance(before, dict) or not isinstance(after, dict):
            changed += [section] if before != after else []
            continue
        keys = sorted(set(before) | set(after))
        changed += [f"{section}.{key}" for key in keys if not same_value(before.get(key), after.get(key))]
    return [key for key in changed if key not in KEYS_FREE_TO_CHANGE]


def same_value(before: object, after: object) -> bool:
    """Whether a setting is the same: by its value, or as another path of the same file or folder."""
    if before == after or PHOTOS in (before, after) or not isinstance(before, str) or not isinstance(after, str):
        return before == after
    return os.path.exists(before) and os.path.exists(after) and os.path.samefile(before, after)


def process_seed(seed: int, process: int) -> int:
    """Another seed for each process; not that of a neighboring seed's, whose runs would share their noise."""
    return (seed + 1_000_003 * process) % 2**32


class Run:
    """One training run and its folder: config.yaml, metrics.jsonl, checkpoints/, samples/, logs/, final/.

    It keeps settings, logs and checkpoints, and knows nothing of what a training step computes. Order of the calls:
    create (seeds, and refuses a folder that holds another run); build the models; `prepare`; `start`; for each batch of
    `batches`, a step and `end_step`; `finish`.

    Args:
        config: resolved.

    Attributes:
        accelerator: of accelerate. folder: of the run. step: optimizer steps so far.

    Raises:
        ConfigError: if the folder holds a run with other settings.
    """

    def __init__(self, config: RunConfig):
        self.config, self.train = config, config.train
        train = config.train
        self.folder = Path(str(config.output))
        self.checkpoint = find_checkpoint_to_resume(config)
        self._checkpoints_seen = find_checkpoints(self.folder / "checkpoints")
        self.accelerator = Accelerator(
            cpu=on_cpu(),
            mixed_precision=train.mixed_precision,
            gradient_accumulation_steps=train.gradient_accumulation_steps,
            log_with=train.tracker,
            project_config=ProjectConfiguration(project_dir=str(self.folder), logging_dir=str(self.folder / "logs")),
            # The discriminator's batch statistics are not used in training, and broadcasting them between its two
            # forward passes would change tensors that the backward pass still needs.
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False),
                InitProcessGroupKwargs(timeout=LONGEST_WAIT),
            ],
        )
        if self.accelerator.distributed_type in OTHER_WAYS_TO_SHARD:
            raise ConfigError(
                f"Accelerate is set to {self.accelerator.distributed_type.value}, which this training does not use; "
                "train.shard=true divides a model that one device does not hold"
            )
        if train.mixed_precision == "fp16" and self.device.type == "cpu":
            raise ConfigError("train.mixed_precision=fp16 needs a GPU; bf16 does not")
        if train.mixed_precision == "bf16" and fast_dtype(self.device.type) != torch.bfloat16 and self.is_main:
            logger.warning("this processor has to emulate bfloat16; train.mixed_precision=no may be many times as fast")
        if len(set(gather_object([str(self.checkpoint)]))) > 1:
            raise CheckpointError(
                f"the processes do not agree on the newest whole checkpoint of {self.folder}: look whether all of them "
                "can read it, and start again"
            )
        self.step = self.skipped = 0
        self._log_file = self.folder / "metrics.jsonl"
        self._signals = DeferredSignals()
        self._checkpoint_owed = False
        self._seconds = 0.0
        self._skipped_in_a_row = 0
        self._window: dict[str, list[Tensor]] = {}
        self._collected: list[dict[str, Tensor]] = []  # of the micro-batches of this step
        set_seed(config.seed)

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def prepare(
        self, module: nn.Module, optimizers: list[torch.optim.Optimizer]
    ) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
        """The module and its optimizers, wrapped for the processes and the precision there are."""
        if is_sharded(module):  # it is distributed already, and gets autocast alone
            return self.accelerator.prepare_model(module, evaluation_mode=True), optimizers
        module, *wrapped = self.accelerator.prepare(module, *optimizers)
        return module, wrapped

    def start(
        self,
        parts: Mapping[str, nn.Module],
        ema: Ema,
        optimizers: list[torch.optim.Optimizer],
        schedules: list[LambdaLR],
        data: dict | None = None,
    ) -> None:
        """Restores the checkpoint there is, or seeds each process for itself; then opens the logs.

        Args:
            parts: the trained modules by name, not wrapped: what a checkpoint holds.
            optimizers, schedules: all of them; the log shows the first one's learning rate.
            data: what the run is trained on, as JSON holds it.
        Raises:
            ConfigError: if the run goes on in its own folder and was trained on other data.
        """
        self._data = data
        self.schedules = schedules
        limit = self.train.checkpoints_total_limit
        self.checkpointer = Checkpointer(
            self.accelerator, self.folder / "checkpoints", parts, ema, schedules, limit, optimizers
        )
        # The models were initialized from the same seed everywhere. What follows differs between processes.
        set_seed(process_seed(self.config.seed, self.accelerator.process_index))
        if self.checkpoint is not None:
            state = self.checkpointer.load(self.checkpoint)
            self._compare_data(self.checkpoint, state.get("data"))
            self.step, self._seconds, self.skipped = state["step"], state["seconds"], state["skipped"]
        self._first_step = self._last_checkpoint = self.step
        self.accelerator.wait_for_everyone()  # nobody writes before everybody has looked
        main_process_does(self._prepare_folder)
        if self.train.tracker:
            self.accelerator.init_trackers(self.folder.name)
        self._started = time.perf_counter() - self._seconds
        self._bar = tqdm(total=self.train.steps, initial=self.step, disable=not self.is_main, desc=self.folder.name)

    def _compare_data(self, checkpoint: Path, before: dict | None) -> None:
        """Raises ConfigError for a checkpoint of this folder that was trained on other data."""
        if before is None or checkpoint.parent.resolve() != (self.folder / "checkpoints").resolve():
            return
        now = self._data or {}
        changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        if changed:
            raise ConfigError(
                f"{self.folder} holds a run on data with another {', '.join(changed)}; choose another output, or "
                f"continue from its last checkpoint elsewhere with resume={checkpoint} output=..."
            )

    def _prepare_folder(self) -> None:
        self._lock = lock_folder(self.folder)
        checkpoints = self.folder / "checkpoints"
        if find_checkpoints(checkpoints) != self._checkpoints_seen:
            raise FolderInUse(f"another process has written into {checkpoints} in the meantime; start again")
        tidy(checkpoints, newest_whole=self.step)
        write_text(self.folder / "config.yaml", to_yaml(self.config))
        self._drop_metrics_after(self.step)

    def _drop_metrics_after(self, step: int) -> None:
        """What a killed run logged after its last checkpoint will be logged again."""
        if self._log_file.exists():
            kept = [record for record in read_json_lines(self._log_file) if record["step"] <= step]
            write_text(self._log_file, "".join(f"{json.dumps(record)}\n" for record in kept))

    def batches(self, dataset: StreamedDataset, until: int | None = None) -> Iterator[dict[str, Tensor]]:
        """This process's micro-batches, on its device, from the current step to step `until` or the last one.

        Ctrl-C and SIGTERM wait for the end of a step, and for the samples and the evaluation that are due after it. In
        the first step, which may compile for minutes and would be the only one that is lost, they do not wait: they
        reach the compilers as well, and torch waits for those forever.

        Raises:
            KeyboardInterrupt: then, after a checkpoint was written.
        """
        until = self.train.steps if until is None else min(until, self.train.steps)
        if self.step >= until:
            return
        loader = TrainingStream(dataset, self.config.seed).batches(
            self.train.batch_size,
            self.step * self.train.gradient_accumulation_steps,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.train.num_workers,
        )
        try:
            batches = iter(loader)
            for micro_batch in itertools.count():
                if micro_batch % self.train.gradient_accumulation_steps == 0:
                    self._end_if_interrupted()
                    if self.step >= until:
                        return
                    if self.step > self._first_step:
                        self._signals.start()
                batch = self._next_batch(batches)
                yield {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        finally:
            self._signals.stop()

    def _next_batch(self, batches: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
        try:
            return next(batches)
        except RuntimeError:
            if self._signals.received is None:
                raise
            # On macOS, the signal has ended the workers as well. One process alone can still write its last step.
            if self.accelerator.num_processes == 1 and not self._collected:
                self._end_if_interrupted()
            raise exception_of(self._signals.received) from None

    def _end_if_interrupted(self) -> None:
        """All processes end together, whichever of them the signal has reached."""
        if self._signals.received is not None:
            self.accelerator.set_trigger()
        if not self.accelerator.check_trigger():
            return
        if self.step > self._last_checkpoint and not self._skipped_in_a_row:
            self.save_checkpoint()
        self._signals.stop()
        self._bar.close()
        raise exception_of(self._signals.received or signal.SIGTERM)(f" at step {self.step}")

    def collect(self, logs: dict[str, Tensor]) -> None:
        """Keeps the detached scalars of a micro-batch for the log of its step."""
        self._collected.append(logs)

    def end_step(self, finite: bool) -> None:
        """Counts and logs an optimizer step, with the means over its micro-batches.

        Args:
            finite: whether the gradient was, so that the weights changed.
        Raises:
            NonFiniteError: after more than `train.max_skipped_steps` skipped steps in a row.
        """
        self.step += 1
        self._bar.update()
        logs = {name: torch.stack([each[name] for each in self._collected]).mean() for name in self._collected[-1]}
        self._collected = []
        if finite:
            self._skipped_in_a_row = 0
            for name, value in logs.items():
                self._window.setdefault(name, []).append(value.detach())
        else:
            self._skip(logs)
        if self.step % self.train.log_every == 0 or self.step == self.train.steps:
            self._log()

    def _skip(self, logs: dict[str, Tensor]) -> None:
        self.skipped += 1
        self._skipped_in_a_row += 1
        where = ", ".join(name for name, value in logs.items() if not torch.isfinite(value)) or "the gradient"
        logger.warning("step %d skipped: %s is not finite (%d so far)", self.step, where, self.skipped)
        if self._skipped_in_a_row > self.train.max_skipped_steps:
            checkpoints = find_checkpoints(self.folder / "checkpoints")
            last = str(checkpoints[-1][1]) if checkpoints else "none was written"
            raise NonFiniteError(
                f"step {self.step}: {where} has not been finite for {self._skipped_in_a_row} steps; "
                f"the last checkpoint before them: {last}"
            )

    def _log(self) -> None:
        self._seconds = time.perf_counter() - self._started
        names = sorted(self._window)  # a loss that begins or ends between has fewer values than steps
        values = torch.stack([torch.stack(self._window[name]).mean() for name in names]) if names else torch.zeros(0)
        values = self.accelerator.reduce(values.to(self.device), "mean").tolist()
        record = dict(zip(names, values))
        record["learning_rate"] = self.schedules[0].get_last_lr()[0]
        self._bar.set_postfix({name: f"{value:.3g}" for name, value in record.items()})
        record |= {"skipped": self.skipped, "seconds": round(self._seconds, 2)}
        if self.is_main:
            append_text(self._log_file, json.dumps({"step": self.step, **record}) + "\n")
        if self.train.tracker:
            self.accelerator.log(record, step=self.step)
        self._window = {}

    def epoch(self, dataset: StreamedDataset) -> float:
        """How many times the data have been passed over so far."""
        images = self.step * self.train.batch_size * self.train.gradient_accumulation_steps
        return images * self.accelerator.num_processes / len(dataset)

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and after the last one, is due now; 0 is never."""
        return every > 0 and (self.step % every == 0 or self.step == self.train.steps)

    def checkpoint_due(self) -> bool:
        """Whether a checkpoint is due. While steps are skipped none is written; it is due after the next good step."""
        self._checkpoint_owed = self._checkpoint_owed or self.due(self.train.checkpoint_every)
        return self._checkpoint_owed and not self._skipped_in_a_row

    def save_checkpoint(self) -> None:
        self._seconds = time.perf_counter() - self._started
        self.checkpointer.save(self.step, {"seconds": self._seconds, "skipped": self.skipped, "data": self._data})
        self._last_checkpoint, self._checkpoint_owed = self.step, False
        if self.is_main and self._log_file.exists():
            sync(self._log_file)

    def finish(self, save: Callable[[Path], object]) -> None:
        """Writes final/ with `save(folder)` on the main process, complete or not at all, and closes the logs."""
        if self.is_main:
            with atomic_path(self.folder / "final") as folder:
                save(folder)
            self._lock.close()
        self.accelerator.wait_for_everyone()
        self._bar.close()
        self.accelerator.end_training()
