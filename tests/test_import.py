"""What `import favae` costs, and that diffusers finds our pipelines whichever of the two is imported first."""

import importlib
import subprocess
import sys

import pytest
from conftest import ROOT, TINY_LIGHTNINGDIT
from diffusers import FlowMatchEulerDiscreteScheduler

from favae import LightningDiTPipeline, LightningDiTTransformer2DModel


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def saved_pipeline(tmp_path, tiny_favae):
    transformer = LightningDiTTransformer2DModel(**TINY_LIGHTNINGDIT)
    pipe = LightningDiTPipeline(transformer, tiny_favae, FlowMatchEulerDiscreteScheduler(), None, None)
    pipe.save_pretrained(tmp_path)
    return tmp_path


OPEN = """
pipe = diffusers.DiffusionPipeline.from_pretrained({!r})
print(type(pipe) is favae.LightningDiTPipeline, type(pipe.vae) is favae.AutoencoderKLFA)
"""


def test_import_is_light_and_leaves_diffusers_as_it_was(saved_pipeline):
    code = """
import importlib.util, sys
import favae
heavy = {"torch", "diffusers", "transformers", "timm", "torchvision"} & set(sys.modules)
assert not heavy, heavy
assert importlib.util.find_spec("diffusers") is not None and "diffusers" not in sys.modules
import diffusers
assert not any(name.startswith("favae.pipelines.pipeline") for name in sys.modules)
assert not any(type(finder).__module__.startswith("favae") for finder in sys.meta_path)
try:
    diffusers.NoSuchPipeline
except AttributeError as error:
    assert "NoSuchPipeline" in str(error)
else:
    raise AssertionError
print(diffusers.AutoencoderKL.__name__, diffusers.LightningDiTPipeline.__module__)
"""
    found = run_python(code + OPEN.format(str(saved_pipeline))).split()
    assert found == ["AutoencoderKL", "favae.pipelines.pipeline_lightningdit", "True", "True"]


def test_saved_pipelines_open_where_diffusers_was_imported_first(saved_pipeline):
    assert run_python("import diffusers, favae" + OPEN.format(str(saved_pipeline))).split() == ["True", "True"]


@pytest.mark.parametrize("package", ["favae", "favae.models", "favae.pipelines"])
def test_every_name_that_is_promised_is_there(package):
    module = importlib.import_module(package)
    assert set(module.__all__) <= set(dir(module))
    for name in module.__all__:
        assert getattr(module, name).__name__ == name
    with pytest.raises(AttributeError, match="NoSuchName"):
        module.NoSuchName  # noqa: B018
