"""Metrics of generated images during training: FID over epochs, and the epochs that were needed to reach a value."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from favae.data.sources import open_source
from favae.distributed import process_state
from favae.errors import NonFiniteError
from favae.eval.features import FeatureExtractor
from favae.eval.generation import measure_samples, protocol_of, sampling_protocol
from favae.eval.image_sets import SampleFolder
from favae.eval.references import Reference
from favae.eval.results import finite
from favae.eval.sampling import sample_to_folder
from favae.files import read_json_lines, write_text
from favae.training.config import EvaluationConfig

logger = logging.getLogger(__name__)

LOG_FILE = "evaluation.jsonl"
TARGETS = (2.0, 5.0, 10.0)  # values of FID, for the epochs until FID is at most this


class OnlineEvaluation:
    """Samples and measures a pipeline, and adds a line to evaluation.jsonl. All processes call it together.

    Args:
        config: what to measure.
        folder: of the run.
        size: height and width of the pipeline's images.
    Raises:
        MissingWeights, DataError: if the extractor or the reference cannot be opened.
    """

    def __init__(self, config: EvaluationConfig, folder: Path, size: tuple[int, int]):
        self.config = config
        self.log = folder / LOG_FILE
        self.samples = folder / "evaluation"
        self.extractor = FeatureExtractor(config.features, config.weights)
        self.metric = self.extractor.metric("FID")
        reference = Reference(config.reference, [self.extractor], lambda: open_source(config.reference))
        self.references = reference.statistics(size, batch_size=config.batch_size)
        self.protocol = {
            **protocol_of(self.references, [self.extractor], size, config.num_images),
            "num_images": config.num_images,
        }

    def records(self) -> list[dict]:
        """The lines so far."""
        return read_json_lines(self.log) if self.log.exists() else []

    def __call__(self, pipeline: DiffusionPipeline, step: int, epoch: float) -> dict[str, float | None]:
        """Measures the pipeline.

        Returns:
            On the main process, metrics by name, with EP_FID@k: the epochs until FID was at most k, over the lines of
            the same protocol, or None. Nothing if samples are not finite.
        """
        config, state = self.config, process_state()
        settings = {**config.guidance, "num_inference_steps": config.num_inference_steps}
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
        metrics, _ = measure_samples(samples, self.references, [self.extractor], batch_size=config.batch_size)
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
        records = [record for record in self.records() if record["step"] < step]  # a killed run may have been ahead
        record = finite({"step": step, "epoch": epoch, **metrics, "protocol": protocol})
        comparable = [other for other in records if other.get("protocol") == record["protocol"]]
        reached = epochs_to_reach([*comparable, record], self.metric, TARGETS)
        lines = [json.dumps(line, allow_nan=False) for line in [*records, record | reached]]
        write_text(self.log, "".join(f"{line}\n" for line in lines))
        return reached


def epochs_to_reach(records: list[dict], metric: str, targets: tuple[float, ...]) -> dict[str, float | None]:
    """{"EP_<metric>@k": the first epoch at which the metric was at most k, or None} for each target k."""
    found = {}
    for target in targets:
        epochs = [record["epoch"] for record in records if record.get(metric) is not None and record[metric] <= target]
        found[f"EP_{metric}@{target:g}"] = min(epochs) if epochs else None
    return found
