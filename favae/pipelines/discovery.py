"""Lets `DiffusionPipeline.from_pretrained` find the pipelines and the models of this package.

A saved pipeline is named by its class alone, and diffusers looks that name up as an attribute of the module `diffusers`
and nowhere else. A model in a pipeline is named by its module and class, and diffusers looks for the module among the
attributes of `diffusers.pipelines` and the modules that are imported. So both modules get a `__getattr__` (PEP 562)
that imports ours when they are asked for. Neither diffusers nor our classes are imported before somebody needs them.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def make_known_to_diffusers() -> None:
    """Adds our classes to the module `diffusers`: now if it is imported already, else as soon as it has been."""
    if "diffusers" in sys.modules:
        _add_classes(sys.modules["diffusers"])
    else:
        sys.meta_path.insert(0, _DiffusersFinder())


def _add_classes(diffusers: ModuleType) -> None:
    def find_pipeline(name: str) -> type:
        pipelines = importlib.import_module("favae.pipelines")
        if name not in pipelines.__all__:  # diffusers' own `__getattr__` is asked next
            raise AttributeError(f"module 'diffusers' has no attribute '{name}'")
        return getattr(pipelines, name)

    def find_model_module(name: str) -> ModuleType:
        models = importlib.import_module("favae.models")
        known = {f"favae.models.{module}" for module in models.CLASSES_BY_MODULE} | {"favae.pipelines.solvers"}
        if name not in known:
            raise AttributeError(f"module 'diffusers.pipelines' has no attribute '{name}'")
        return importlib.import_module(name)

    vars(diffusers)["__getattr__"] = find_pipeline
    vars(importlib.import_module("diffusers.pipelines"))["__getattr__"] = find_model_module


class _DiffusersFinder(MetaPathFinder):
    """Finds diffusers as the other finders do, and adds our classes to it after it has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "diffusers":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((found for found in specs if found is not None), None)
        if spec is not None and spec.loader is not None:
            self._extend(spec.loader)
        return spec

    def _extend(self, loader) -> None:
        execute = loader.exec_module  # of this one loader; every spec has its own

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _add_classes(sys.modules["diffusers"])  # diffusers replaces its module while it is executed

        loader.exec_module = exec_module
