"""Pipelines: saved by the training scripts, loaded by `DiffusionPipeline.from_pretrained` once favae is imported."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from favae.pipelines.pipeline_cat import CATPipeline as CATPipeline
    from favae.pipelines.pipeline_lightningdit import LightningDiTPipeline as LightningDiTPipeline
    from favae.pipelines.solvers import FlowMatchSDEScheduler as FlowMatchSDEScheduler

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "pipeline_cat": ["CATPipeline"],
        "pipeline_lightningdit": ["LightningDiTPipeline"],
        "solvers": ["FlowMatchSDEScheduler"],
    },
)
