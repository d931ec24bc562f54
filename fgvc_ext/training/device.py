"""The device that the engine trains on, how it computes, and how many processes load images for it."""

from __future__ import annotations

import os

import torch

from fgvc_ext.training import distributed
from fgvc_ext.training.config import EngineConfig, Precision


def choose_device(name: str) -> torch.device:
    """ "auto" is the GPU where there is one; of several, each process of a job on a machine takes its own."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{distributed.current_process().local_rank}"
    elif name.startswith("cuda:") and distributed.current_process().local_size > 1:
        raise ValueError(f"engine.device: expected cuda, of which each of several processes takes its own, got {name}")
    if name == "auto":
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"engine.device: expected auto, cpu, cuda or cuda:NUMBER, got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        seen = torch.cuda.device_count() or "no"
        raise ValueError(f"engine.device: {name} was asked for, but torch {torch.__version__} sees {seen} GPU")
    return device


def describe_device(device: torch.device) -> str:
    """The kind of a device, as far as its results depend on it: "cpu (AVX2)", "cuda (NVIDIA H100)"."""
    kind = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else ""
    if device.type == "cuda":
        kind = torch.cuda.get_device_name(device)
    return f"{device.type} ({kind})" if kind else device.type


def worker_count(engine: EngineConfig) -> int:
    """Processes that load images: as many as were asked for, by default one a core of this process, at most 8.

    Also on a CPU: two of them beside two threads that train were seen to make the demo faster, not slower.
    """
    if engine.workers >= 0:
        return engine.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, max(1, cores // distributed.current_process().local_size))


def choose_precision(engine: EngineConfig, device: torch.device) -> Precision:
    """What "auto" is on this device: decided from the hardware, never from a timing."""
    if engine.precision != "auto":
        return engine.precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def hint_of_bf16(device: torch.device) -> str | None:
    """One line for a CPU that computes in bfloat16 natively; None for others."""
    if device.type != "cpu" or not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return None
    return "this CPU computes in bfloat16: --engine.precision bf16 may train about 1.7 times as fast, with fewer digits"


def configure_backends(engine: EngineConfig) -> None:
    """Set torch's own switches: what is deterministic, TF32, cuDNN's choice of algorithms."""
    if engine.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(engine.deterministic)
    torch.backends.cudnn.deterministic = engine.deterministic
    torch.backends.cudnn.benchmark = engine.cudnn_benchmark and not engine.deterministic
    torch.backends.cudnn.allow_tf32 = engine.tf32
    torch.backends.cuda.matmul.allow_tf32 = engine.tf32
