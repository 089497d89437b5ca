from favae.data.stream import TrainingStream


class Counting:
    def __len__(self):
        return 5

    def sample(self, index, rng):
        return {"index": index, "draw": int(rng.integers(1 << 30))}


def test_stream_is_a_function_of_seed_and_position():
    stream = TrainingStream(Counting(), seed=3)
    items = [stream[p] for p in range(15)]
    assert [stream[p] for p in reversed(range(15))] == items[::-1]
    for epoch in range(3):
        assert sorted(item["index"] for item in items[5 * epoch : 5 * epoch + 5]) == list(range(5))
    assert len({item["draw"] for item in items}) == 15
    assert [TrainingStream(Counting(), seed=4)[p] for p in range(15)] != items


def test_batches_do_not_depend_on_processes_or_where_they_start():
    stream = TrainingStream(Counting(), seed=3)

    def take(count, **arguments):
        return [batch["draw"].tolist() for _, batch in zip(range(count), stream.batches(**arguments))]

    whole = take(6, batch_size=4, first_batch=0)
    assert take(4, batch_size=4, first_batch=2) == whole[2:]
    halves = [take(6, batch_size=2, first_batch=0, rank=rank, world_size=2) for rank in range(2)]
    assert [a + b for a, b in zip(*halves)] == whole
