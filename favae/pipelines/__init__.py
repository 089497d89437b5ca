"""Pipelines: saved by the training scripts, loaded by `DiffusionPipeline.from_pretrained` once favae is imported."""

import diffusers

from favae.pipelines.pipeline_cat import CATPipeline
from favae.pipelines.pipeline_lightningdit import LightningDiTPipeline

__all__ = ["CATPipeline", "LightningDiTPipeline"]

# `DiffusionPipeline.from_pretrained` looks a saved pipeline's class up in the diffusers module and nowhere else.
for _pipeline in (CATPipeline, LightningDiTPipeline):
    setattr(diffusers, _pipeline.__name__, _pipeline)
