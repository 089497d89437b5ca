"""The order of training data: a pure function of the seed and the position, in whatever number of processes.

So resuming needs no state, and a batch is the same for two processes of half its size.
"""

import itertools

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset


class TrainingStream(Dataset):
    """An endless shuffled sequence over a dataset with `sample(index, rng)`: item p depends on (seed, p) alone.

    Args:
        dataset: anything with `__len__` and `sample`.
        seed: of the order and of every random choice in `sample`.
    """

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset = dataset
        self.seed = seed
        self._epoch, self._order = None, None

    def __getitem__(self, position: int) -> dict:
        epoch, offset = divmod(position, len(self.dataset))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))
        return self.dataset.sample(int(self._order[offset]), np.random.default_rng([self.seed, position, 1]))

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
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),  # else each new iterator draws from the generator that training resumes with
            pin_memory=torch.cuda.is_available(),
        )
