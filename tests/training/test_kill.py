"""Two processes, killed without warning while they write a checkpoint."""

from conftest import kill_when, tiny_generator_recipe, train_in_processes


def test_two_processes_killed_while_writing_end_with_the_same_weights(tiny_cache):
    recipe = tiny_generator_recipe(tiny_cache, tiny_cache / "cache", tiny_cache / "tokenizer")
    more = ["train.steps=12", "train.sample_every=0"]
    assert train_in_processes(2, "train_generator", recipe, f"output={tiny_cache / 'whole'}", *more) == [0, 0]
    killed = tiny_cache / "killed"
    writing = killed / "checkpoints/.writing-step-6"
    kill_when(writing, "train_generator.py", recipe, f"output={killed}", *more, processes=2)
    assert (killed / "checkpoints/step-4/trainer_state.json").exists() and not (killed / "checkpoints/step-6").exists()
    assert train_in_processes(2, "train_generator", recipe, f"output={killed}", *more) == [0, 0]
    for file in sorted((tiny_cache / "whole/final").rglob("*.safetensors")):
        assert file.read_bytes() == (killed / file.relative_to(tiny_cache / "whole")).read_bytes()
    assert not list((killed / "checkpoints").glob(".writing*"))
