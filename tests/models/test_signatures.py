"""Methods that override diffusers' can be called as diffusers', which also looks at their signatures."""

import importlib
import inspect
import pkgutil

import pytest
from diffusers import VQModel

import favae.models
import favae.pipelines
from favae import VQModelFA

MODULES = [
    importlib.import_module(module.name)
    for package in (favae.models, favae.pipelines)
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
]
CLASSES = {
    cls
    for module in MODULES
    for cls in vars(module).values()
    if inspect.isclass(cls) and cls.__module__ == module.__name__
}


def overridden(cls: type) -> list[tuple[str, object, object]]:
    """Methods that a class defines and a class of diffusers defined before: name, ours, theirs."""
    bases = [base for base in cls.__mro__ if base.__module__.startswith("diffusers.")]
    found = []
    for name, value in vars(cls).items():
        theirs = next((vars(base)[name] for base in bases if name in vars(base)), None)
        if theirs is not None and not name.startswith("__") and callable(getattr(value, "__func__", value)):
            found.append((name, value, theirs))
    return found


def assert_takes_the_same(ours, theirs) -> None:
    """The parameters of theirs, in their order, with their defaults; what ours has besides is named by keyword."""
    parameters, expected = (
        inspect.signature(getattr(function, "__func__", function)).parameters for function in (ours, theirs)
    )
    common = [(p.name, p.kind, p.default) for p in parameters.values() if p.name in expected]
    assert common == [(p.name, p.kind, p.default) for p in expected.values()]
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters.values() if p.name not in expected)


METHODS = {
    f"{cls.__name__}.{name}": (ours, theirs)
    for cls in sorted(CLASSES, key=lambda cls: cls.__name__)
    for name, ours, theirs in overridden(cls)
}
METHODS |= {f"VQModelFA.{name}": (getattr(VQModelFA, name), getattr(VQModel, name)) for name in ("encode", "decode")}


def test_methods_are_found():
    assert {"HubModelMixin.save_config", "HubModelMixin.push_to_hub", "ComplementedDecoder.forward"} <= set(METHODS)
    assert {"FullTilesAutoencoderKL.tiled_decode", "CATPipeline.enable_sequential_cpu_offload"} <= set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_an_overriding_method_keeps_the_signature(name):
    assert_takes_the_same(*METHODS[name])
