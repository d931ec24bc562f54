"""The multiply-adds of a step at the paper's size, against their closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fgvc_ext.models import DualAttention, build_backbone
from fgvc_ext.training.dual_attention import DualAttentionClassification, DualAttentionConfig
from fgvc_ext.training.dual_attention_cost import step_multiply_adds

BATCH, GIGA = 16, 1e9


@pytest.fixture(scope="module")
def counted() -> dict[str, int]:
    method = DualAttentionConfig()
    with torch.device("meta"):
        model = DualAttention(build_backbone("resnet50"), 200, **method.network())
        task = DualAttentionClassification(model, nn.CrossEntropyLoss(), method)
    found = step_multiply_adds(task, BATCH, 448)
    print(f"\na step of {BATCH} images at 448, 10⁹ multiply-adds:")
    for name, count in found.items():
        print(f"{name:>18} {count / GIGA:10.2f}")
    return found


# Closed forms for one image. The spec rounds those of the backbone, towers, predictors and products.
CELLS = 56**2 + 28**2 + 14**2
FIRST = 224**2 * 64 * 49  # of the first convolution, for each channel that it sees
BACKBONE = 16.35 * GIGA
PYRAMID = 128 * (512 * 56**2 + 1024 * 28**2 + 2048 * 14**2) + 9 * 128**2 * CELLS
TOWERS = 2 * 2 * 9 * 128**2 * CELLS
PREDICTORS = 9 * 128 * 9 * (1 + 4) * CELLS
SITES = [
    (256, 16, 56**2), *[(256, 16, 28**2)] * 5, (512, 16, 28**2), *[(512, 16, 14**2)] * 2, (2048, 32, 14**2)
]  # fmt: skip
BILINEAR = sum(groups * (channels // groups) ** 2 * cells for channels, groups, cells in SITES)
GROUPING = sum(channels**2 * cells for channels, _, cells in SITES)
FORWARD = {
    "student, images": BACKBONE,
    "student, parts": 3 * BACKBONE,
    "proposals": PYRAMID + TOWERS + PREDICTORS,
    "teacher": BACKBONE + 2 * FIRST + 2048**2 * 14**2,
    "group bilinear": BILINEAR,
    "semantic grouping": GROUPING,
    "distillation": 1024**2 * 28**2,
}


@pytest.mark.parametrize("part", FORWARD)
def test_a_part_costs_its_closed_form(part, counted):
    assert counted[part] == pytest.approx(BATCH * FORWARD[part], rel=0.02)


def test_the_figures_of_the_specification(counted):
    """They are rounded there."""
    one = {name: count / BATCH / GIGA for name, count in counted.items()}
    assert one["student, images"] == pytest.approx(16.4, rel=0.02)
    assert one["proposals"] == pytest.approx(2.43 + 0.21 + 0.6 + 0.36, rel=0.02)
    assert counted["group bilinear"] / GIGA == pytest.approx(1.18, rel=0.02)
    assert 2 * counted["semantic grouping"] / GIGA == pytest.approx(51, rel=0.02)


def test_the_whole_step(counted):
    """Backward costs twice the forward; but images, part images and what enters the pyramid have no gradient."""
    pyramid_input = 128 * (512 * 56**2 + 1024 * 28**2 + 2048 * 14**2)
    without = (4 * 3 + 5) * FIRST + pyramid_input
    expected = BATCH * (3 * sum(FORWARD.values()) - without)
    assert counted["step"] == pytest.approx(expected, rel=0.02)
    assert set(counted) == {*FORWARD, "step"}
