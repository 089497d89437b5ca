"""Real processes: killed and run again, alone and in pairs."""

import json

import pytest
import safetensors.torch
import torch
from conftest import kill_when, refusal, run, tiny_generator_recipe, tiny_tokenizer_recipe, write_images


def weights(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.safetensors"))}


def steps_logged(output) -> list[int]:
    return [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_killed_tokenizer_training_ends_with_the_same_weights(tmp_path):
    recipe = tiny_tokenizer_recipe(tmp_path, write_images(tmp_path / "images"))
    more = ["train.steps=40", "train.checkpoint_every=2", "train.gradient_accumulation_steps=2"]
    run("train_tokenizer.py", recipe, f"output={tmp_path / 'whole'}", *more)
    killed = tmp_path / "killed"
    kill_when(killed / "checkpoints/step-4", "train_tokenizer.py", recipe, f"output={killed}", *more)
    assert not (killed / "final").exists()
    (killed / "checkpoints/.writing-step-6").mkdir(exist_ok=True)  # as a kill in the middle of writing leaves it
    run("train_tokenizer.py", recipe, f"output={killed}", *more, "resume=auto")
    assert weights(tmp_path / "whole/final") == weights(killed / "final")
    last = "checkpoints/step-40"
    assert weights(tmp_path / "whole" / last) == weights(killed / last)
    assert set(weights(killed / last)) == {
        f"{name}/diffusion_pytorch_model.safetensors" for name in ("tokenizer", "ema", "discriminator")
    }
    assert steps_logged(killed) == list(range(1, 41))

    before = weights(killed)
    run("train_tokenizer.py", recipe, f"output={killed}", *more)  # a finished run has nothing left to do
    assert weights(killed) == before and steps_logged(killed) == list(range(1, 41))


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """A tokenizer of two steps and its cache, written by two processes; and the same cache by one."""
    folder = tmp_path_factory.mktemp("latents")
    recipe = tiny_tokenizer_recipe(folder, write_images(folder / "images"))
    run("train_tokenizer.py", recipe, f"output={folder / 'tokenizer'}", "train.steps=2")
    command = ("-m", "favae", "cache-latents", "--tokenizer", folder / "tokenizer/final", "--data", folder / "images")
    command += ("--resolution", "16", "--shard-size", "5", "--batch-size", "5")
    run(*command, "--output", folder / "one")
    assert "by 2 process(es)" in run(*command, "--output", folder / "two", processes=2).stdout
    return folder


def test_two_processes_write_the_same_cache(latents):
    names = sorted(path.name for path in (latents / "one").iterdir())
    assert len(names) == 5 and names == sorted(path.name for path in (latents / "two").iterdir())
    for name in names:
        assert (latents / "one" / name).read_bytes() == (latents / "two" / name).read_bytes(), name


def test_killed_generator_training_ends_with_the_same_weights(latents, tmp_path):
    recipe = tiny_generator_recipe(tmp_path, latents / "one", latents / "tokenizer/final")
    more = ["train.steps=40", "train.checkpoint_every=2"]
    run("train_generator.py", recipe, f"output={tmp_path / 'whole'}", *more)
    killed = tmp_path / "killed"
    kill_when(killed / "checkpoints/step-4", "train_generator.py", recipe, f"output={killed}", *more)
    run("train_generator.py", recipe, f"output={killed}", *more)
    assert weights(tmp_path / "whole/final") == weights(killed / "final")


def test_generator_refuses_what_does_not_fit(latents, tmp_path):
    recipe = tiny_generator_recipe(tmp_path, latents / "one", latents / "tokenizer/final")
    other = tmp_path / "other.yaml"
    other.write_text(tiny_tokenizer_recipe(tmp_path, latents / "images").read_text())
    run("train_tokenizer.py", other, f"output={tmp_path / 'tokenizer'}", "train.steps=1", "seed=5")
    for override, message in (
        (f"data.tokenizer={tmp_path / 'tokenizer/final'}", "was made by another tokenizer"),
        ("model.sample_size=8", "holds latents of shape (6, 4, 4), the generator is built for (6, 8, 8)"),
        ("model.num_classes=2", "has 3 classes, the generator 2"),
        (f"data.latents={tmp_path}", "no finished latent cache"),
        (f"data.tokenizer={tmp_path}", "no autoencoder"),
    ):
        assert message in refusal(recipe, f"output={tmp_path / 'run'}", override)
    assert not (tmp_path / "run").exists()


def test_two_processes_train_and_evaluate_as_one(latents, tmp_path):
    recipe = tiny_tokenizer_recipe(tmp_path, latents / "images")
    accumulate = "train.gradient_accumulation_steps=2"
    for steps in (4, 6):  # the second resumes
        run(
            "train_tokenizer.py",
            recipe,
            f"output={tmp_path / 'tokenizer'}",
            f"train.steps={steps}",
            accumulate,
            processes=2,
        )
    assert steps_logged(tmp_path / "tokenizer") == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "tokenizer/checkpoints/step-6/random_states_1.pkl").exists()
    alone = run(
        "train_tokenizer.py", recipe, f"output={tmp_path / 'tokenizer'}", "train.steps=8", accumulate, check=False
    )
    assert alone.returncode == 1 and "written by 2 process(es)" in alone.stderr.strip().splitlines()[-1]

    recipe = tiny_generator_recipe(tmp_path, latents / "one", latents / "tokenizer/final")
    run("train_generator.py", recipe, f"output={tmp_path / 'generator'}", "train.steps=4", processes=2)
    assert (tmp_path / "generator/final/model_index.json").exists()

    # 11 images: the processes' shares differ in size
    sorted((latents / "images").rglob("*.png"))[3].unlink()
    common = ("--features", "efficientnet-lite0", "--batch-size", "4")
    reconstruction = ("-m", "favae", "evaluate", "reconstruction", "--model", f"tiny={latents / 'tokenizer/final'}")
    reconstruction += ("--data", latents / "images", "--resolution", "16", *common)
    generation = (
        "-m",
        "favae",
        "evaluate",
        "generation",
        "--pipeline",
        tmp_path / "generator/final",
        "--num-images",
        "7",
    )
    generation += ("--reference", latents / "images", "--num-inference-steps", "2", "--guidance-scale", "2", *common)
    for name, command in (("reconstruction", reconstruction), ("generation", generation)):
        results = []
        for processes in (1, 2):
            output = tmp_path / f"{name}{processes}"
            run(*command, "--output", output, processes=processes)
            results.append(json.loads((output / "results.json").read_text()))
            assert results[-1]["num_processes"] == processes
        (one,), (two,) = (result["rows"] for result in results)
        measured = {metric.partition("(")[0] for metric in one["metrics"]}
        assert measured >= ({"Recon", "PSNR"} if name == "reconstruction" else {"FD", "IS", "precision"})
        numbers, same = ({k: v for k, v in row["metrics"].items() if v is not None} for row in (one, two))
        assert same == pytest.approx(numbers, rel=1e-4)
        assert [result["protocol"]["num_images"] for result in results] == [11 if name == "reconstruction" else 7] * 2


def test_bfloat16_with_workers_and_gradient_checkpointing(latents, tmp_path):
    options = ("train.mixed_precision=bf16", "train.gradient_checkpointing=true", "train.num_workers=1")
    recipe = tiny_tokenizer_recipe(tmp_path, latents / "images")
    run("train_tokenizer.py", recipe, f"output={tmp_path / 'tokenizer'}", *options)
    recipe = tiny_generator_recipe(tmp_path, latents / "one", latents / "tokenizer/final")
    run("train_generator.py", recipe, f"output={tmp_path / 'generator'}", *options)
    for name, steps in (("tokenizer", 8), ("generator", 6)):
        records = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [r["step"] for r in records] == list(range(1, steps + 1)) and records[-1]["skipped"] == 0
    saved = safetensors.torch.load_file(tmp_path / "tokenizer/final/diffusion_pytorch_model.safetensors")
    assert all(tensor.dtype == torch.float32 and torch.isfinite(tensor).all() for tensor in saved.values())
