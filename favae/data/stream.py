"""The order of training data: a function of the seed and the position, for any number of processes.

So resuming needs no state, and two processes with half the batch size see the same batches as one.
"""

import itertools
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from favae.signals import end_quietly_on_signals


class StreamedDataset(Protocol):
    """What a `TrainingStream` needs of a data set."""

    def __len__(self) -> int: ...

    def epoch(self, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """An epoch in random order: arrays of `len(self)` entries each, which together say what to read."""
        ...

    def training_batch(self, entries: Sequence[np.ndarray], seeds: Sequence[Sequence[int]]) -> dict:
        """A batch of tensors for some entries of an epoch.

        Args:
            entries: the same places of each array of an epoch.
            seeds: one for each item, for whatever else is random about it.
        """
        ...


class TrainingStream(Dataset):
    """An endless sequence of shuffled epochs; the item at position p depends on (seed, p) alone.

    Args:
        dataset: what is read.
        seed: of the order and of every random choice.

    `stream[positions]` is the batch at a range of positions.
    """

    def __init__(self, dataset: StreamedDataset, seed: int):
        self.dataset = dataset
        self.seed = seed
        self._epochs: dict[int, tuple[np.ndarray, ...]] = {}

    def _epoch(self, number: int) -> tuple[np.ndarray, ...]:
        if number not in self._epochs:
            epoch = self.dataset.epoch(np.random.default_rng([self.seed, number]))
            # A batch may lie across two epochs; older ones are not needed any more.
            self._epochs = {k: v for k, v in self._epochs.items() if k == number - 1} | {number: epoch}
        return self._epochs[number]

    def __getitem__(self, positions: range) -> dict:
        epochs, offsets = np.divmod(np.asarray(positions), len(self.dataset))
        parts = [[array[offsets[epochs == epoch]] for array in self._epoch(epoch)] for epoch in np.unique(epochs)]
        entries = [np.concatenate(arrays) for arrays in zip(*parts)]
        return self.dataset.training_batch(entries, [(self.seed, position, 1) for position in positions])

    def batches(
        self, batch_size: int, first_batch: int, rank: int = 0, world_size: int = 1, num_workers: int = 0
    ) -> DataLoader:
        """The batches of one process, without end.

        Args:
            batch_size: of one process. Batch k of all processes together has `world_size * batch_size` consecutive
                positions, of which each process has a slice.
            first_batch: the number of the first batch.
            rank, world_size: number of this process, and number of processes.
            num_workers: processes that read.
        """
        positions = (
            range((batch * world_size + rank) * batch_size, (batch * world_size + rank + 1) * batch_size)
            for batch in itertools.count(first_batch)
        )
        return DataLoader(
            self,
            sampler=positions,
            batch_size=None,  # each index is a range of positions, and each item is a batch
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            worker_init_fn=end_quietly_on_signals,
            generator=torch.Generator(),  # without it, an iterator draws from the generator that training resumes with
            pin_memory=torch.cuda.is_available(),
        )
