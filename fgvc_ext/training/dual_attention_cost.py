"""What a training step of "dual attention fusion" multiplies and adds, part by part. Only shapes are computed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from fgvc_ext import use_reference
from fgvc_ext.training.dual_attention import DualAttentionClassification, grouping_loss


def step_multiply_adds(task: DualAttentionClassification, batch_size: int, size: int) -> dict[str, int]:
    """The multiply-adds of convolutions and matrix products by part, for images of `size` × `size` pixels.

    "student, images", "student, parts", "proposals", "teacher" (without its products of channels), "group bilinear",
    "semantic grouping" and "distillation" are of the forward pass, as far as the task has them; "step" is forward and
    backward of everything.
    """
    twin, meta = copy.deepcopy(task).to("meta").train(), torch.device("meta")
    model, number = twin.network, torch.zeros(batch_size, dtype=torch.int64, device=meta)
    images, found = torch.zeros(batch_size, 3, size, size, device=meta), dict[str, int]()
    seen, counts = _counted(lambda: model.look(images))
    found["student, images"] = counts["all"]
    proposals = model.proposals
    if proposals is not None:
        _, counts = _counted(lambda: proposals.predictions(seen.levels))
        found["student, images"] -= counts["all"]
        parts = model.part_images(images, seen.proposals.boxes, number)
        found["student, parts"] = _counted(lambda: model.part_scores(parts))[1]["all"]
        found["proposals"] = counts["all"]
    if model.teacher is not None:
        taught, counts = _counted(lambda: model.teach(images, seen))
        found["teacher"], found["group bilinear"] = counts["all"] - counts["bmm"], counts["bmm"]
        if taught.grouped:
            found["semantic grouping"] = _counted(lambda: grouping_loss(taught))[1]["all"]
        if twin.distills:
            found["distillation"] = _counted(lambda: twin.distillation(seen, taught))[1]["all"]
    batch = {"image": images, "label": number, "seed": number, "index": number}
    found["step"] = _counted(lambda: twin.step(batch)["loss"].backward())[1]["all"]
    return found


def _counted(run: Callable[[], Any]) -> tuple[Any, dict[str, int]]:
    """What a function gives, and its multiply-adds: of "all" operators, and of batched matrix products ("bmm")."""
    with use_reference(), FlopCounterMode(display=False) as counter:
        result = run()
    counts = {str(name).rpartition(".")[2]: int(n) // 2 for name, n in counter.get_flop_counts()["Global"].items()}
    return result, {"all": sum(counts.values()), "bmm": counts.get("bmm", 0)}
