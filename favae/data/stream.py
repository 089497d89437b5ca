"""The order of training data: a pure function of the seed and the position, in whatever number of processes.

So resuming needs no state, and a batch is the same for two processes of half its size.
"""

import itertools

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate


class TrainingStream(Dataset):
    """An endless shuffled sequence over a data set: item p depends on (seed, p) alone.

    Args:
        dataset: with `__len__` and `sample(index, rng)`, which gives one item; or, for data that are read faster
            together, with `epoch(rng)`, arrays with an entry for each item, the first of them an order, and `read`,
            which makes a batch of the same places of all arrays.
        seed: of the order and of every random choice.
    """

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset = dataset
        self.seed = seed
        self._epochs: dict[int, tuple[np.ndarray, ...]] = {}

    def _epoch(self, number: int) -> tuple[np.ndarray, ...]:
        if number not in self._epochs:
            rng = np.random.default_rng([self.seed, number])
            order = self.dataset.epoch(rng) if self._in_batches else (rng.permutation(len(self.dataset)),)
            self._epochs = {k: v for k, v in self._epochs.items() if k == number - 1} | {number: order}
        return self._epochs[number]

    @property
    def _in_batches(self) -> bool:
        return hasattr(self.dataset, "read")

    def __getitem__(self, position: int) -> dict:
        epoch, offset = divmod(position, len(self.dataset))
        (order,) = self._epoch(epoch)
        return self.dataset.sample(int(order[offset]), np.random.default_rng([self.seed, position, 1]))

    def __getitems__(self, positions: range) -> dict | list[dict]:
        """What the loader calls for a batch."""
        if not self._in_batches:
            return [self[position] for position in positions]
        epochs, offsets = np.divmod(np.asarray(positions), len(self.dataset))
        parts = [[array[offsets[epochs == epoch]] for array in self._epoch(epoch)] for epoch in np.unique(epochs)]
        return self.dataset.read(*(np.concatenate(arrays) for arrays in zip(*parts)))

    def batches(
        self, batch_size: int, first_batch: int, rank: int = 0, world_size: int = 1, num_workers: int = 0
    ) -> DataLoader:
        """Batches of this process, from batch `first_batch` on; batch k of rank r holds one slice of k's positions."""
        slices = (
            range((batch * world_size + rank) * batch_size, (batch * world_size + rank + 1) * batch_size)
            for batch in itertools.count(first_batch)
        )
        return DataLoader(
            self,
            batch_sampler=slices,
            num_workers=num_workers,
            collate_fn=_as_it_is if self._in_batches else default_collate,
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),  # else each new iterator draws from the generator that training resumes with
            pin_memory=torch.cuda.is_available(),
        )


def _as_it_is(batch: dict) -> dict:
    return batch
