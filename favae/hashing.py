"""Hashes of models, files and settings: how caches and results say what they were made with."""

import hashlib
import json
import zlib
from pathlib import Path

import torch
from torch import nn


def hash_model(model: nn.Module, settings: object = None) -> str:
    """SHA-256 of the names and values of all parameters and buffers, in hexadecimal.

    Args:
        model: on any device.
        settings: anything JSON can write that determines the output besides the weights; None hashes weights alone.
    """
    digest = hashlib.sha256()
    if settings is not None:
        digest.update(json.dumps(settings, sort_keys=True, default=list).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file's content, in hexadecimal; the file is read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 24):
            digest.update(piece)
    return digest.hexdigest()


def checksum(path: str | Path) -> int:
    """CRC-32 of a file's content: cheap, and finds what was damaged by accident."""
    value = 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 24):
            value = zlib.crc32(piece, value)
    return value
