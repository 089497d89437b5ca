import pytest
import torch
from conftest import TINY_CAT, TINY_VQ
from diffusers import DiffusionPipeline
from tiny_text import save_bert, save_clip

from favae import CATPipeline, CATTransformerModel, VQModelFA
from favae.text_encoder import TextEncoder


def transformer(**options) -> CATTransformerModel:
    torch.manual_seed(0)
    model = CATTransformerModel(**{**TINY_CAT, "head_width": 16, "head_layers": 1, **options}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def assemble(model: CATTransformerModel, vae, folder) -> CATPipeline:
    encoder = TextEncoder(str(folder))
    pipe = CATPipeline(model, vae, encoder.model, encoder.tokenizer, encoder.max_length)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def codes(tmp_path) -> CATPipeline:
    return assemble(transformer(), VQModelFA(**TINY_VQ).eval(), save_bert(tmp_path / "bert"))


@pytest.fixture
def latents(tmp_path, tiny_favae) -> CATPipeline:
    tiny_favae.register_to_config(latents_mean=[0.5] * 6, latents_std=[2.0] * 6)
    return assemble(transformer(head="flow", latent_channels=6), tiny_favae, save_bert(tmp_path / "bert"))


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def sample(pipe, *args, **options):
    return pipe(*args, **{"output_type": "latent", **options}).images


@pytest.mark.parametrize("name", ["codes", "latents"])
def test_prompts_give_images_of_every_output_type(name, request):
    pipe = request.getfixturevalue(name)
    assert len(pipe("a red apple").images) == 1
    images = pipe(["a cat", "a dog"], num_images_per_prompt=2, generator=seeds(0, 1, 2, 3), output_type="pt").images
    assert images.shape == (4, 3, 16, 16) and images.min() >= 0 and images.max() <= 1
    assert pipe("ein Äpfel 🍎", output_type="np", return_dict=False)[0].shape == (1, 16, 16, 3)


def test_an_image_depends_on_its_prompt_and_its_generator_alone(codes):
    alone = sample(codes, "a red apple", generator=seeds(1))
    among = sample(codes, ["the dog of the cat of the dog", "a red apple"], generator=seeds(0, 1))
    assert torch.equal(among[1], alone[0])
    assert not torch.equal(sample(codes, "a cat", generator=seeds(1)), alone)
    assert not torch.equal(sample(codes, "a red apple", generator=seeds(2)), alone)
    twice = sample(codes, "a red apple", num_images_per_prompt=2, generator=seeds(1, 1))
    assert torch.equal(twice, alone.expand(2, -1, -1))


def test_an_empty_prompt_is_no_text(codes):
    empty = sample(codes, ["", "  "], generator=seeds(1, 1))
    embeddings = torch.randn(2, 3, 8)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    given = sample(codes, prompt_embeds=embeddings, prompt_attention_mask=nothing, generator=seeds(1, 1))
    assert torch.equal(empty, given)
    assert torch.equal(sample(codes, "", guidance_scale=9.0, generator=seeds(1)), empty[:1])  # nothing to be guided by


def test_encoded_prompts_are_those_of_the_text_encoder(tmp_path, codes):
    for folder in (tmp_path / "bert", save_clip(tmp_path / "clip")):
        encoder = TextEncoder(str(folder))
        pipe = assemble(transformer(), VQModelFA(**TINY_VQ).eval(), folder)
        embeddings, mask = pipe.encode_prompt(["a cat", "the red apple of the dog"])
        expected, expected_mask = encoder.encode(["a cat", "the red apple of the dog"])
        assert torch.equal(embeddings, expected) and torch.equal(mask, expected_mask)


def test_latents_are_scaled_back(latents):
    tokens = sample(latents, "a cat", generator=seeds(0), num_head_steps=2)
    expected = latents.vae.decode(tokens * 2.0 + 0.5).sample
    assert torch.allclose(latents.decode_tokens(tokens), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["codes", "latents"])
def test_saved_and_loaded(name, request, tmp_path):
    pipe = request.getfixturevalue(name)
    pipe.save_pretrained(tmp_path / "saved")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert type(loaded) is CATPipeline and loaded.config.max_length == 12
    options = {"generator": seeds(3), "num_images_per_prompt": 1}
    expected = sample(pipe, "a red cat", generator=seeds(3))
    assert torch.allclose(sample(loaded, "a red cat", **options), expected, atol=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "prompt_embeds"),
        ({"prompt": "a", "prompt_embeds": torch.zeros(1, 2, 8)}, "prompt_embeds"),
        ({"prompt": [3]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", "cat"], "generator": seeds(1)}, "1 generators for 2 images"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": "a", "prompt_attention_mask": torch.ones(1, 2)}, "prompt_attention_mask"),
        ({"prompt_embeds": torch.zeros(1, 2, 8)}, "prompt_attention_mask"),
        ({"prompt_embeds": torch.zeros(2, 3, 8), "prompt_attention_mask": torch.ones(2, 4)}, "mask"),
        ({"prompt": "a", "top_k": 0}, "top_k"),
    ],
)
def test_bad_calls_are_one_line(codes, options, message):
    with pytest.raises(ValueError, match=message):
        codes(**options)


def test_a_variant_is_one_of_all_models(codes, tmp_path):
    codes.save_pretrained(tmp_path / "saved", variant="fp16")
    weights = {file.parent.name: file.name for file in (tmp_path / "saved").rglob("*.safetensors")}
    assert weights == {
        "vae": "diffusion_pytorch_model.fp16.safetensors",
        "transformer": "diffusion_pytorch_model.fp16.safetensors",
        "text_encoder": "model.fp16.safetensors",
    }
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "saved", variant="fp16")
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(sample(loaded, "a cat", generator=seeds(1)), sample(codes, "a cat", generator=seeds(1)))


def test_without_text_encoder_and_autoencoder(codes, tmp_path):
    """The encoder of prompts, the transformer and the decoder of tokens may live in different places."""
    codes.save_pretrained(tmp_path)
    embeds, mask = codes.encode_prompt(["a cat", "the red apple"])
    absent = {"vae": None, "text_encoder": None, "tokenizer": None}
    alone = DiffusionPipeline.from_pretrained(tmp_path, **absent)
    options = {"prompt_embeds": embeds, "prompt_attention_mask": mask, "generator": seeds(0, 1)}
    tokens = sample(alone, **options)
    assert torch.equal(tokens, sample(codes, ["a cat", "the red apple"], generator=seeds(0, 1)))
    with pytest.raises(ValueError, match='needs output_type="latent"'):
        alone(**options)
    with pytest.raises(ValueError, match="needs prompt_embeds"):
        alone("a cat", output_type="latent")


def test_a_compiled_autoencoder_decodes_codes(codes):
    expected = codes("a cat", generator=seeds(1), output_type="pt").images
    codes.vae = torch.compile(codes.vae, backend="eager")
    assert torch.allclose(codes("a cat", generator=seeds(1), output_type="pt").images, expected, atol=1e-5)


def test_classes(tmp_path):
    model = transformer(text_dim=None, num_classes=3)
    pipe = CATPipeline(model, VQModelFA(**TINY_VQ).eval(), None, None, id2label={0: "cat", 1: "dog", 2: "apple"})
    pipe.save_pretrained(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    labels = pipe.get_label_ids(["apple", "cat"])
    assert labels == [2, 0] and len(pipe(class_labels=labels).images) == 2
    tokens = sample(pipe, class_labels=labels, generator=seeds(0, 1))
    assert torch.equal(tokens[1:], sample(pipe, class_labels=[0], generator=seeds(1)))
    repeated = sample(pipe, class_labels=labels, num_images_per_prompt=2, generator=seeds(0, 1, 2, 3))
    assert torch.equal(repeated, sample(pipe, class_labels=[2, 2, 0, 0], generator=seeds(0, 1, 2, 3)))
    for options, message in (
        ({"class_labels": [3]}, "go from 0 to 2"),
        ({"class_labels": [0], "prompt": "a cat"}, "takes no prompt"),
        ({"prompt": "a cat"}, "needs class_labels"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(**options)


def test_a_class_for_a_transformer_of_texts(codes):
    with pytest.raises(ValueError, match="takes no class_labels"):
        codes(class_labels=[0])


def test_offloading_is_of_whole_models(codes):
    with pytest.raises(ValueError, match="enable_model_cpu_offload"):
        codes.enable_sequential_cpu_offload()


def test_a_pipeline_is_made_of_another_one(latents):
    other = CATPipeline.from_pipe(latents)
    assert other.components == latents.components and other.vae is latents.vae


def test_parts_that_do_not_belong_together(codes, tiny_favae):
    parts = codes.components
    with pytest.raises(ValueError, match="head=categorical"):
        CATPipeline(**{**parts, "vae": tiny_favae})
    with pytest.raises(ValueError, match="codebook_size=16"):
        CATPipeline(**{**parts, "transformer": transformer(codebook_size=16)})
    with pytest.raises(ValueError, match="text_dim=5"):
        CATPipeline(**{**parts, "transformer": transformer(text_dim=5)})


@pytest.mark.parametrize("max_length", [12, None])
def test_a_long_prompt_is_cut_with_a_warning(codes, caplog, max_length):
    codes.register_to_config(max_length=max_length)
    codes("the cat of the dog of the cat of the dog of the cat", output_type="latent")
    assert "are cut to 12 tokens" in caplog.text
