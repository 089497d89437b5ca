"""Pipelines and models that hold our classes, saved, loaded, and on their way to the Hub."""

import json
import logging
import shutil
from types import SimpleNamespace

import diffusers
import pytest
import torch
from conftest import TINY_FAVAE, TINY_LIGHTNINGDIT
from diffusers import AutoModel, DiffusionPipeline
from tiny_pipelines import STEPS, dit, ours, stable_diffusion, stock

import favae.models.hub
from favae import AutoencoderKLFA, LightningDiTPipeline, LightningDiTTransformer2DModel
from favae.adapters.hub import prepare_for_hub
from favae.autoencoders import load_autoencoder
from favae.errors import ModelError

ABSENT = dict.fromkeys(("text_encoder", "tokenizer"))  # of Stable Diffusion, which gets embeddings here


def images(pipe: DiffusionPipeline, call: dict):
    pipe.set_progress_bar_config(disable=True)
    return pipe(**call, **STEPS, output_type="np", generator=torch.Generator().manual_seed(0)).images


@pytest.fixture
def lightningdit(tiny_favae) -> LightningDiTPipeline:
    transformer = LightningDiTTransformer2DModel(**TINY_LIGHTNINGDIT)
    torch.nn.init.normal_(transformer.proj_out.weight)
    return LightningDiTPipeline(transformer, tiny_favae, diffusers.FlowMatchEulerDiscreteScheduler(), None, None)


@pytest.mark.parametrize("build", [dit, stable_diffusion], ids=lambda build: build.__name__)
def test_a_stock_pipeline_with_our_autoencoder(build, tmp_path):
    pipe, call = build(ours())
    expected = images(pipe, call)
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path, **(ABSENT if build is stable_diffusion else {}))
    assert isinstance(loaded.vae, AutoencoderKLFA) and (images(loaded, call) == expected).all()
    vae = AutoModel.from_pretrained(str(tmp_path), subfolder="vae")
    assert isinstance(vae, AutoencoderKLFA)


def test_our_autoencoder_over_a_stock_index(tmp_path, caplog):
    pipe, call = stable_diffusion(stock())
    pipe.save_pretrained(tmp_path)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="diffusers"):
        loaded = type(pipe).from_pretrained(tmp_path, vae=ours(), **ABSENT)
    assert loaded.vae_scale_factor == 4 and not caplog.records
    assert images(loaded, {**call, "height": 32, "width": 32}).shape == (1, 32, 32, 3)


def test_a_file_that_lacks_weights_is_refused(tmp_path):
    stock().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "layers_per_block": 3}))
    with pytest.raises(ModelError, match="lacks .* weights of its config, such as decoder"):
        load_autoencoder(str(tmp_path))


def test_loading_and_saving_again_says_nothing(tiny_favae, tmp_path, caplog):
    tiny_favae.save_pretrained(tmp_path / "a")
    with caplog.at_level(logging.WARNING, logger="diffusers"):
        loaded = AutoencoderKLFA.from_pretrained(tmp_path / "a")
    assert not caplog.records and "auto_map" not in loaded.config
    loaded.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b/config.json").read_text().count("autoencoder_kl_fa.AutoencoderKLFA") == 1
    assert (tmp_path / "b/autoencoder_kl_fa.py").read_text().startswith("from favae import AutoencoderKLFA")


def test_pipelines_prepared_for_the_hub(lightningdit, tmp_path):
    call = {"class_labels": [0]}
    expected = images(lightningdit, call)
    lightningdit.save_pretrained(tmp_path)
    prepare_for_hub(tmp_path)
    prepare_for_hub(tmp_path)  # twice is once
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_lightningdit", "LightningDiTPipeline"]
    assert index["vae"] == ["autoencoder_kl_fa", "AutoencoderKLFA"] and index["scheduler"][0] == "diffusers"
    for module, folder in (
        (index["vae"][0], "vae"),
        (index["transformer"][0], "transformer"),
        ("pipeline_lightningdit", "."),
    ):
        assert (tmp_path / folder / f"{module}.py").exists()
    loaded = DiffusionPipeline.from_pretrained(str(tmp_path), trust_remote_code=True)
    assert type(loaded).__name__ == "LightningDiTPipeline" and (images(loaded, call) == expected).all()


def test_names_that_lead_out_of_the_folder_are_refused(tmp_path):
    folder = tmp_path / "pipeline"
    folder.mkdir()
    index = {"_class_name": "X", "../vae": ["favae.models.autoencoder_kl_fa", "AutoencoderKLFA"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="outside the folder"):
        prepare_for_hub(folder)
    assert not (tmp_path / "vae").exists()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Uploads land in a folder."""
    uploaded = tmp_path / "hub"

    def upload(repo_id, folder_path, **options):
        shutil.copytree(folder_path, uploaded / repo_id, dirs_exist_ok=True)
        return repo_id

    def card(repo_id, **options):
        old = uploaded / repo_id / "README.md"
        return diffusers.utils.hub_utils.ModelCard(
            old.read_text() if old.exists() else "---\nlicense: mit\n---\nMine.\n"
        )

    def create(name, **options):
        return SimpleNamespace(repo_id=name if "/" in name else f"me/{name}")

    for module in (diffusers.models.modeling_utils, favae.models.hub):
        monkeypatch.setattr(module, "create_repo", create)
        monkeypatch.setattr(module, "load_or_create_model_card", card)
    monkeypatch.setattr(diffusers.configuration_utils, "create_repo", create)
    monkeypatch.setattr(diffusers.utils.hub_utils, "upload_folder", upload)
    return uploaded


def test_push_to_hub_writes_a_card(hub, tiny_favae, tmp_path):
    tiny_favae.register_to_config(latents_mean=[0.5] * 6, latents_std=[2.0] * 6)
    run = tmp_path / "run"
    tiny_favae.save_pretrained(run / "final")
    (run / "config.yaml").write_text("seed: 17\n")
    result = {
        "command": "favae evaluate reconstruction",
        "task": "reconstruction",
        "protocol": {"resolution": 16},
        "rows": [{"model": "tiny", "metrics": {"PSNR": 31.25, "LPIPS": None}}],
    }
    (tmp_path / "results.json").write_text(json.dumps(result))
    loaded = AutoencoderKLFA.from_pretrained(run / "final")
    loaded.push_to_hub("me/tiny", metrics=tmp_path / "results.json")
    text = (hub / "me/tiny/README.md").read_text()
    assert "Mine." in text and "license: mit" in text
    for part in (
        "seed: 17",
        "31.25",
        "latents_mean: [0.5, 0.5, 0.5, 0.5, 0.5, 0.5]",
        'from_pretrained("me/tiny")',
    ):
        assert part in text
    assert "LPIPS" not in text
    opened = AutoModel.from_pretrained(str(hub / "me/tiny"), trust_remote_code=True)
    assert opened.config.latents_std == [2.0] * 6

    loaded.save_pretrained(str(tmp_path / "again"), push_to_hub=True, repo_id="me/tiny")  # without metrics
    text = (hub / "me/tiny/README.md").read_text()
    assert text.count("## Latents") == 1 and "31.25" not in text and "Mine." in text


def test_cards_know_the_repository_and_the_run(hub, lightningdit, tiny_favae, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("seed: 17\n")
    tiny_favae.save_pretrained(tmp_path / "run/final")
    AutoencoderKLFA.from_pretrained(tmp_path / "run/final").save_pretrained(
        str(tmp_path / "again"), push_to_hub=True, repo_id="me/tiny"
    )
    assert "seed: 17" in (hub / "me/tiny/README.md").read_text()
    rows = [{"model": "jpeg", "label": "jpeg 5", "quality": 5, "metrics": {"bpp": 0.3}}]
    rows += [{"model": "m", "label": "m, step 1", "metrics": {"bpp": 0.25}}]
    (tmp_path / "results.json").write_text(json.dumps({"task": "compression", "protocol": {}, "rows": rows}))
    tiny_favae.push_to_hub("me/small", metrics=tmp_path / "results.json")
    text = (hub / "me/small/README.md").read_text()
    assert "bpp of m, step 1" in text and "jpeg" not in text
    tiny_favae.push_to_hub("short", "what changed")  # the message comes second, as in diffusers
    assert 'from_pretrained("me/short")' in (hub / "me/short/README.md").read_text()
    tiny_favae.save_config(
        str(tmp_path / "config"), push_to_hub=True, repo_id="me/config"
    )  # without a card, as diffusers'
    assert (hub / "me/config/config.json").exists() and not (hub / "me/config/README.md").exists()
    lightningdit.transformer.push_to_hub("me/generator")
    text = (hub / "me/generator/README.md").read_text()
    assert "Latents" not in text and "model = LightningDiTTransformer2DModel" in text


def test_classes_of_users_are_theirs_to_find(tmp_path):
    class Mine(AutoencoderKLFA):
        pass

    Mine(**TINY_FAVAE).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py")) and "auto_map" not in (tmp_path / "config.json").read_text()


def test_a_card_needs_the_files_it_is_told(hub, tiny_favae, tmp_path):
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ValueError, match="x.json"):
        tiny_favae.push_to_hub("me/tiny", metrics=tmp_path / "x.json")
    with pytest.raises(FileNotFoundError):
        tiny_favae.push_to_hub("me/tiny", recipe=tmp_path / "none.yaml")
    assert not hub.exists()
