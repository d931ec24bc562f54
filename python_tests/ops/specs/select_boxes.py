"""Greedy non-maximum suppression with a fixed number of results."""

from typing import Any

import torch
from torch import Tensor

from fgvc_ext import ops, reference

from ..generators import (
    DTYPES,
    FEW,
    MATRIX_LAYOUTS,
    NO_INTS,
    NO_NUMBERS,
    Draw,
    arrange,
    boolean,
    drawn_floats,
    drawn_layout,
    inf,
    nan,
    random,
    wide,
    wrong,
    wrong_bools,
    wrong_first,
)
from ..spec import Benchmark, Case, Sample, Size, Spec, Target

# --- samples ----------------------------------------------------------------------------------------------------------


def sample(name: str, scores: Tensor, boxes: Tensor, candidates: Tensor, **options: Any) -> Sample:
    return Sample(name, {"scores": scores, "boxes": boxes, "candidates": candidates}, (), options)


def proposals(samples: int, number: int, dtype: torch.dtype, device: str, side: float = 60.0) -> Tensor:
    """Boxes of about this side anywhere in an image of 448."""
    around = random(samples, number, 4, dtype=torch.float64, device=device, seed=1)
    middle, sides = 224 + 80 * around[..., :2], side * (0.3 * around[..., 2:]).exp()
    return torch.cat((middle - sides / 2, middle + sides / 2), dim=2).to(dtype)


def most(samples: int, number: int, device: str) -> Tensor:
    """Two of three are candidates."""
    return torch.arange(samples * number, device=device).reshape(samples, number) % 3 != 1


def samples(dtype: torch.dtype, device: str, layout: str = "contiguous") -> list[Sample]:
    def laid_out(name: str, scores: Tensor, boxes: Tensor, candidates: Any = None, **options: Any) -> Sample:
        if candidates is None:
            candidates = most(*scores.shape, device)
        candidates = torch.as_tensor(candidates, device=device).expand(scores.shape)
        return sample(name, arrange(scores, layout), boxes, candidates, **options)

    def some(*size: int) -> Tensor:
        return random(*size, dtype=dtype, device=device)

    def boxes(*size: int, side: float = 60.0) -> Tensor:
        return proposals(*size, dtype, device, side)

    scores, around = some(3, 67), boxes(3, 67)
    lost = scores.clone()
    lost[:, ::2] = -inf
    signed = torch.where(scores > 0, 0.0, -0.0).to(dtype)
    empty = around.clone()
    empty[:, ::2, 2:] = empty[:, ::2, :2]
    crossed = around.clone()
    crossed[:, ::2] = crossed[:, ::2, [2, 3, 0, 1]]
    crossed[:, 1::4] = crossed[:, 1::4, [2, 1, 0, 3]]
    return [
        laid_out("typical", scores, around),
        laid_out("boxes in float32", scores, around.to(wide(dtype))),
        laid_out(
            "boxes and candidates of other strides", scores, around.mT.contiguous().mT, scores.mT.contiguous().mT > 0
        ),
        laid_out("boxes with other numbers between them", scores, torch.cat((around, around), dim=2)[..., :4]),
        laid_out("large boxes", scores, boxes(3, 67, side=200)),
        laid_out("many results", scores, around, top=20),
        laid_out("all of them", scores, around, top=67),
        laid_out("no overlap is too much", scores, around, iou_threshold=1, top=9),
        laid_out("any overlap is too much", scores, around, iou_threshold=0, top=9),
        laid_out("no candidates", scores, around, False),
        laid_out("fewer candidates than results", scores, around, torch.arange(67) == 40),
        laid_out("candidates of one image", scores, around, torch.tensor([[False], [True], [False]]), top=5),
        laid_out("equal boxes", scores, boxes(3, 1).repeat(1, 67, 1), True),
        laid_out("ties", (2 * scores).round(), around, top=6),
        laid_out("all tied", torch.zeros_like(scores), around, top=30),
        laid_out("zeros of both signs", signed, around, top=6),
        laid_out("scores of -inf", lost, around, top=40),
        laid_out("scores of -inf, no candidates", lost, around, False, top=67),
        laid_out("the highest are infinite", torch.where(scores > 1, inf, scores), around, top=6),
        laid_out("nothing but -inf", torch.full_like(scores, -inf), around, True, top=5),
        laid_out("empty boxes", scores, empty, top=12),
        laid_out("crossed sides", scores, crossed, top=12),
        laid_out("small integers", scores, (around / 40).round(), top=5),
        laid_out("one box", some(3, 1), boxes(3, 1), top=1),
        laid_out("three boxes", some(3, 3), boxes(3, 3)),
        laid_out("sixteen boxes", some(2, 16), boxes(2, 16), True),
        laid_out("more boxes than a block has threads", some(2, 1100), boxes(2, 1100), top=5),
        laid_out("as many, all tied", torch.zeros_like(some(2, 1100)), boxes(2, 1100), True, top=5),
    ]


def empty() -> list[Sample]:
    return [sample("empty", torch.zeros(0, 9), torch.zeros(0, 9, 4), torch.zeros(0, 9, dtype=torch.bool))]


def large() -> list[Sample]:
    scores, boxes = random(5, 20000, dtype=torch.float32, device="cpu"), proposals(5, 20000, torch.float32, "cpu")
    return [sample("large", scores, boxes, most(5, 20000, "cpu"))]


def of_size(size: Size, device: str) -> Sample:
    samples, _, height, width = size
    number = height * width
    scores = random(samples, number, dtype=torch.float32, device=device)
    boxes = proposals(samples, number, torch.float32, device)
    return sample("of size", scores, boxes, most(samples, number, device))


def raw(sample: Sample) -> tuple[Any, ...]:
    return *sample.tensors.values(), sample.options.get("iou_threshold", 0.25), sample.options.get("top", 3)


# --- random arguments -------------------------------------------------------------------------------------------------


def drawn(draw: Draw) -> Sample:
    samples, number = draw.choice(FEW), draw.choice([1, 2, 3, 7, 16, 17, 33, 64, 130])
    dtype = draw.choice(DTYPES)
    scores = drawn_floats(draw, (samples, number), dtype, draw.choice([0.01, 1.0, 20.0]))
    beside = draw.choice([dtype, wide(dtype)])
    if boolean(draw):
        boxes = drawn_floats(draw, (samples, number, 4), beside, draw.choice([1.0, 20.0]))
    else:
        boxes = proposals(samples, number, beside, "cpu", draw.choice([10.0, 60.0, 300.0]))
        boxes = drawn_layout(draw, boxes.round() if boolean(draw) else boxes)
    share = draw.choice([0.0, 0.1, 0.5, 1.0])
    chosen = random(samples, number, dtype=torch.float64, device="cpu", seed=draw.integer(0, 99)).sigmoid() <= share
    options = {
        "iou_threshold": draw.choice([0, 0.25, 0.5, 1, draw.number(0, 1)]),
        "top": draw.choice([1, min(3, number), number, draw.integer(1, number)]),
    }
    tensors = {"scores": scores, "boxes": boxes, "candidates": drawn_layout(draw, chosen)}
    return Sample("drawn", tensors, (), options)


def wrong_boxes(draw: Draw, sample: Sample) -> tuple[str, Any]:
    right, dtype = sample.tensors["boxes"].nan_to_num(), sample.tensors["scores"].dtype
    samples, number, _ = right.shape
    sizes = [(samples + 1, number, 4), (samples, number + 1, 4), (samples, number, 3), (samples, number * 4)]
    other = right.to(torch.float16 if dtype in (torch.float64, torch.bfloat16) else torch.float64)
    values = [*(right.new_zeros(size) for size in sizes), other, right.long(), right.to(torch.complex64)]
    return "boxes", draw.choice([*values, right.to("meta"), right.to_sparse(), right.tolist(), None, "a", 1.0])


def more_than_there_are(draw: Draw, sample: Sample) -> tuple[str, Any]:
    number = sample.tensors["scores"].shape[1]
    return "top", draw.choice([number + 1, number + 100, 2**62])


FAULTS = (
    wrong_first,
    wrong_boxes,
    wrong_bools("candidates"),
    more_than_there_are,
    wrong("iou_threshold", -0.1, 1.1, nan, inf, -inf, 2**70, *NO_NUMBERS),
    wrong("top", 0, -1, 2**63, 2**70, *NO_INTS),
)

# --- benchmarks -------------------------------------------------------------------------------------------------------

ANCHORS = 37044  # of an image of 448: 9 in each cell of maps of 56, 28 and 14


def timed(case: Case, device: str) -> Sample:
    samples, number = case.shape
    scores = arrange(random(samples, number, dtype=case.dtype, device=device), case.layout)
    boxes = proposals(samples, number, torch.float32, device, side=100)
    return sample("timed", scores, boxes, random(samples, number, dtype=torch.float32, device=device, seed=2) > 0)


def plain(scores: Tensor, boxes: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """As one writes it in PyTorch for images that have as many candidates apart as are asked for."""
    left = scores.float().masked_fill(~candidates, -inf)
    x1, y1, x2, y2 = boxes.unbind(2)
    areas = (x2 - x1) * (y2 - y1)
    chosen = []
    for _ in range(3):
        index = left.argmax(dim=1, keepdim=True)
        chosen.append(index)
        a, b, c, d, area = (side.gather(1, index) for side in (x1, y1, x2, y2, areas))
        width = (torch.minimum(x2, c) - torch.maximum(x1, a)).clamp(min=0)
        height = (torch.minimum(y2, d) - torch.maximum(y1, b)).clamp(min=0)
        intersection = width * height
        left = left.masked_fill(intersection / (areas + area - intersection) > 0.25, -inf)
    indices = torch.cat(chosen, dim=1)
    return indices, torch.ones_like(indices, dtype=torch.bool)


def image_by_image(scores: Tensor, boxes: Tensor, candidates: Tensor) -> list[Tensor]:
    """With torchvision, whose suppression gives all that remain, and on a GPU waits for their number."""
    from torchvision.ops import nms

    kept = []
    for score, box, candidate in zip(scores, boxes, candidates, strict=True):
        numbers = candidate.nonzero()[:, 0]
        kept.append(numbers[nms(box[numbers], score[numbers].float(), 0.25)[:3]])
    return kept


BENCHMARK = Benchmark(
    sample=timed,
    plain=plain,
    cpu=(Case((16, ANCHORS), targets=(Target("eager", at_least=5), Target("torch.compile", at_least=1))),),
    cuda=(Case((16, ANCHORS), targets=(Target("eager", at_least=3),)),),
    sweep=tuple(
        Case((samples, number), dtype=dtype)
        for samples in (1, 16, 64)
        for number in (1614, ANCHORS)
        for dtype in (torch.float32, torch.bfloat16)
    ),
    others={"reference": reference.select_boxes, "torchvision.ops.nms": image_by_image},
)

SPEC = Spec(
    name="select_boxes",
    function=ops.select_boxes,
    reference=reference.select_boxes,
    samples=samples,
    empty=empty,
    large=large,
    of_size=of_size,
    raw=raw,
    drawn=drawn,
    faults=FAULTS,
    layouts=MATRIX_LAYOUTS,
    shape="[N,A]",
    benchmark=BENCHMARK,
)
