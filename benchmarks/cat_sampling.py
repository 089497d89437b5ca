#!/usr/bin/env python
"""Drawing the tokens of CAT: with cached keys and values against two full forward passes per token, as published.

    python benchmarks/cat_sampling.py      (256 tokens, batch 4, guidance 3, 6 layers of width 384: minutes on a CPU)
    python benchmarks/cat_sampling.py --layers 24 --width 1536 --heads 16 --dtype bfloat16   (a GPU)

Both draw the likeliest tokens, and they must be the same. Cached: `CATTransformerModel.generate`. Uncached: for each
token, the whole sequence so far through the transformer, once with the text and once without. In turn in every round;
the ratio is the median over rounds. Writes docs/results/cat_sampling.json.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from tokenizer_runs import ROOT, environment
from torch import Tensor

from favae import CATTransformerModel


def uncached(model: CATTransformerModel, text: Tensor, mask: Tensor, scale: float) -> Tensor:
    """(B, h, w): each token from all before it, which are computed again."""
    size, batch = model.config.sample_size, len(text)
    tokens = torch.zeros(batch, 0, 1, dtype=torch.long, device=text.device)
    states = [model._prepare_text(text, mask), model._prepare_text(text, torch.zeros_like(mask))]
    for _ in range(size**2):
        embeddings = model._add_positions(model.token_head.embed(tokens), 0)
        logits = []
        for state in states:
            hidden = model.norm_in(torch.cat([model.start_token.expand(batch, 1, -1), embeddings], dim=1))
            for block in model.blocks:
                hidden = block(hidden, *state)
            logits.append(model.token_head._logits(model.norm_out(hidden[:, -1:]), tokens[:, :1, :0]).float())
        given, without = logits
        tokens = torch.cat([tokens, (without + scale * (given - without)).argmax(-1, keepdim=True)], dim=1)
    return tokens.view(batch, size, size)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=16, help="tokens along each side")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "docs/results/cat_sampling.json")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = CATTransformerModel(
        sample_size=arguments.size,
        num_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        attention_head_dim=64,
        hidden_size=arguments.width,
    )
    for name, parameter in model.named_parameters():  # an untrained one hardly depends on what came before
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1 if "embedding" in name else 0.05)
    model = model.to(device, getattr(torch, arguments.dtype)).eval()
    text = torch.randn(arguments.batch_size, 77, 768, device=device, dtype=model.dtype)
    mask = torch.arange(77, device=device) < torch.randint(3, 77, (arguments.batch_size, 1), device=device)

    def cached() -> Tensor:
        return model.generate(text, mask, guidance_scale=arguments.guidance_scale, temperature=0)

    ways = {"cached": cached, "uncached": lambda: uncached(model, text, mask, arguments.guidance_scale)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    drawn = {}
    for number in range(arguments.rounds + 1):
        for name, call in ways.items():
            if number == 0 and name == "uncached":  # too long for a warm-up
                continue
            if device == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            drawn[name] = call()
            if device == "cuda":
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - started)
    same = (drawn["cached"] == drawn["uncached"]).float().mean().item()
    assert same == 1 or arguments.dtype != "float32", f"only {same:.0%} of the tokens are the same"
    ratios = [slow / fast for fast, slow in zip(seconds["cached"], seconds["uncached"])]
    tokens = arguments.batch_size * arguments.size**2
    result = {
        "command": " ".join(["python", "benchmarks/cat_sampling.py", *sys.argv[1:]]),
        **environment(),
        **{key: value for key, value in vars(arguments).items() if key not in ("output", "rounds")},
        "parameters": model.num_parameters(),
        "different_tokens": drawn["cached"].unique().numel(),
        "tokens_per_second": {name: tokens / statistics.median(found) for name, found in seconds.items()},
        "speedup": statistics.median(ratios),
        "speedup_range": [min(ratios), max(ratios)],
    }
    arguments.output.write_text(json.dumps(result, indent=1))
    print(
        f"{tokens} tokens: {result['tokens_per_second']['cached']:.0f} per second, {result['speedup']:.1f} times "
        f"({min(ratios):.1f} to {max(ratios):.1f}) two full passes per token"
    )


if __name__ == "__main__":
    main()
