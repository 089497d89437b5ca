"""`LightningDiTPipeline` of a transformer that is told texts."""

import copy

import accelerate
import pytest
import torch
from conftest import TINY_LIGHTNINGDIT
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils import torch_utils
from tiny_text import save_bert

from favae import LightningDiTPipeline, LightningDiTTransformer2DModel
from favae.eval.sampling import classes_of, takes_prompts
from favae.text_encoder import TextEncoder


@pytest.fixture
def of_texts(tiny_favae, tmp_path) -> LightningDiTPipeline:
    transformer = LightningDiTTransformer2DModel(**TINY_LIGHTNINGDIT | {"num_classes": 0, "text_dim": 8}).eval()
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    encoder = TextEncoder(str(save_bert(tmp_path / "bert")))
    texts = {"text_encoder": encoder.model, "tokenizer": encoder.tokenizer, "max_length": encoder.max_length}
    pipe = LightningDiTPipeline(transformer, tiny_favae, FlowMatchEulerDiscreteScheduler(), **texts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_another_text_encoder_takes_the_place_of_the_saved_one(of_texts, tmp_path):
    of_texts.save_pretrained(tmp_path / "pipeline")
    mine = copy.deepcopy(of_texts.text_encoder)
    opened = DiffusionPipeline.from_pretrained(tmp_path / "pipeline", text_encoder=mine, tokenizer=None)
    assert opened.text_encoder is mine and opened.tokenizer is None


def test_prompts_with_all_parts_offloaded(of_texts):
    options = {"num_inference_steps": 2, "latents": torch.randn(1, 6, 4, 4), "output_type": "pt"}
    expected = of_texts(prompt="a red apple", **options).images
    for part in (of_texts.text_encoder, of_texts.transformer, of_texts.vae):
        accelerate.cpu_offload(part, torch.device("cpu"))  # as enable_sequential_cpu_offload does
    assert torch.equal(of_texts(prompt="a red apple", **options).images, expected)


def test_a_text_encoder_may_stay_on_a_device_of_its_own(of_texts, monkeypatch):
    if not hasattr(torch_utils, "get_module_execution_device"):
        pytest.skip("before diffusers 0.42 a pipeline has one device")
    expected, _ = of_texts.encode_prompt("a red apple")
    monkeypatch.setattr(LightningDiTPipeline, "_execution_device", torch.device("meta"))
    assert torch.equal(of_texts.encode_prompt("a red apple")[0], expected)


def test_prompts_become_images(of_texts, tmp_path):
    noise = torch.randn(4, 6, 4, 4)
    options = {"num_inference_steps": 3, "output_type": "latent", "latents": noise}
    prompts = ["a red apple", "the dog"]
    images = of_texts(prompt=prompts, num_images_per_prompt=2, guidance_scale=2.0, **options).images
    embeddings, mask = of_texts.encode_prompt(prompts)
    given = {"prompt_embeds": embeddings, "prompt_attention_mask": mask, "num_images_per_prompt": 2}
    assert torch.equal(of_texts(**given, guidance_scale=2.0, **options).images, images)
    # Guidance leads away from no text: v = null + scale (text - null), by hand.
    texts, masks = embeddings.repeat_interleave(2, dim=0), mask.repeat_interleave(2, dim=0)
    x, model = noise, of_texts.transformer
    with torch.no_grad():
        for step in range(3):
            time = torch.full((4,), step / 3)
            with_text = model(x, time, None, texts, masks).sample
            null = model(x, time, None, texts, torch.zeros_like(masks)).sample
            x = x + (null + 2 * (with_text - null)) / 3
    torch.testing.assert_close(images, x, rtol=1e-4, atol=1e-4)
    of_texts.save_pretrained(tmp_path / "pipe")
    opened = DiffusionPipeline.from_pretrained(tmp_path / "pipe")
    opened.set_progress_bar_config(disable=True)
    again = opened(prompt=prompts, num_images_per_prompt=2, guidance_scale=2.0, **options).images
    assert torch.equal(again, images) and opened.text_encoder is not None


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({}, "give either prompt"),
        ({"prompt": "a", "prompt_embeds": torch.zeros(1, 1, 8)}, "give either prompt"),
        ({"prompt": 3}, "prompt must be"),
        ({"prompt": "a", "class_labels": [0]}, "takes no class_labels"),
    ],
)
def test_prompts_that_cannot_be(of_texts, arguments, named):
    with pytest.raises(ValueError, match=named):
        of_texts(**arguments)


def test_it_takes_prompts_and_no_classes(of_texts):
    assert takes_prompts(of_texts) and classes_of(of_texts) is None


def test_classes_and_prompts_together(of_texts):
    transformer = LightningDiTTransformer2DModel(**TINY_LIGHTNINGDIT | {"text_dim": 8}).eval()
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    of_texts.register_modules(transformer=transformer)
    options = {"num_inference_steps": 2, "output_type": "latent", "latents": torch.randn(2, 6, 4, 4)}
    conditions = (([0, 1], ["a", "dog"]), ([0, 2], ["a", "dog"]), ([0, 1], ["a", "cat"]))
    found = [of_texts(labels, prompt=prompt, **options).images for labels, prompt in conditions]
    assert all(torch.equal(found[0][0], other[0]) for other in found)
    assert not torch.equal(found[0][1], found[1][1]) and not torch.equal(found[0][1], found[2][1])
    with pytest.raises(ValueError, match="as many images"):
        of_texts([0], prompt=["a", "dog"], **options)
