"""Pipelines on the Hub: diffusers refuses models of other packages there, unless the repository has their code."""

import json
from pathlib import Path

import favae
from favae.files import write_text
from favae.models.hub import write_remote_code

__all__ = ["prepare_for_hub"]


def prepare_for_hub(folder: str | Path) -> None:
    """Changes a saved pipeline with classes of ours so that it opens from the Hub, with `trust_remote_code=True`.

    Names in model_index.json become those of files beside the weights, each a line that imports a class from the
    installed package. Upload the folder afterwards (`hf upload NAME FOLDER`). It, too, opens with that flag only.

    Args:
        folder: of `pipe.save_pretrained`.
    Raises:
        FileNotFoundError: if there is no model_index.json.
    """
    folder = Path(folder)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    for name, entry in index.items():
        if name == "_class_name" and isinstance(entry, str) and hasattr(favae, entry):
            index[name] = [write_remote_code(getattr(favae, entry), folder).stem, entry]
        elif isinstance(entry, list) and str(entry[0]).startswith("favae."):
            component = _inside(folder, name)
            index[name] = [write_remote_code(getattr(favae, entry[1]), component).stem, entry[1]]
    write_text(folder / "model_index.json", json.dumps(index, indent=2) + "\n")


def _inside(folder: Path, name: str) -> Path:
    """A component's folder; names come from a file that somebody else may have written."""
    path = folder / name
    if path.resolve().parent != folder.resolve():
        raise ValueError(f"{folder}/model_index.json names a component outside the folder: {name!r}")
    return path
