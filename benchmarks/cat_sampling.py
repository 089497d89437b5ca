#!/usr/bin/env python
"""Sampling the tokens of CAT: with cached keys and values against two full forward passes per token, as published.

    python -m benchmarks.cat_sampling      (256 tokens, batch 4, guidance 3, 6 layers of width 384: minutes on a CPU)
    python -m benchmarks.cat_sampling --layers 24 --width 1536 --heads 16 --dtype bfloat16      (on a GPU)

Both take the likeliest tokens, which must be the same. Cached: `CATTransformerModel.generate`. Uncached: for each
token, the whole sequence so far goes through the transformer, once with the text and once without. Both sample in turn
in every round. Writes docs/results/cat_sampling.json.
"""

import torch
from torch import Tensor

from benchmarks.timing import (
    device,
    environment,
    make_parser,
    parse_arguments,
    speedup,
    time_paired,
    with_range,
    write_result,
)
from favae import CATTransformerModel


def uncached(model: CATTransformerModel, text: Tensor, mask: Tensor, scale: float) -> Tensor:
    """(B, h, w): each token from all tokens before it, which go through the transformer again."""
    size, batch = model.config.sample_size, len(text)
    tokens = torch.zeros(batch, 0, 1, dtype=torch.long, device=text.device)
    conditions = [model._prepare_text(text, mask), model._prepare_text(text, torch.zeros_like(mask))]
    for _ in range(size**2):
        embeddings = model.token_head.embed(tokens)
        logits = []
        for condition in conditions:
            hidden = model._inputs(embeddings, batch, 0)
            for block in model.blocks:
                hidden = block(hidden, *condition)
            logits.append(model.token_head._logits(model.norm_out(hidden[:, -1:]), tokens[:, :1, :0]).float())
        given, without = logits
        tokens = torch.cat([tokens, (without + scale * (given - without)).argmax(-1, keepdim=True)], dim=1)
    return tokens.view(batch, size, size)


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--size", type=int, default=16, help="tokens along each side")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parse_arguments(parser, "cat_sampling.json", argv, rounds=3)

    # Large random weights: the tokens of an untrained model hardly depend on those before them.
    torch.manual_seed(0)
    model = CATTransformerModel(
        sample_size=arguments.size,
        num_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        attention_head_dim=64,
        hidden_size=arguments.width,
    )
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1 if "embedding" in name else 0.05)
    model = model.to(device(), getattr(torch, arguments.dtype)).eval()
    text = torch.randn(arguments.batch_size, 77, 768, device=device(), dtype=model.dtype)
    mask = torch.arange(77, device=device()) < torch.randint(3, 77, (arguments.batch_size, 1), device=device())

    timings = time_paired(
        {
            "cached": lambda: model.generate(text, mask, guidance_scale=arguments.guidance_scale, temperature=0),
            "uncached": lambda: uncached(model, text, mask, arguments.guidance_scale),
        },
        rounds=arguments.rounds,
    )
    tokens = timings["cached"].result
    same = (tokens == timings["uncached"].result).float().mean().item()
    assert same == 1 or arguments.dtype != "float32", f"only {same:.0%} of the tokens are the same"
    settings = ("size", "batch_size", "layers", "width", "heads", "guidance_scale", "dtype")
    result = environment() | {
        **{key: getattr(arguments, key) for key in settings},
        "parameters": model.num_parameters(),
        "different_tokens": tokens.unique().numel(),
        "tokens_per_second": {name: tokens.numel() / timing.median for name, timing in timings.items()},
        **speedup(timings["cached"].seconds, timings["uncached"].seconds),
    }
    write_result(arguments.output, result)
    speed = result["tokens_per_second"]["cached"]
    print(f"{tokens.numel()} tokens: {speed:.0f} per second, {with_range(result, 1)} two full passes per token")


if __name__ == "__main__":
    main()
