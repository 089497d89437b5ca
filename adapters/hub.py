"""Pipelines on the Hub: diffusers refuses classes of other packages there, unless the repository has their code."""

import json
from pathlib import Path

import favae
from favae.files import write_text
from favae.models.hub import write_remote_code

__all__ = ["prepare_for_hub"]


def prepare_for_hub(folder: str | Path) -> None:
    """Changes a saved pipeline that has classes of ours so that it opens from the Hub with `trust_remote_code=True`.

    The names of our classes in model_index.json become names of files beside the weights, each of which is one line
    that imports the class from the installed package. Upload the folder afterwards (`hf upload NAME FOLDER`). The local
    folder needs the flag from then on, too.

    Args:
        folder: where `pipe.save_pretrained` has saved it.
    Raises:
        FileNotFoundError: if the folder has no model_index.json.
        ValueError: if model_index.json names a component outside the folder.
    """
    folder = Path(folder)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    for name, entry in index.items():
        if name == "_class_name" and isinstance(entry, str) and hasattr(favae, entry):
            index[name] = [write_remote_code(getattr(favae, entry), folder).stem, entry]
        elif isinstance(entry, list) and str(entry[0]).startswith("favae."):
            component = _component_folder(folder, name)
            index[name] = [write_remote_code(getattr(favae, entry[1]), component).stem, entry[1]]
    write_text(folder / "model_index.json", json.dumps(index, indent=2) + "\n")


def _component_folder(folder: Path, name: str) -> Path:
    """The folder of a component. Its name comes from a file that somebody else may have written."""
    path = folder / name
    if path.resolve().parent != folder.resolve():
        raise ValueError(f"{folder}/model_index.json names a component outside the folder: {name!r}")
    return path
