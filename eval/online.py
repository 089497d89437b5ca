"""Metrics during training: of a tokenizer's reconstructions and latents, and of a generator's samples.

They go to evaluation.jsonl in the run folder, one line for each time. Training itself is the same without them.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, ModelMixin

from favae.data.images import ImageDataset
from favae.data.sources import Selection, open_source
from favae.distributed import process_state
from favae.errors import ModelError, NonFiniteError
from favae.eval.compression import bits_per_pixel
from favae.eval.extraction import image_statistics
from favae.eval.features import FeatureExtractor
from favae.eval.generation import measure_samples, protocol_of
from favae.eval.image_sets import CroppedImages, SampleFolder
from favae.eval.latent_evaluation import labels_of, latent_metrics
from favae.eval.reconstruction import Encode, evaluate_reconstruction, mode
from favae.eval.references import Reference
from favae.eval.results import without_non_finite
from favae.eval.sample_sets import sampling_protocol, steps_argument
from favae.eval.sampling import sample_to_folder
from favae.eval.seams import patch_size_of
from favae.files import read_json_lines, write_text
from favae.losses.perceptual import LPIPS
from favae.models import HyperpriorModelFA
from favae.training.generator_config import EvaluationConfig
from favae.training.tokenizer_config import TokenizerEvaluationConfig

logger = logging.getLogger(__name__)

LOG_FILE = "evaluation.jsonl"
TARGETS = (2.0, 5.0, 10.0)  # values of FID, for the epochs until FID is at most this


class EvaluationLog:
    """evaluation.jsonl in a run folder."""

    def __init__(self, folder: Path):
        self.file = folder / LOG_FILE

    def before(self, step: int) -> list[dict]:
        """The lines of earlier steps. A run that was killed may have been ahead."""
        records = read_json_lines(self.file) if self.file.exists() else []
        return [record for record in records if record["step"] < step]

    def add(self, record: dict) -> None:
        """Adds a line after those of earlier steps."""
        lines = [json.dumps(line, allow_nan=False) for line in [*self.before(record["step"]), record]]
        write_text(self.file, "".join(f"{line}\n" for line in lines))


class TokenizerEvaluation:
    """Measures reconstructions and latents of an autoencoder. All processes call it together.

    Args:
        config: what to measure.
        folder: of the run.
        resolution, channels: of the images.
        lpips: None measures no LPIPS.
        encode: gives the latents that are decoded.
    Raises:
        MissingWeights, DataError: if the extractor or the images cannot be opened.
    """

    def __init__(
        self,
        config: TokenizerEvaluationConfig,
        folder: Path,
        *,
        resolution: int,
        channels: int,
        lpips: LPIPS | None = None,
        encode: Encode = mode,
    ):
        self.log, self.lpips, self.encode = EvaluationLog(folder), lpips, encode
        self.loading = {"batch_size": config.batch_size, "num_workers": config.num_workers}
        columns = {"image_column": config.image_column, "label_column": config.label_column}
        source = Selection(open_source(config.data, config.split, **columns), config.num_images)
        self.images = ImageDataset(source, resolution, channels=channels)
        labels_of(self.images, [])  # bad labels are reported now, not at the first evaluation
        self.extractors = [FeatureExtractor(config.features, config.weights)] if config.features else []
        self.references = []
        if self.extractors:
            self.references = image_statistics(CroppedImages(self.images), self.extractors, keep=0, **self.loading)
        self.protocol = {
            "data_name": config.data,
            "num_images": len(self.images),
            "resolution": resolution,
            "features": {extractor.name: extractor.hash for extractor in self.extractors},
        }
        self._warned = False

    def __call__(self, vae: ModelMixin, step: int, epoch: float) -> dict[str, float | None]:
        """Measures the autoencoder, and adds a line to the log.

        Returns:
            Metrics by name; nothing if a reconstruction is not finite.
        """
        try:
            found = evaluate_reconstruction(
                vae,
                self.images,
                self.extractors,
                self.references,
                lpips=self.lpips,
                encode=self.encode,
                keep_latents=not hasattr(vae, "quantize"),
                **self.loading,
            )
        except ModelError as error:  # raised by all processes; training itself also looks for such values
            logger.warning("step %d was not evaluated: %s", step, error)
            return {}
        metrics = dict(found.metrics)
        if process_state().is_main_process:
            if found.latents is not None:
                labels = labels_of(self.images, found.indices.tolist())
                meters, _, missing = latent_metrics(found.latents, labels)
                metrics |= meters
                for reason in [] if self._warned else missing:
                    logger.warning("%s", reason)
                self._warned = True
            if isinstance(vae, HyperpriorModelFA):
                metrics["bpp"] = bits_per_pixel(vae, self.images)
            self.log.add(without_non_finite({"step": step, "epoch": epoch, **metrics, "protocol": self.protocol}))
        process_state().wait_for_everyone()
        return metrics


class GeneratorEvaluation:
    """Samples and measures a pipeline. All processes call it together.

    Args:
        config: what to measure.
        folder: of the run.
        size: height and width of the pipeline's images.
    Raises:
        MissingWeights, DataError: if the extractor or the reference cannot be opened.
    """

    def __init__(self, config: EvaluationConfig, folder: Path, size: tuple[int, int]):
        self.config, self.log = config, EvaluationLog(folder)
        self.samples = folder / "evaluation"
        self.extractor = FeatureExtractor(config.features, config.weights)
        self.metric = self.extractor.metric("FID")
        reference = Reference(config.reference, [self.extractor], lambda: open_source(config.reference))
        self.references = reference.statistics(size, batch_size=config.batch_size)
        self.protocol = protocol_of(self.references, [self.extractor], size, config.num_images)

    def __call__(self, pipeline: DiffusionPipeline, step: int, epoch: float) -> dict[str, float | None]:
        """Measures the pipeline.

        Returns:
            On the main process, metrics by name, with EP_FID@k: the epochs until FID was at most k, over the lines of
            the same protocol, or None. Nothing if samples are not finite.
        """
        config, state = self.config, process_state()
        settings = {**config.guidance, **steps_argument(pipeline, config.num_inference_steps)}
        if state.is_main_process:
            shutil.rmtree(self.samples, ignore_errors=True)  # of a killed run, perhaps with other weights
        state.wait_for_everyone()
        try:
            sample_to_folder(
                pipeline,
                self.samples,
                config.num_images,
                batch_size=config.batch_size,
                **settings,
            )
        except NonFiniteError as error:  # raised by all processes; training itself also looks for such values
            logger.warning("step %d was not evaluated: %s", step, error)
            return {}
        samples = SampleFolder(self.samples)
        options = {"batch_size": config.batch_size, "patch_size": patch_size_of(pipeline.vae)}
        metrics, _ = measure_samples(samples, self.references, [self.extractor], **options)
        if state.is_main_process:
            sampling = {**sampling_protocol(pipeline, settings, labels="balanced"), "seed": 0}
            protocol = {**self.protocol, **sampling, "guidance_scale": config.guidance_scale}
            metrics |= self._log(step, epoch, metrics, protocol)
            shutil.rmtree(self.samples)
        state.wait_for_everyone()
        return metrics

    def _log(
        self, step: int, epoch: float, metrics: dict[str, float | None], protocol: dict[str, Any]
    ) -> dict[str, float | None]:
        """Adds a line to the log, and returns the epochs that were needed to reach each target."""
        record = without_non_finite({"step": step, "epoch": epoch, **metrics, "protocol": protocol})
        comparable = [other for other in self.log.before(step) if other.get("protocol") == record["protocol"]]
        reached = epochs_to_reach([*comparable, record], self.metric, TARGETS)
        self.log.add(record | reached)
        return reached


def epochs_to_reach(records: list[dict], metric: str, targets: tuple[float, ...]) -> dict[str, float | None]:
    """{"EP_<metric>@k": the first epoch at which the metric was at most k, or None} for each target k."""
    found = {}
    for target in targets:
        epochs = [record["epoch"] for record in records if record.get(metric) is not None and record[metric] <= target]
        found[f"EP_{metric}@{target:g}"] = min(epochs) if epochs else None
    return found
