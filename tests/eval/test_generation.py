"""Generation: sampling that resumes, the command with its options, bad inputs, and two processes equal to one."""

import json
import shutil
from functools import partial

import datasets
import numpy as np
import pytest
import torch
from conftest import TINY_LIGHTNINGDIT, TINY_VQ, command, command_error, command_in_processes, write_images
from diffusers import DDPMScheduler, DiTPipeline, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import FrozenDict
from picture_files import encoded, smooth
from PIL import Image
from tiny_text import save_bert

from favae import (
    CATPipeline,
    CATTransformerModel,
    LightningDiTPipeline,
    LightningDiTTransformer2DModel,
    VQModelFA,
)
from favae.distributed import image_generator
from favae.errors import DataError, NonFiniteError
from favae.eval.image_sets import SampleFolder
from favae.eval.sample_sets import read_prompts, sample_pipeline, steps_argument
from favae.eval.sampling import class_labels, classes_of, sample_to_folder
from favae.pipelines.solvers import flow_scheduler
from favae.text_encoder import TextEncoder

OFFLINE = ("--features", "efficientnet-lite0")
TINY_DIT = partial(
    DiTTransformer2DModel, num_attention_heads=2, attention_head_dim=8, in_channels=6, out_channels=6, num_layers=1,
    sample_size=4, num_embeds_ada_norm=3, norm_num_groups=2,
)  # fmt: skip


@pytest.fixture
def pipeline(tiny_kl):
    transformer = LightningDiTTransformer2DModel(**TINY_LIGHTNINGDIT)
    for parameter in transformer.parameters():  # its zero-initialized output would ignore the class
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    names = {0: "ant", 1: "bee", 2: "cat"}
    return LightningDiTPipeline(transformer.eval(), tiny_kl, FlowMatchEulerDiscreteScheduler(), None, None, names)


def pixels(folder) -> list[np.ndarray]:
    return [np.array(Image.open(file)) for file in sorted(folder.glob("*.png"))]


def test_sampling_goes_on_after_a_kill_without_changing_an_image(pipeline, tmp_path, caplog):
    settings = {"num_inference_steps": 2, "guidance_scale": 2.0, "batch_size": 4}
    sample_to_folder(pipeline, tmp_path / "whole", 10, **settings)
    whole = pixels(tmp_path / "whole")
    assert len(whole) == 10 and len({image.tobytes() for image in whole}) == 10

    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for i in (2, 5, 6, 7):
        (tmp_path / f"killed/{i:06}.png").unlink()
    (tmp_path / "killed/.writing-000002").write_bytes(b"torn")
    kept = (tmp_path / "killed/000009.png").stat().st_mtime_ns
    sample_to_folder(pipeline, tmp_path / "killed", 10, **settings)
    assert all(np.array_equal(a, b) for a, b in zip(whole, pixels(tmp_path / "killed"), strict=True))
    assert (tmp_path / "killed/000009.png").stat().st_mtime_ns == kept and len(SampleFolder(tmp_path / "killed")) == 10
    assert "left out" not in caplog.text  # our own files are no news

    with pytest.raises(DataError, match="guidance_scale, seed"):
        sample_to_folder(pipeline, tmp_path / "killed", 10, **{**settings, "guidance_scale": 1.0}, seed=1)
    with torch.no_grad():
        next(pipeline.transformer.parameters()).add_(1)
    with pytest.raises(DataError, match="pipeline"):
        sample_to_folder(pipeline, tmp_path / "killed", 10, **settings)


def test_samples_of_other_statistics_are_other_samples(pipeline, tmp_path):
    """The weights are the same, and the images are not."""
    settings = {"num_inference_steps": 1, "guidance_scale": 1.0}
    sample_to_folder(pipeline, tmp_path / "samples", 1, **settings)
    pipeline.vae.register_to_config(latents_mean=[0.5] * 6, latents_std=[2.0] * 6, scaling_factor=1.0)
    with pytest.raises(DataError, match="samples of another pipeline"):
        sample_to_folder(pipeline, tmp_path / "samples", 1, **settings)


def test_samples_of_a_new_scheduler_with_the_same_settings_go_on(pipeline, tmp_path):
    settings = {"num_inference_steps": 1, "guidance_scale": 1.0}
    for order in (1, -1):  # diffusers lists the settings that are defaults in the order of a set, anew in each process
        pipeline.scheduler = flow_scheduler("euler")
        names = sorted(pipeline.scheduler.config["_use_default_values"])[::order]
        pipeline.scheduler._internal_dict = FrozenDict(pipeline.scheduler.config | {"_use_default_values": names})
        sample_to_folder(pipeline, tmp_path / "samples", 1, **settings)
    pipeline.scheduler = flow_scheduler("heun")
    with pytest.raises(DataError, match="samples of another scheduler"):
        sample_to_folder(pipeline, tmp_path / "samples", 1, **settings)


def test_classes_that_get_names_are_other_samples(pipeline, tmp_path):
    settings = {"num_inference_steps": 1, "guidance_scale": 1.0}
    sample_to_folder(pipeline, tmp_path / "samples", 2, **settings)
    pipeline.register_to_config(id2label={2: "cat", 0: "ant"})
    assert classes_of(pipeline) == {0: "ant", 2: "cat"}
    with pytest.raises(DataError, match="samples of another classes"):
        sample_to_folder(pipeline, tmp_path / "samples", 2, **settings)


def test_pipelines_of_others_take_the_steps_they_take():
    class OneStep:
        pass

    assert steps_argument(OneStep(), None) == {}
    with pytest.raises(DataError, match="OneStep takes no number of steps"):
        steps_argument(OneStep(), 3)


def test_labels_are_balanced_or_drawn(pipeline):
    assert classes_of(pipeline) == {0: "ant", 1: "bee", 2: "cat"}
    assert class_labels(7, [3, 7, 8], "balanced", 0) == [3, 7, 8, 3, 7, 8, 3]
    drawn = class_labels(300, range(3), "random", 0)
    assert drawn == class_labels(300, range(3), "random", 0) != class_labels(300, range(3), "random", 1)
    assert 60 < drawn.count(1) < 140


def test_samples_that_are_not_finite_are_named(pipeline, tiny_kl, tmp_path):
    stock = DiTPipeline(TINY_DIT(), tiny_kl, DDPMScheduler())  # which does not look
    with torch.no_grad():
        tiny_kl.decoder.conv_out.bias.fill_(torch.nan)
    for pipe in (pipeline, stock):
        settings = {"num_inference_steps": 1, "guidance_scale": 1.0, "batch_size": 4}
        with pytest.raises(NonFiniteError, match="samples 0 to 3: .*images .*are not finite"):
            sample_to_folder(pipe, tmp_path / type(pipe).__name__, 4, **settings)


def test_a_stock_dit_pipeline_is_sampled_too(tiny_kl, tmp_path):
    """Whatever the global generator's state, which DDPM draws from in each step."""
    pipeline = DiTPipeline(TINY_DIT(), tiny_kl, DDPMScheduler())
    for name in ("a", "b"):
        sample_to_folder(pipeline, tmp_path / name, 3, num_inference_steps=2, guidance_scale=1.0, batch_size=2)
        torch.rand(1)
    assert all(np.array_equal(a, b) for a, b in zip(pixels(tmp_path / "a"), pixels(tmp_path / "b"), strict=True))
    with pytest.raises(DataError, match="DiTPipeline takes no guidance_interval"):
        sample_to_folder(pipeline, tmp_path / "c", 3, guidance_interval=(0.1, 1.0))
    with pytest.raises(DataError, match="images holds something other"):
        sample_to_folder(pipeline, write_images(tmp_path / "images"), 3)
    pipeline.save_pretrained(tmp_path / "dit")
    with pytest.raises(DataError, match="below 1 have no effect in a DiTPipeline"):
        sample_pipeline(str(tmp_path / "dit"), tmp_path / "out", num_images=2, guidance_scales=[0.5])

    # Of two classes of one name, a loaded DiTPipeline knows only the later one: two cranes are in ImageNet.
    names = {0: "crane", 1: "ship", 2: "crane, machine"}
    pipeline = DiTPipeline(TINY_DIT(), tiny_kl, DDPMScheduler(), id2label=names)
    pipeline.register_to_config(id2label=names)
    pipeline.save_pretrained(tmp_path / "cranes")
    options = {"num_images": 3, "num_inference_steps": 1}
    assert sample_pipeline(str(tmp_path / "cranes"), tmp_path / "out", **options).class_names == list(names.values())


def test_given_samples_have_seams_and_a_scale_of_real_images(tmp_path):
    images, others = (write_images(tmp_path / name, per_class=n, size=(16, 16)) for name, n in (("a", 4), ("b", 6)))
    common = ["evaluate", "generation", "--reference", images, *OFFLINE, "--output", tmp_path / "out"]
    pictures = [{"bytes": encoded(smooth()), "path": None}] * 4
    datasets.Dataset.from_dict({"picture": pictures}).to_parquet(tmp_path / "train.parquet")
    table = ["evaluate", "generation", "--reference", tmp_path / "train.parquet", "--image-column", "picture", *OFFLINE]
    table += ["--split", "train", "--output", tmp_path / "columns", "--samples", others, "--validation", others]
    command(*table)  # the folder has no columns
    command(*common, "--samples", others, "--patch-size", 4, "--validation", others)
    result = json.loads((tmp_path / "out/results.json").read_text())
    assert result["rows"][0]["metrics"]["FDr(efficientnet-lite0)"] == pytest.approx(1)
    assert result["rows"][0]["metrics"]["seams"] > 0
    assert result["protocol"]["patch_size"] == 4 and len(result["protocol"]["validation"]) == 1
    assert "--num-images is for --pipeline" in command_error(*common, "--samples", others, "--num-images", 4)
    assert "--patch-size is for --samples" in command_error(*common, "--pipeline", "nowhere", "--patch-size", 4)


def test_a_pipeline_of_a_class_that_is_not_installed(pipeline, image_folder, tmp_path):
    pipeline.save_pretrained(tmp_path / "pipeline")
    index = tmp_path / "pipeline/model_index.json"
    index.write_text(index.read_text().replace("LightningDiTPipeline", "PipelineOfTheFuture"))
    words = ("--reference", image_folder, *OFFLINE, "--output", tmp_path / "out")
    message = command_error("evaluate", "generation", "--pipeline", tmp_path / "pipeline", *words)
    assert "no pipeline could be opened here" in message and "PipelineOfTheFuture" in message


def test_the_command_with_two_processes_equals_one(pipeline, tmp_path, capsys):
    pipeline.save_pretrained(tmp_path / "pipeline")
    images = write_images(tmp_path / "images", per_class=8)
    statistics = tmp_path / "reference.safetensors"
    command("reference-statistics", "--data", images, "--resolution", 16, *OFFLINE, "--output", statistics)
    common = ["evaluate", "generation", "--pipeline", tmp_path / "pipeline", "--num-images", 14, *OFFLINE]
    common += ["--num-inference-steps", 2, "--guidance-scale", 1, 2, 1, "--seed", 0, 0, "--batch-size", 4]
    one, two = tmp_path / "one", tmp_path / "two"
    command(*common, "--reference", images, "--write-npz", "--output", one)
    printed = capsys.readouterr().out
    assert "FD(efficientnet-lite0)" in printed and "FID" not in printed
    assert command_in_processes(2, *common, "--reference", statistics, "--output", two) == [0, 0]
    for folder in ("guidance_scale-1.0-seed-0", "guidance_scale-2.0-seed-0"):
        first, second = pixels(one / "samples" / folder), pixels(two / "samples" / folder)
        assert len(first) == 14 and all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    results = [json.loads((folder / "results.json").read_text()) for folder in (one, two)]
    for a, b in zip(results[0]["rows"], results[1]["rows"], strict=True):
        assert a["metrics"] == pytest.approx(b["metrics"], rel=1e-4, abs=1e-6)
    assert [row["guidance_scale"] for row in results[0]["rows"]] == [1.0, 2.0]
    differing = [key for key in results[0]["protocol"] if results[0]["protocol"][key] != results[1]["protocol"][key]]
    assert differing == ["reference_name"]  # the same images, whichever way they were given
    assert (one / "samples-guidance_scale-2.0-seed-0.png").stat().st_size > 3_000

    archive = one / "samples-guidance_scale-2.0-seed-0.npz"
    again = tmp_path / "again"
    command("evaluate", "generation", "--samples", archive, "--reference", images, *OFFLINE, "--output", again)
    (row,) = json.loads((again / "results.json").read_text())["rows"]
    same = results[0]["rows"][1]["metrics"]["FD(efficientnet-lite0)"]
    assert row["metrics"]["FD(efficientnet-lite0)"] == pytest.approx(same, rel=1e-4)
    capsys.readouterr()
    assert "--force" in command_error("compare", one / "results.json", again / "results.json")
    assert "sampler: " in capsys.readouterr().out

    small = tmp_path / "small.safetensors"
    command("reference-statistics", "--data", images, "--resolution", 8, *OFFLINE, "--output", small)
    for words in (("--reference", small), ("--reference", images, "--validation", small)):
        message = command_error(*common, *words, "--output", tmp_path / "none")
        assert "small.safetensors is of images of 8 x 8 pixels, these have 16 x 16" in message
        assert not list((tmp_path / "none").rglob("*.png"))  # it says so before it has made samples of any guidance

    nowhere = ("--samples", tmp_path / "nowhere", "--reference", images, *OFFLINE, "--output", tmp_path / "x")
    assert "nowhere" in command_error("evaluate", "generation", *nowhere)
    assert "--guidance-channels" in command_error("evaluate", "generation", *nowhere, "--guidance-channels", 3)


def test_the_published_guidance_can_be_asked_for_and_is_in_the_protocol(pipeline, tmp_path):
    """Three channels, scale 10 from 0.1 on, on the shifted times: the protocol of LightningDiT's guided numbers."""
    images = write_images(tmp_path / "images")
    pipeline.save_pretrained(tmp_path / "pipeline")
    common = ["evaluate", "generation", "--pipeline", tmp_path / "pipeline", "--reference", images, *OFFLINE]
    common += ["--num-images", 4, "--num-inference-steps", 4, "--guidance-scale", 10, "--guidance-interval", 0.1, 1]
    command(*common, "--guidance-channels", 3, "--shift", 1 / 0.3, "--output", tmp_path / "published")
    protocol = json.loads((tmp_path / "published/results.json").read_text())["protocol"]
    expected = {"guidance_interval": [0.1, 1.0], "guidance_channels": 3, "num_inference_steps": 4, "shift": 1 / 0.3}
    assert expected.items() <= protocol.items()

    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1 / 0.3)
    options = {"guidance_scale": 10.0, "num_inference_steps": 4, "output_type": "np"}
    options["generator"] = [image_generator(0, i) for i in range(4)]
    direct = pipeline([0, 1, 2, 0], guidance_interval=(0.1, 1.0), guidance_channels=3, **options).images
    found = np.stack(pixels(tmp_path / "published/samples/guidance_scale-10.0-seed-0"))
    assert np.abs(found / 255 - direct).max() < 0.01
    options["generator"] = [image_generator(0, i) for i in range(4)]
    assert np.abs(pipeline([0, 1, 2, 0], **options).images - direct).max() > 0.01
    for wrong in (0, 7):
        with pytest.raises(ValueError, match=r"guidance_channels must be in 1 \.\.\. 6"):
            pipeline([0], guidance_channels=wrong)


def test_another_solver_can_be_asked_for_and_is_in_the_protocol(pipeline, tmp_path):
    images = write_images(tmp_path / "images")
    pipeline.save_pretrained(tmp_path / "pipeline")
    common = ["evaluate", "generation", "--pipeline", tmp_path / "pipeline", "--reference", images, *OFFLINE]
    common += ["--num-images", 4, "--num-inference-steps", 4, "--shift", 3]
    pictures = []
    for solver, sampler in (("euler", "FlowMatchEuler"), ("dpm++", "DPMSolverMultistep")):
        command(*common, "--solver", solver, "--output", tmp_path / solver)
        protocol = json.loads((tmp_path / solver / "results.json").read_text())["protocol"]
        assert protocol["sampler"].startswith(sampler) and protocol["shift"] == 3
        assert 3 in protocol["scheduler"].values()
        pictures.append(np.stack(pixels(tmp_path / solver / "samples/guidance_scale-1.0-seed-0")))
    assert not np.array_equal(*pictures)


def test_samples_in_bfloat16_are_nearly_the_same_and_say_so(pipeline, tmp_path):
    images = write_images(tmp_path / "images")
    pipeline.save_pretrained(tmp_path / "pipeline")
    common = ["evaluate", "generation", "--pipeline", tmp_path / "pipeline", "--reference", images, *OFFLINE]
    common += ["--num-images", 4, "--num-inference-steps", 4, "--output"]
    found = []
    for dtype in ("float32", "bfloat16"):
        command(*common, tmp_path / dtype, "--dtype", dtype)
        assert json.loads((tmp_path / dtype / "results.json").read_text())["protocol"]["dtype"] == dtype
        found.append(np.stack(pixels(tmp_path / dtype / "samples/guidance_scale-1.0-seed-0")).astype(float))
    assert 0 < np.abs(found[0] - found[1]).mean() < 4
    assert "hold" in command_error(*common, tmp_path / "float32", "--dtype", "bfloat16")  # other samples


@pytest.fixture(scope="module")
def text_pipeline(tmp_path_factory):
    """A saved text-to-image pipeline, and the same one in memory."""
    folder = tmp_path_factory.mktemp("text")
    torch.manual_seed(0)
    encoder = TextEncoder(str(save_bert(folder / "bert")))
    transformer = CATTransformerModel(
        sample_size=4, num_layers=1, num_attention_heads=2, attention_head_dim=8, hidden_size=16, text_dim=8,
        codebook_size=32,
    )  # fmt: skip
    pipe = CATPipeline(transformer, VQModelFA(**TINY_VQ), encoder.model, encoder.tokenizer)
    pipe.save_pretrained(folder / "pipeline")
    return folder / "pipeline", pipe


@pytest.mark.parametrize("options", [(), ("--temperature", 0.5, "--top-k", 5, "--guidance-scale", 1, 3)])
def test_the_lines_of_a_file_are_prompts(tmp_path, image_folder, text_pipeline, options):
    path, pipe = text_pipeline
    (tmp_path / "prompts.txt").write_text("a red apple\n\nthe dog\n", encoding="utf-8-sig")
    common = ["evaluate", "generation", "--pipeline", path, "--reference", image_folder, *OFFLINE]
    common += ["--num-images", 5, "--batch-size", 2, "--output", tmp_path / "out"]
    command(*common, "--prompts", tmp_path / "prompts.txt", *options)
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert len(found["rows"]) == (2 if options else 1)
    assert found["protocol"]["top_k"] == (5 if options else None) and len(found["protocol"]["prompts"]) == 64
    (folder,) = (tmp_path / "out/samples").glob("guidance_scale-1.0-*")
    third = pipe("a red apple", guidance_scale=1.0, generator=[image_generator(0, 2)], output_type="np",
                 **({"temperature": 0.5, "top_k": 5} if options else {})).images[0]  # fmt: skip
    assert np.abs(np.array(Image.open(folder / "000002.png")) / 255 - third).max() < 0.01
    assert read_prompts(tmp_path / "prompts.txt") == ["a red apple", "the dog"]  # without a byte order mark


def test_prompts_that_cannot_be_used(tmp_path, image_folder, text_pipeline):
    path, _ = text_pipeline
    common = ["evaluate", "generation", "--pipeline", path, "--reference", image_folder, *OFFLINE]
    common += ["--num-images", 5, "--output", tmp_path / "other"]
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x80")
    (tmp_path / "empty.txt").write_text("\n\n")
    assert "prompts" in command_error(*common)
    (tmp_path / "one.txt").write_text("the dog")
    prompts = ("--prompts", tmp_path / "one.txt")
    assert "takes no number of steps" in command_error(*common, *prompts, "--num-inference-steps", 9)
    assert "random labels need classes" in command_error(*common, *prompts, "--labels", "random")
    for name in ("none.txt", "bytes.txt", "empty.txt"):
        assert name in command_error(*common, "--prompts", tmp_path / name)
