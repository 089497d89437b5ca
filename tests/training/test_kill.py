"""Two processes whose launcher is killed without warning while they write a checkpoint."""

from conftest import kill_when, tiny_generator_recipe, train_in_processes


def test_two_processes_of_a_killed_launcher_end_with_it_and_then_with_the_same_weights(tiny_cache):
    recipe = tiny_generator_recipe(tiny_cache, tiny_cache / "cache", tiny_cache / "tokenizer")
    more = ["train.steps=12", "train.sample_every=0"]
    assert train_in_processes(2, "train_generator", recipe, f"output={tiny_cache / 'whole'}", *more) == [0, 0]
    killed = tiny_cache / "killed"
    writing = killed / "checkpoints/.writing-step-6"
    command = ("train_generator.py", recipe, f"output={killed}", *more)
    kill_when(writing, *command, processes=2, launcher_alone=True)
    assert (killed / "checkpoints/step-4/trainer_state.json").exists() and not (killed / "final").exists()
    assert train_in_processes(2, "train_generator", recipe, f"output={killed}", *more) == [0, 0]
    for file in sorted((tiny_cache / "whole/final").rglob("*.safetensors")):
        assert file.read_bytes() == (killed / file.relative_to(tiny_cache / "whole")).read_bytes()
    assert not list((killed / "checkpoints").glob(".writing*"))
