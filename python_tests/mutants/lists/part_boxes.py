"""The operators on part proposals, `part_box_losses` and `select_boxes`: all their files."""

from ..mutant import OPS, Mutant, of

LOSSES = (f"{OPS}/test_part_box_losses.py", f"{OPS}/test_contract.py", "-m", "not slow", "-k", "part_box")

MUTANTS = [
    *of(
        "csrc/common/part_boxes.h",
        Mutant("part-boxes-equal-edges", "equal ? derivative / 2 : derivative", "derivative"),
        Mutant("part-boxes-crossed-area", "return positive(box.x2 - box.x1) *", "return (box.x2 - box.x1) *"),
        Mutant(
            "part-boxes-gradient-of-an-empty-box",
            "const Value of_width = width <= 0 ? Value(0) : factor * positive(height);",
            "const Value of_width = factor * positive(height);",
        ),
        Mutant(
            "part-boxes-gradient-apart",
            "const Value of_height = height <= 0 ? Value(0) : factor / total * positive(width);",
            "const Value of_height = factor / total * positive(width);",
        ),
        Mutant("part-boxes-edges-of-the-other", "a.x1 < b.x1, a.x1 == b.x1", "a.x1 > b.x1, a.x1 == b.x1"),
        Mutant("part-boxes-growth-left-out", "if (!detach_denominator && sum != 0)", "if (false)"),
        Mutant("part-boxes-growth-kept", "if (!detach_denominator && sum != 0)", "if (sum != 0)"),
        Mutant("part-boxes-growth-once", "-factor * (overlap / total)", "-factor * overlap"),
        Mutant("part-boxes-nothing-overlaps-nothing", "sum == 0 ? Value(1) : sum", "sum"),
        Mutant("part-boxes-nan-dropped", "return a > b || a != a ? a : b;", "return a > b ? a : b;"),
        Mutant("part-boxes-hinge-two-sided", "return {positive(excess), excess <= 0", "return {excess, excess <= 0"),
        Mutant("part-boxes-log-slope", "ratio == 0 ? Value(0) : sign / ratio", "ratio == 0 ? Value(0) : sign"),
        Mutant("part-boxes-log-of-nothing", "ratio == 0 ? Value(0) : sign / ratio", "sign / ratio"),
        Mutant("part-boxes-least-area", "return area < least ? least : area;", "return area;"),
        tests=LOSSES,
    ),
    *of(
        "csrc/common/part_box_losses.h",
        Mutant("part-boxes-valid-strided", "dense_valid = as_dense(valid)", "dense_valid = valid"),
        Mutant(
            "part-boxes-strides-swapped",
            "{boxes.stride(0), boxes.stride(1), boxes.stride(2)}",
            "{boxes.stride(0), boxes.stride(2), boxes.stride(1)}",
        ),
        Mutant("part-boxes-sides-not-checked", "boxes.size(2) == 4", "boxes.size(2) >= 0"),
    ),
    *of(
        "csrc/cpu/part_box_losses.h",
        Mutant("part-boxes-invalid-counts", "if (!op.valid[first + number]) continue;", ""),
        Mutant("part-boxes-pairs-twice", "if (i < j) overlaps += overlap;", "overlaps += overlap;"),
        Mutant("part-boxes-pairs-of-all", "valid * (valid - 1) / 2", "valid * valid / 2"),
        Mutant("part-boxes-gradient-per-image", "op.iou_weight / pairs / samples", "op.iou_weight / pairs"),
        Mutant("part-boxes-one-place-late", "of_overlap[numbers[i]] = gradient;", "of_overlap[i] = gradient;"),
        Mutant("part-boxes-area-per-box", "static_cast<Value>(areas / valid)", "static_cast<Value>(areas)"),
    ),
    *of(
        "csrc/cpu/part_box_losses.cpp",
        Mutant(
            "part-boxes-weight-lost",
            "write_sum(call.overlaps, samples, call.overlap, iou_weight)",
            "write_sum(call.overlaps, samples, call.overlap)",
        ),
        Mutant("part-boxes-gradients-swapped", "{grad_overlap, grad_area}", "{grad_area, grad_overlap}"),
    ),
    *of(
        "csrc/cuda/part_box_losses.cuh",
        Mutant("cuda-part-boxes-invalid-partner", "if (i == j || !valid.load(j)) continue;", "if (i == j) continue;"),
        Mutant("cuda-part-boxes-pairs-twice", "if (i < j) overlaps += overlap;", "overlaps += overlap;"),
        Mutant("cuda-part-boxes-lanes", "areas = warp_reduce(areas, Sum());", ""),
    ),
    *of(
        "csrc/common/select_boxes.h",
        Mutant(
            "select-candidate-strides",
            "{candidates.stride(0), candidates.stride(1)}",
            "{candidates.stride(0), 1}",
        ),
        Mutant("select-top-not-checked", "top >= 1 && top <= number", "top >= 1"),
    ),
    *of(
        "csrc/cpu/select_boxes.h",
        Mutant("select-threshold-inclusive", "- intersection) > threshold;", "- intersection) >= threshold;"),
        Mutant(
            "select-union-without-the-other",
            "(area_of_a + area_of(b) - intersection)",
            "(area_of_a + area_of_a - intersection)",
        ),
        Mutant("select-suppressed-in-vectors", "store(left + i, close ? out : scores);", "store(left + i, scores);"),
        Mutant("select-taken-suppressed", "left[number] = kTaken<Value>;", "left[number] = kOut<Value>;"),
        Mutant("select-last-of-equals-in-the-tail", "if (left[i] > most) most", "if (left[i] >= most) most"),
        Mutant(
            "select-not-every-lane",
            "for (int lane = 0; lane < kLanes; ++lane) most =",
            "for (int lane = 1; lane < kLanes; ++lane) most =",
        ),
        Mutant(
            "select-infinite-candidates",
            "candidates[i * candidate_step] && at(i) > kOut",
            "candidates[i * candidate_step] && at(i) >= kOut",
        ),
        Mutant("select-nan-as-a-candidate", "!= 0) & (scores > out);", "!= 0) & ~(scores <= out);"),
        Mutant("select-equals-skipped", "(own == score && i > after)", "(own == score && false)"),
        Mutant("select-filled-up-valid", "take(at, false);", "take(at, true);"),
        Mutant("select-others-first", "    fill_up(true);\n", ""),
        Mutant(
            "select-boxes-taken-for-dense", "op.box_stride[2] == 1 && op.box_stride[1] == 4", "op.box_stride[2] == 1"
        ),
    ),
    *of(
        "csrc/cuda/select_boxes.cuh",
        Mutant("cuda-select-threshold-inclusive", "- intersection) > threshold;", "- intersection) >= threshold;"),
        Mutant(
            "cuda-select-last-of-equals",
            "box == kNoBox || other_score > score",
            "box == kNoBox || other_score >= score",
        ),
        Mutant("cuda-select-highest-of-block", "own.score == highest ? own.box : kNoBox", "own.box"),
        Mutant(
            "cuda-select-taken-again",
            "if (i == selected) return take(i);",
            "if (i == selected) return left.store(i, out());",
        ),
        Mutant("cuda-select-filled-up-valid", "write(best.box, false);", "write(best.box, true);"),
    ),
    *of(
        "csrc/cuda/select_boxes.cu",
        Mutant("cuda-select-chunks", "op.box_stride[2] == 1 && op.box_stride[1] == 4 &&", "op.box_stride[2] == 1 &&"),
    ),
    *of(
        "fgvc_ext/ops/part_box_losses.py",
        Mutant("part-boxes-py-four-sides", "if boxes.shape[2] != 4:", "if boxes.shape[2] < 4:"),
        Mutant(
            "part-boxes-py-one-area-for-all",
            "if object_area.shape[0] != samples:",
            "if object_area.shape[0] > samples:",
        ),
        Mutant("part-boxes-py-modes", '("two_sided", "hinge", "log")', '("two_sided", "log", "hinge")'),
        Mutant("part-boxes-py-least-area", "limits[0] <= value", "-limits[1] <= value"),
    ),
    *of(
        "fgvc_ext/ops/select_boxes.py",
        Mutant("select-py-fewer", "if number < top:", "if number <= top:"),
        Mutant("select-py-threshold-one", "lambda value: 0 <= value <= 1", "lambda value: 0 <= value < 1"),
    ),
    *of(
        "fgvc_ext/reference/part_box_losses.py",
        Mutant("reference-part-boxes-object", "object_area.detach().to(dtype)", "object_area.to(dtype)"),
        Mutant(
            "reference-part-boxes-nan",
            "torch.where(pairs[..., None], one, 0.0) for one",
            "one.expand(*pairs.shape, 4) for one",
        ),
        Mutant("reference-part-boxes-log", "torch.where(empty, 1.0, ratios).log()", "ratios.log()"),
    ),
    *of(
        "fgvc_ext/reference/select_boxes.py",
        Mutant("reference-select-all-suppressed", "close & (ranks == FREE)", "close & (ranks != TAKEN)"),
        Mutant("reference-select-inclusive", "> iou_threshold", ">= iou_threshold"),
        Mutant("reference-select-last-of-equals", "numbers, scores.shape[1]).amin(", "numbers, -1).amax("),
    ),
    *of(
        "fgvc_ext/nn/part_boxes.py",
        Mutant(
            "part-boxes-module-detach",
            "detach_denominator=self.detach_denominator,\n        )",
            "detach_denominator=False,\n        )",
        ),
        Mutant("part-boxes-module-mode", "area_mode=self.area_mode,", 'area_mode="two_sided",'),
        tests=("python_tests/ops/test_part_box_losses.py",),
    ),
]
