"""Dual attention fusion in miniature: its task, a batch, and the losses of a step."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fgvc_ext.models import DualAttention, build_backbone
from fgvc_ext.training.dual_attention import DualAttentionClassification, DualAttentionConfig

sys.path.append(str(Path(__file__).parents[1] / "models"))
from small_bottlenecks import small_bottlenecks

SMALL = DualAttentionConfig(fpn_channels=16, head_depth=1, dropout=0.0, distill_warmup_epochs=0)


def small_task(name: str = "bottlenecks", **changes) -> DualAttentionClassification:
    torch.manual_seed(0)
    method = replace(SMALL, **changes)
    backbone = small_bottlenecks() if name == "bottlenecks" else build_backbone(name)
    task = DualAttentionClassification(DualAttention(backbone, 5, **method.network()), nn.CrossEntropyLoss(), method)
    if task.network.proposals is not None:  # anchors differ and boxes move, as in a training that has begun
        for tower in (task.network.proposals.score, task.network.proposals.change):
            nn.init.normal_(tower[-1].weight, std=0.05)
    if task.network.teacher is not None:
        for module in task.network.teacher.modules():
            if hasattr(module, "code"):
                nn.init.uniform_(module.norm.weight, 0.5, 1)
    return task.train()


def small_batch(samples: int = 4, side: int = 96) -> dict[str, torch.Tensor]:
    images = torch.randn(samples, 3, side, side, generator=torch.Generator().manual_seed(1))
    number = torch.arange(samples)
    return {"image": images, "label": number % 5, "seed": number + 7, "index": number}


def parts_of(task, batch=None) -> dict[str, torch.Tensor]:
    """Every loss that a step adds up, with its graph."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "_with_logs", lambda answer, parts, logs: found.update(parts) or answer)
        task.step(small_batch() if batch is None else batch)
    return found
