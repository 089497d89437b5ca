"""The measures of `favae.eval.generation` during training: FID over epochs, and the epochs needed to reach a value."""

import json
import logging
import shutil
from pathlib import Path

from diffusers import DiffusionPipeline

from favae.data.sources import open_source
from favae.distributed import process_state
from favae.errors import NonFiniteError
from favae.eval.features import FeatureExtractor
from favae.eval.generation import measure_samples, protocol_of
from favae.eval.image_sets import SampleFolder
from favae.eval.references import Reference
from favae.eval.results import UINT8, finite
from favae.eval.sampling import sample_to_folder
from favae.files import write_text
from favae.training.config import EvaluationConfig

logger = logging.getLogger(__name__)

LOG = "evaluation.jsonl"


class OnlineEvaluation:
    """Samples and measures a pipeline, and adds a line to evaluation.jsonl; all processes call it together.

    Args:
        config: what to measure.
        folder: of the run.
        size: height and width of the pipeline's images.
    Raises:
        MissingWeights, DataError: if extractor or reference cannot be had.
    """

    def __init__(self, config: EvaluationConfig, folder: Path, size: tuple[int, int]):
        self.config = config
        self.log = folder / LOG
        self.samples = folder / "evaluation"
        self.extractor = FeatureExtractor(config.features, config.weights)
        self.metric = self.extractor.metric("FID")
        reference = Reference(config.reference, [self.extractor], lambda: open_source(config.reference))
        self.references = reference.statistics(size, batch_size=config.batch_size)
        chosen = ("num_images", "guidance_scale", "num_inference_steps")
        self.protocol = {
            **protocol_of(self.references, [self.extractor], size, config.num_images),
            **{key: getattr(config, key) for key in chosen},
            "labels": "balanced",
            "uint8": UINT8,
        }

    def records(self) -> list[dict]:
        """The lines so far; the last of a killed run may be torn and is left out."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def __call__(self, pipeline: DiffusionPipeline, step: int, epoch: float) -> dict[str, float | None]:
        """Returns the measures by name, with EP_FID@k (epochs, None until it is reached; over lines of
        the same protocol), on the main process; nothing if the samples are not finite."""
        config, state = self.config, process_state()
        if state.is_main_process:
            shutil.rmtree(self.samples, ignore_errors=True)  # of a killed run, perhaps by other weights
        state.wait_for_everyone()
        try:
            sample_to_folder(
                pipeline,
                self.samples,
                config.num_images,
                batch_size=config.batch_size,
                guidance_scale=config.guidance_scale,
                num_inference_steps=config.num_inference_steps,
            )
        except NonFiniteError as error:  # in all processes at once; training has its own guard
            logger.warning("step %d was not evaluated: %s", step, error)
            return {}
        samples = SampleFolder(self.samples)
        metrics, _ = measure_samples(samples, self.references, [self.extractor], batch_size=config.batch_size)
        if state.is_main_process:
            records = [record for record in self.records() if record["step"] < step]  # a killed run may have gone on
            records.append(finite({"step": step, "epoch": epoch, **metrics, "protocol": self.protocol}))
            comparable = [record for record in records if record["protocol"] == records[-1]["protocol"]]
            metrics |= (reached := epochs_to_reach(comparable, self.metric, config.targets))
            records[-1] |= reached
            write_text(self.log, "".join(f"{json.dumps(record, allow_nan=False)}\n" for record in records))
            shutil.rmtree(self.samples)
        state.wait_for_everyone()
        return metrics


def epochs_to_reach(records: list[dict], metric: str, targets: list[float]) -> dict[str, float | None]:
    """{"EP_<metric>@k": the first epoch at which the metric was <= k, or None} for each target k."""
    found = {}
    for target in targets:
        epochs = [r["epoch"] for r in records if r.get(metric) is not None and r[metric] <= target]
        found[f"EP_{metric}@{target:g}"] = min(epochs) if epochs else None
    return found
