"""What a model of ours needs on the Hub: a line of code that finds its class, and a card that says what it is."""

import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

import diffusers
import yaml
from diffusers import ConfigMixin, ModelMixin
from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card
from huggingface_hub import EvalResult, ModelCard, create_repo

from favae.normalization import NO_LATENT_STATISTICS

SECTION_START, SECTION_END = "<!-- favae -->", "<!-- end of favae -->"
# Settings for previews of latents; see `favae.adapters.latent_previews`. No class takes them as arguments.
LATENT_RGB_KEYS = ("latent_rgb_factors", "latent_rgb_factors_bias")
LATENT_STATISTICS = ("latent_channels", *NO_LATENT_STATISTICS, *LATENT_RGB_KEYS)
TASK_BY_EVALUATION = {
    **dict.fromkeys(("reconstruction", "compression", "latents"), "image-to-image"),
    "generation": "unconditional-image-generation",
}


def find_class(name: str) -> type[ModelMixin]:
    """The class of models of this name: one of ours, one of diffusers, or one that is defined in an imported module.

    Raises:
        AttributeError: if there is none.
    """
    import favae  # which imports this module

    known = getattr(favae, name, None) or getattr(diffusers, name, None)
    return known or _imported_class(name) or getattr(diffusers, name)  # which says what is missing


def _imported_class(name: str) -> type[ModelMixin] | None:
    classes = [ModelMixin]
    for model_class in classes:
        if model_class.__name__ == name:
            return model_class
        classes += model_class.__subclasses__()
    return None


class HubModelMixin(ModelMixin, ConfigMixin):
    """The first base of our models. They open with `AutoModel.from_pretrained(..., trust_remote_code=True)`.

    `save_pretrained` writes a file of one line beside the weights, which imports the class from the installed package,
    into every folder, so that a folder can be uploaded as it is. No other code is executed.
    The modules of models import `ModelMixin` themselves: pipelines of diffusers look for it there.
    """

    @property
    def _auto_class(self) -> str | None:
        """Makes `save_config` of diffusers write the name of that file and the class into config.json."""
        return "AutoModel" if _is_exported(type(self)) else None

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs):
        """As in [`ConfigMixin`], which would warn of the entry `auto_map` that it wrote itself, and of previews."""
        silent = {"auto_map", *LATENT_RGB_KEYS}
        arguments, unused, hidden = super().extract_init_dict(
            {k: v for k, v in config_dict.items() if k not in silent}, **kwargs
        )
        return arguments, unused, hidden | {k: config_dict[k] for k in LATENT_RGB_KEYS if k in config_dict}

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path_or_dict, **kwargs):
        """Refuses what [`AutoencoderKL`] would try: no file of another program holds networks of ours.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"no single-file layout is for {cls.__name__}: open its folder by {cls.__name__}.from_pretrained"
        )

    def save_config(self, save_directory: str | PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """As in [`ConfigMixin`], and writes the file of one line. `save_pretrained` calls this."""
        if _is_exported(type(self)) and not Path(save_directory).is_file():  # `ConfigMixin` reports a file
            write_remote_code(type(self), Path(save_directory))
        super().save_config(save_directory, push_to_hub, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
        *,
        recipe: str | Path | None = None,
        metrics: str | Path | None = None,
    ) -> str:
        """Uploads the model with a model card; into a subfolder, without one.

        Args:
            repo_id to subfolder: as in [`ModelMixin`].
            recipe: the config.yaml of the training. None takes that of the run folder from which the model was loaded,
                if there is one.
            metrics: results.json of an evaluation.
        Raises:
            FileNotFoundError: if the recipe or the metrics do not exist.
            ValueError: if the metrics are not results.json of an evaluation.
        """
        # Read the files first: nothing is uploaded if one of them is wrong.
        recipe_text = _read_recipe(self, recipe)
        results = None if metrics is None else read_eval_results(metrics)
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization=safe_serialization, variant=variant)
            if not subfolder:
                card = populate_model_card(load_or_create_model_card(repo_id, token=token))
                describe_model(card, self, repo_id, recipe_text, results)
                card.save(Path(folder) / "README.md")
            return super()._upload_folder(folder, repo_id, token, commit_message, create_pr, subfolder)

    def _upload_folder(
        self,
        working_dir: str | PathLike,
        repo_id: str,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        subfolder: str | None = None,
    ):
        """Called for `push_to_hub=True`, by `save_config` and by `save_pretrained`, whose card describes no model."""
        readme = Path(working_dir) / "README.md"
        if readme.is_file():
            card = ModelCard.load(readme)
            describe_model(card, self, repo_id, _read_recipe(self))
            card.save(readme)
        return super()._upload_folder(working_dir, repo_id, token, commit_message, create_pr, subfolder)


def _is_exported(model_class: type) -> bool:
    """Whether favae exports the class. Subclasses that users write must be found by the users."""
    import favae

    return model_class.__name__ in favae.__all__ and getattr(favae, model_class.__name__) is model_class


def write_remote_code(exported_class: type, folder: Path) -> Path:
    """Writes the file that imports a class of ours, under the name by which diffusers looks for it: its module's."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{exported_class.__module__.rpartition('.')[2]}.py"
    file.write_text(f"from favae import {exported_class.__name__}  # noqa: F401\n", encoding="utf-8")
    return file


@contextmanager
def silent_about_previews() -> Iterator[None]:
    """Inside the block, diffusers does not warn that its own classes know nothing of `LATENT_RGB_KEYS`.

    They keep these settings all the same.
    """
    logger = logging.getLogger("diffusers.configuration_utils")

    def is_about_others(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(f"The config attributes {{'{LATENT_RGB_KEYS[0]}'")

    logger.addFilter(is_about_others)
    try:
        yield
    finally:
        logger.removeFilter(is_about_others)


def describe_model(
    card: ModelCard, model, repo_id: str, recipe: str | None = None, results: list[EvalResult] | None = None
) -> None:
    """Writes our section of a card, and the results into its metadata; what others wrote stays.

    Args:
        card: changed in place; an older section of ours is replaced.
        model: a `ModelMixin`.
        recipe: the text of the config.yaml of the training.
        results: of an evaluation; None removes older ones.
    """
    name = type(model).__name__
    parts = [
        f"# {name}",
        f"{model.num_parameters() / 1e6:.1f} M parameters. With the package favae, `from favae import {name}`:",
        f'```python\nmodel = {name}.from_pretrained("{repo_id}")\n```',
        f'or `diffusers.AutoModel.from_pretrained("{repo_id}", trust_remote_code=True)`; that code is one line, which '
        "imports the class from favae.",
    ]
    statistics = {key: model.config[key] for key in LATENT_STATISTICS if key in model.config}
    if statistics:
        numbers = yaml.safe_dump(statistics, sort_keys=False, default_flow_style=None, width=120)
        parts += ["## Latents", "`encode` and `decode` do not apply these numbers; pipelines do.", _code_block(numbers)]
    if recipe is not None:
        parts += ["## Training", _code_block(recipe)]

    before, start, rest = card.text.partition(SECTION_START)
    after = rest.partition(SECTION_END)[2] if start else ""
    section = "\n\n".join(parts)
    card.text = f"{before.rstrip()}\n\n{SECTION_START}\n{section}\n{SECTION_END}\n{after.lstrip()}"
    card.data.model_name = name if results else None
    card.data.eval_results = results


def read_eval_results(file: str | Path) -> list[EvalResult]:
    """The metrics in results.json of an evaluation, in the form that the Hub shows.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not results.json of an evaluation.
    """
    text = Path(file).read_text(encoding="utf-8")
    try:
        result = json.loads(text)
        protocol = result["protocol"]
        data = protocol.get("data_name") or protocol.get("reference_name") or "unknown"
        return [
            EvalResult(
                task_type=TASK_BY_EVALUATION[result["task"]],
                dataset_type=data,
                dataset_name=data,
                dataset_args=protocol,
                metric_type=metric,
                metric_name=f"{metric} of {row.get('label', row['model'])}",
                metric_value=value,
            )
            for row in result["rows"]
            if "quality" not in row  # of JPEG and its like, beside a compression model
            for metric, value in row["metrics"].items()
            if value is not None
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not results.json of an evaluation ({error!r})") from error


def _read_recipe(model, recipe: str | Path | None = None) -> str | None:
    """The recipe that is given, or else config.yaml of the run folder whose final/ the model was loaded from."""
    if recipe is not None:
        return Path(recipe).read_text(encoding="utf-8")
    folder = Path(model.config.get("_name_or_path") or "")
    found = folder.parent / "config.yaml"
    return found.read_text(encoding="utf-8") if folder.name == "final" and found.is_file() else None


def _code_block(text: str) -> str:
    return f"```yaml\n{text.strip()}\n```"
