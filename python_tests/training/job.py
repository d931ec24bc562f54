"""Jobs of several processes: toy runs on every rank, with gloo, as a launcher would start them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from toy_training import Child

from fgvc_ext.training import distributed


def start(output: Path, count: int, function: Callable[..., int], *arguments: Any) -> list[Child]:
    """Start `function(*arguments)` on `count` ranks; the output of each goes to its own file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        Child(output.with_suffix(f".{rank}"), _on_rank, rank, count, port, function, arguments) for rank in range(count)
    ]


def run(output: Path, count: int, function: Callable[..., int], *arguments: Any) -> None:
    """`start`, and wait until all have ended well."""
    for child in start(output, count, function, *arguments):
        code, text = child.ended()
        assert code == 0, text


def _on_rank(rank: int, count: int, port: int, function: Callable[..., int], arguments: tuple) -> int:
    torch.set_num_threads(1)
    here = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in here.items()})
    with distributed.joined(timedelta(seconds=60)):
        return function(*arguments)
