import numpy as np
import torch

from favae.data.stream import TrainingStream


class Counting:
    def __len__(self):
        return 5

    def epoch(self, rng):
        return (rng.permutation(5),)

    def training_batch(self, entries, seeds):
        (indices,) = entries
        numbers = [int(np.random.default_rng(seed).integers(1 << 30)) for seed in seeds]
        return {"index": torch.from_numpy(indices), "number": torch.tensor(numbers)}


def test_stream_is_a_function_of_seed_and_position():
    stream = TrainingStream(Counting(), seed=3)
    whole = stream[range(15)]
    for position in reversed(range(15)):
        item = stream[range(position, position + 1)]
        assert all(item[name] == whole[name][position] for name in whole)
    for epoch in range(3):
        assert sorted(whole["index"][5 * epoch : 5 * epoch + 5].tolist()) == list(range(5))
    assert len(set(whole["number"].tolist())) == 15
    assert not torch.equal(TrainingStream(Counting(), seed=4)[range(15)]["number"], whole["number"])


def test_batches_do_not_depend_on_processes_or_where_they_start():
    stream = TrainingStream(Counting(), seed=3)

    def take(count, **arguments):
        return [batch["number"].tolist() for _, batch in zip(range(count), stream.batches(**arguments))]

    whole = take(6, batch_size=4, first_batch=0)
    assert take(4, batch_size=4, first_batch=2) == whole[2:]
    halves = [take(6, batch_size=2, first_batch=0, rank=rank, world_size=2) for rank in range(2)]
    assert [a + b for a, b in zip(*halves)] == whole
