"""Two processes that torchrun starts give what one gives; tests/eval has the same for evaluations."""

from conftest import command, run


def test_two_processes_write_the_same_cache(tiny_cache):
    words = ("cache-latents", "--tokenizer", tiny_cache / "tokenizer", "--data", tiny_cache / "images")
    words += ("--resolution", "16", "--shard-size", "5", "--batch-size", "5")
    command(*words, "--output", tiny_cache / "one")
    run("-m", "favae", *words, "--output", tiny_cache / "two", processes=2)
    names = sorted(path.name for path in (tiny_cache / "one").iterdir() if path.name != ".lock")
    assert len(names) == 6 and {*names, ".lock"} == {path.name for path in (tiny_cache / "two").iterdir()}
    for name in names:
        assert (tiny_cache / "one" / name).read_bytes() == (tiny_cache / "two" / name).read_bytes(), name
