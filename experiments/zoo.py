"""Writes zoo/flux2-wavelet-tiny: a finished run in float16, with its measures and its card.

    FAVAE_TAEF2=FOLDER FAVAE_PHOTOGRAPHS=photographs python -m experiments.zoo --run runs/flux2_wavelet_tiny

The run is one of configs/tokenizer/flux2_wavelet_tiny.yaml; the measures are those of experiments/real_latents.py, on
the same held-out crops. Writes docs/results/zoo.json as well.
"""

from pathlib import Path

import torch
from huggingface_hub import ModelCard
from torch import Tensor

from benchmarks.timing import ROOT, environment, make_parser, write_result
from experiments import real_latents
from experiments.real_latents import cost, crops, decoded, errors, perception
from experiments.report import format_table
from favae import AutoencoderTinyFA
from favae.files import atomic_path, read_json, read_json_lines, write_text
from favae.models.hub import describe_model

NAME = "flux2-wavelet-tiny"
COSTS = ROOT / "docs/results/decoder_cost.json"  # written by benchmarks/decoder_cost.py
CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: image-to-image
tags: [vae, autoencoder, favae]
---

# {name}

FLUX.2's latents, decoded by a network of {params:.1f} M parameters that leaves the last two octaves to an inverse
wavelet transform: {gflop:.1f} GFLOP for 256 px, where FLUX.2's own decoder needs {stock:.0f} and TAEF2's {taef2:.1f}. A
small encoder for the same latents is with it. The latents are normalized, as generators see them and as TAEF2's are.

It was trained from scratch: no weight is anybody else's. It learned from {steps:,} steps of 8 windows of 64 px, from
fewer than 200 photographs, and from what TAEF2's encoder (madebyollin/taesd, MIT) makes of them. That is little: expect
fair colors and soft textures. It is a model to begin with, and the start of a better one
(`model.from_pretrained=zoo/{name}`), not a replacement for FLUX.2's decoder.

On {images} held-out crops of 128 px:

{table}

```bash
favae reconstruct cat.jpg --model zoo/{name} --output cat.png
```

```python
from diffusers import Flux2KleinPipeline
from favae import AutoencoderTinyFA
from favae.adapters.pipelines import swap_vae

pipe = Flux2KleinPipeline.from_pretrained("black-forest-labs/FLUX.2-klein-4B")
pipe = swap_vae(pipe, AutoencoderTinyFA.from_pretrained("zoo/{name}"))
```
"""


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(str(__doc__))
    parser.add_argument("--run", type=Path, required=True, help="the run folder")
    parser.add_argument("--output", type=Path, default=ROOT / "zoo" / NAME, help=f"default: zoo/{NAME}")
    parser.add_argument("--results", type=Path, default=ROOT / "docs/results/zoo.json")
    arguments = parser.parse_args(argv)

    # The weights as they will be: rounded to float16.
    model = AutoencoderTinyFA.from_pretrained(arguments.run / "final").half().float().eval()
    steps = read_json_lines(arguments.run / "metrics.jsonl")[-1]["step"]
    images = crops("heldout")
    result = {"steps": steps, **cost(model), "images": len(images), "rows": measure(model, images)}
    write_result(arguments.results, environment() | result)
    model.register_to_config(_name_or_path=f"zoo/{NAME}")  # not where the run was
    with atomic_path(arguments.output) as folder:
        model.half().save_pretrained(folder)
        write_text(folder / "README.md", card(model, result, (arguments.run / "config.yaml").read_text()))


def measure(model: AutoencoderTinyFA, images: Tensor) -> list[dict]:
    """What TAEF2 and the model make of held-out images, in all ways that their halves can be joined."""
    teacher = AutoencoderTinyFA.from_pretrained(real_latents.teacher_folder()).eval()
    pairs = {
        "TAEF2": (teacher, teacher),
        "TAEF2's encoder, this decoder": (teacher, model),
        "this encoder and decoder": (model, model),
        "this encoder, TAEF2's decoder": (model, teacher),
    }
    rows = []
    for name, (encoder, decoder) in pairs.items():
        reconstructions = decoded(decoder, encoder, images)
        rows.append({"model": name, **errors(images, reconstructions), **perception(images, reconstructions)})
    return rows


def card(model: AutoencoderTinyFA, result: dict, recipe: str) -> str:
    """The model card, in the form that the Hub reads."""
    digits = {"psnr": 2, "ssim": 3, "fd": 1, "seams": 2}
    cells = [[row["model"], *(f"{row[key]:.{count}f}" for key, count in digits.items())] for row in result["rows"]]
    table = format_table(["", "PSNR", "SSIM", "FD (efficientnet-lite0)", "seams"], cells)
    numbers = {key: result[key] for key in ("gflop", "steps", "images")}
    numbers["stock"] = read_json(COSTS)["results"]["flux2 stock"]["gflop"]
    numbers["taef2"] = cost(AutoencoderTinyFA.from_pretrained(real_latents.teacher_folder()))["gflop"]
    written = ModelCard(CARD.format(name=NAME, params=result["params"] / 1e6, table=table, **numbers))
    describe_model(written, model, f"zoo/{NAME}", recipe)
    return str(written)


if __name__ == "__main__":
    with torch.no_grad():
        main()
