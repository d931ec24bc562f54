"""Numbers as arguments: Python's and NumPy's are taken alike, and nothing else is."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch

from fgvc_ext import nn, ops

np = pytest.importorskip("numpy")

MAPS, EMBEDDINGS, LABELS = torch.rand(2, 5, 6, 7), torch.rand(4, 3), torch.tensor([0, 1, 1, 0])
MEANS = torch.eye(3)
REAL: dict[str, tuple[Callable[[Any], Any], float]] = {
    "class_mean_loss alpha": (lambda x: ops.class_mean_loss(EMBEDDINGS, LABELS, MEANS, alpha=x), 0.5),
    "class_mean_loss margin": (lambda x: ops.class_mean_loss(EMBEDDINGS, LABELS, MEANS, margin=x), 0.25),
    "class_mean_loss gamma": (lambda x: ops.class_mean_loss(EMBEDDINGS, LABELS, MEANS, gamma=x), 2.0),
    "ClassMeanLoss margin": (lambda x: nn.ClassMeanLoss(3, 3, margin=x).margin, 0.5),
    "diversify alpha": (lambda x: ops.diversify(MAPS, alpha=x, seed=1), 0.25),
    "diversify p_peak": (lambda x: ops.diversify(MAPS, p_peak=x, seed=1), 0.25),
    "suppression_mask p_patch": (lambda x: ops.suppression_mask(MAPS, p_patch=x, seed=1), 0.25),
    "heatmap_to_boxes threshold": (lambda x: ops.heatmap_to_boxes(MAPS[0], threshold=x, image_size=9), 0.5),
    "heatmap_to_boxes min_size": (
        lambda x: ops.heatmap_to_boxes(MAPS[0], threshold=0.5, image_size=9, min_size=x),
        2.5,
    ),
}
INT: dict[str, tuple[Callable[[Any], Any], int]] = {
    "global_k_max_pool k": (lambda x: ops.global_k_max_pool(MAPS, x), 3),
    "gradient_boosting_cross_entropy k": (lambda x: ops.gradient_boosting_cross_entropy(EMBEDDINGS, LABELS, k=x), 2),
    "gradient_boosting_cross_entropy ignore_index": (
        lambda x: ops.gradient_boosting_cross_entropy(EMBEDDINGS, LABELS, ignore_index=x),
        1,
    ),
    "diversify patch_size": (lambda x: ops.diversify(MAPS, patch_size=x, seed=1), 2),
    "diversify seed": (lambda x: ops.diversify(MAPS, seed=x), 7),
    "heatmap_to_boxes image_size": (lambda x: ops.heatmap_to_boxes(MAPS[0], threshold=0.5, image_size=x), 9),
    "heatmap_to_boxes the height in image_size": (
        lambda x: ops.heatmap_to_boxes(MAPS[0], threshold=0.5, image_size=(x, 12)),
        9,
    ),
}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple):
        return all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.longdouble, Fraction])
@pytest.mark.parametrize("argument", REAL)
def test_numbers_of_numpy(argument: str, kind: type) -> None:
    call, value = REAL[argument]
    assert same(call(kind(value)), call(value))


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int32, np.int64, np.uint64])
@pytest.mark.parametrize("argument", [*INT, "class_mean_loss gamma"])
def test_integers_of_numpy(argument: str, kind: type) -> None:
    call, value = {**REAL, **INT}[argument]
    assert same(call(kind(value)), call(int(value)))


@pytest.mark.parametrize("argument", [*REAL, *INT])
@pytest.mark.parametrize("value", [True, np.True_, "1", None, 1j, np.complex64(1), np.ones(1), torch.ones(2)], ids=repr)
def test_what_is_no_number(argument: str, value: Any) -> None:
    if argument == "diversify seed" and (value is None or isinstance(value, torch.Tensor)):
        pytest.skip("a seed may be that")
    call, _ = {**REAL, **INT}[argument]
    with pytest.raises(TypeError, match=rf"^{'class_mean_loss' if 'Class' in argument else argument.split()[0]}: "):
        call(value)


@pytest.mark.parametrize("value", [1.0, np.float32(1)])
@pytest.mark.parametrize("argument", INT)
def test_a_float_is_no_int(argument: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"^{argument.split()[0]}: .* int"):
        INT[argument][0](value)


@pytest.mark.parametrize("value", [np.float32("inf"), np.float32("nan"), np.float64("-inf"), np.longdouble(1e39)])
def test_ranges_hold_for_numpy_too(value: Any) -> None:
    """Compared as they are, a float32 infinity would be no larger than float64's largest number, rounded to float32."""
    for argument in REAL:
        if argument == "heatmap_to_boxes min_size" and abs(float(value)) < float("inf"):
            continue
        with pytest.raises(ValueError, match=r"must be .*, got "):
            REAL[argument][0](value)
    with pytest.raises(ValueError, match="k must be at least 1, got -3"):
        ops.global_k_max_pool(MAPS, np.int8(-3))
    with pytest.raises(ValueError, match="patch_size must fit 64 bits, got 18446744073709551615"):
        ops.diversify(MAPS, patch_size=np.uint64(2**64 - 1))
