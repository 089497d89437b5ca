"""What a model of ours needs on the Hub: a line of code that finds its class, and a card that says what it is."""

import json
from pathlib import Path

START, END = "<!-- favae -->", "<!-- end of favae -->"
STATISTICS = ("latent_channels", "scaling_factor", "shift_factor", "latents_mean", "latents_std")


class HubModelMixin:
    """Goes before `ModelMixin`. Saved models open with `AutoModel.from_pretrained(..., trust_remote_code=True)`.

    Beside the weights lies a file of one line, which imports the class from the installed package: nothing else is
    executed.
    """

    _recipe = _metrics = None

    @property
    def _auto_class(self) -> str | None:
        """Makes `save_config` write the name of that file and the class into config.json."""
        return "AutoModel" if _is_ours(type(self)) else None

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **options):
        """As in [`ConfigMixin`], which warns of the entry that it wrote itself."""
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **options)

    def save_pretrained(self, save_directory, is_main_process: bool = True, *arguments, **options) -> None:
        """As in [`ModelMixin`]."""
        folder = Path(save_directory)
        if is_main_process and _is_ours(type(self)) and not folder.is_file():  # of which `ModelMixin` says so
            write_remote_code(type(self), folder)
        super().save_pretrained(save_directory, is_main_process, *arguments, **options)

    def push_to_hub(
        self, repo_id: str, *arguments, recipe: str | Path | None = None, metrics: str | Path | None = None, **options
    ) -> str:
        """Uploads the model with a model card; without one into a subfolder.

        Args:
            repo_id: its name on the Hub.
            recipe: a file, the config.yaml of its training; where it is None, that of the run folder from which the
                model was loaded, if there is one.
            metrics: a file, results.json of an evaluator.
            arguments, options: as in [`ModelMixin`].
        """
        model_card(self, repo_id, recipe, metrics)  # what is wrong with the files is said before anything is uploaded
        self._recipe, self._metrics = recipe, metrics
        try:
            return super().push_to_hub(repo_id, *arguments, **options)
        finally:
            self._recipe = self._metrics = None

    def _upload_folder(self, working_dir, repo_id: str, *arguments, **options):
        readme = Path(working_dir) / "README.md"
        if readme.exists():  # diffusers writes none for a subfolder
            card = model_card(self, repo_id, self._recipe, self._metrics)
            readme.write_text(_with_section(readme.read_text(encoding="utf-8"), card), encoding="utf-8")
        return super()._upload_folder(working_dir, repo_id, *arguments, **options)


def _is_ours(kind: type) -> bool:
    """Whether the package exports the class: subclasses that users write are theirs to find."""
    import favae

    return getattr(favae, kind.__name__, None) is kind


def write_remote_code(kind: type, folder: Path) -> Path:
    """Writes the file that finds a class of ours: named as the last part of its module, as diffusers looks for it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{kind.__module__.rpartition('.')[2]}.py"
    file.write_text(f"from favae import {kind.__name__}  # noqa: F401\n", encoding="utf-8")
    return file


def model_card(model, repo_id: str, recipe: str | Path | None = None, metrics: str | Path | None = None) -> str:
    """Markdown: what the model is, how to open it, its latents' statistics, its metrics and its recipe.

    Raises:
        FileNotFoundError: if the recipe or the metrics are not there.
        ValueError: if the metrics are not results.json of an evaluator.
    """
    kind, config = type(model).__name__, model.config
    folder = Path(config.get("_name_or_path") or "")
    if recipe is None and folder.name == "final" and (folder.parent / "config.yaml").is_file():
        recipe = folder.parent / "config.yaml"
    parts = [
        f"# {kind}",
        f"{model.num_parameters() / 1e6:.1f} M parameters. With the package favae, `from favae import {kind}`:",
        f'```python\nmodel = {kind}.from_pretrained("{repo_id}")\n```',
        f'or `diffusers.AutoModel.from_pretrained("{repo_id}", trust_remote_code=True)`; the code is one line, which '
        "imports that class.",
    ]
    statistics = [{"setting": name, "value": config[name]} for name in STATISTICS if name in config]
    if statistics:
        parts += ["## Latents", "`encode` and `decode` apply none of these; pipelines do.", _table(statistics)]
    if metrics is not None:
        parts += ["## Measured", *_measured(Path(metrics))]
    if recipe is not None:
        parts += ["## Trained with", f"```yaml\n{Path(recipe).read_text(encoding='utf-8').strip()}\n```"]
    return "\n\n".join(parts)


def _measured(file: Path) -> list[str]:
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        rows = [
            {"model": row["model"], **{name: value for name, value in row["metrics"].items() if value is not None}}
            for row in result["rows"]
        ]
        protocol = [{"protocol": name, "value": value} for name, value in result["protocol"].items()]
        return [f"`{result['command']}`", _table(rows), _table(protocol)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no results.json of an evaluator ({error!r})") from error


def _table(rows: list[dict]) -> str:
    headings = list(dict.fromkeys(name for row in rows for name in row))
    lines = [headings, ["---"] * len(headings), *([_cell(row.get(name, "")) for name in headings] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_cell, value)) + "]"
    return (f"{value:.5g}" if isinstance(value, float) else str(value)).replace("|", "/").replace("\n", " ")


def _with_section(text: str, section: str) -> str:
    """A card with ours in the place of an older one of ours; what others wrote around it stays."""
    before, start, rest = text.partition(START)
    after = rest.partition(END)[2] if start else ""
    return f"{before.rstrip()}\n\n{START}\n{section}\n{END}\n{after.lstrip()}"
