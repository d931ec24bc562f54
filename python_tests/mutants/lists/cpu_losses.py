"""csrc/cpu: the kernels of losses, attention maps and boxes, and their host sides."""

from ..mutant import Mutant, of

MUTANTS = [
    *of(
        "csrc/cpu/gradient_boosting_cross_entropy.h",
        Mutant(
            "boosting-threshold-exclusive",
            "uint32_t kept = ~less_bits(x, broadcast(threshold)) & (left",
            "uint32_t kept = greater_bits(x, broadcast(threshold)) & (left",
        ),
        Mutant(
            "boosting-label-left-out",
            "if (label >= i && label < i + kLanes) kept |= 1u << (label - i);",
            "if (label > i && label < i + kLanes) kept |= 1u << (label - i);",
        ),
        Mutant("boosting-label-among-negatives", "keys[label] = lowest;", "keys[label] = keys[label];"),
        Mutant(
            "boosting-heap-label",
            "if (i != label) replace_smallest(heap, k, scores[i]);",
            "replace_smallest(heap, k, scores[i]);",
        ),
        Mutant(
            "boosting-k-off-by-one",
            "op.k < op.classes - 1 && highest == highest",
            "op.k < op.classes - 2 && highest == highest",
        ),
        Mutant(
            "boosting-unshifted-loss", "loss = log_sum - (scores[label] - highest);", "loss = log_sum - scores[label];"
        ),
        Mutant("boosting-highest-passes-nan-over", "nan |= unordered_bits(x);", "nan |= 0;"),
        Mutant("boosting-gradient-minus-one", "log_sum) - 1) * factor;", "log_sum)) * factor;"),
        Mutant(
            "boosting-gradient-at-the-threshold",
            "const uint32_t kept = ~less_bits(x, broadcast(threshold)) & ~0u",
            "const uint32_t kept = greater_bits(x, broadcast(threshold)) & ~0u",
        ),
        Mutant("boosting-gradient-of-one-sample", "op.grad_per_sample ? row : 0", "0"),
        Mutant(
            "boosting-gradient-garbage",
            "to[i] = scores[i] < threshold ? 0. :",
            "to[i] = scores[i] < threshold ? 1e-16 :",
        ),
        Mutant(
            "boosting-ignored-gradient",
            "const Value value = weight == 0 ? Value(0) : static_cast<Value>",
            "const Value value = weight == 0 && !lost ? Value(0) : static_cast<Value>",
        ),
    ),
    *of(
        "csrc/cpu/gradient_boosting_cross_entropy.cpp",
        Mutant(
            "boosting-mean-over-all",
            "total / static_cast<double>(used) : total",
            "total / static_cast<double>(samples) : total",
        ),
        Mutant("boosting-weight-of-ignored", "op.target[row] == op.ignore_index ? Value(0) : weight;", "weight;"),
        Mutant("boosting-sum-in-float", "double total = 0;", "Value total = 0;"),
    ),
    *of(
        "csrc/cpu/class_mean_loss.h",
        Mutant(
            "class-means-no-normalisation-of-zero",
            "feature[i] = length == 0 ? Value(0) : feature[i] / length;",
            "feature[i] = feature[i] / length;",
        ),
        Mutant(
            "class-means-update-not-divided",
            "((count * before - sum[i]) / (1 + count))",
            "((count * before - sum[i]) / count)",
        ),
        Mutant(
            "class-means-scale",
            "scale = scale_to_one(largest_magnitude(feature, op.size));",
            "scale = 1;",
        ),
        Mutant("class-means-scale-lost", "* along) / length * scale;", "* along) / length;"),
        Mutant("class-means-pairs-twice", "if (other > group) total += hinge * hinge;", "total += hinge * hinge;"),
        Mutant(
            "class-means-gradient-of-earlier-pairs", "if (other == group) continue;", "if (other <= group) continue;"
        ),
        Mutant(
            "class-means-gradient-through-the-mean",
            "- mean[i] - share * static_cast<Value>(residual[i])) / samples",
            "- mean[i]) / samples",
        ),
        Mutant(
            "class-means-gradient-along-the-feature",
            "(gradient[i] - feature[i] * along) / length",
            "gradient[i] / length",
        ),
        Mutant("class-means-strided-means", "to_float(old[i * op.means_stride[1]])", "to_float(old[i])"),
        Mutant("class-means-nan-hinge", "if (hinge <= 0) continue;", "if (!(hinge > 0)) continue;"),
    ),
    *of(
        "csrc/cpu/class_mean_loss.cpp",
        Mutant(
            "class-means-half",
            "write_sum(within, 2. * static_cast<double>(op.samples)",
            "write_sum(within, static_cast<double>(op.samples)",
        ),
        Mutant("class-means-one-class", "std::max(1., pairs) * 4", "pairs * 4"),
        Mutant(
            "class-means-order-in-a-class",
            "op.labels[a] < op.labels[b] : a < b;",
            "op.labels[a] < op.labels[b] : a > b;",
            survives="The order in which a class is added up: any is right, as long as it does not change.",
        ),
    ),
    *of(
        "csrc/cpu/orthogonal_loss.h",
        Mutant("orthogonal-sample-deviation", "std::sqrt(squares / count)", "std::sqrt(squares / (count - 1))"),
        Mutant(
            "orthogonal-teachers-not-absolute", "how.at(weight, i, 0) + (x < 0 ? -x : x)", "how.at(weight, i, 0) + x"
        ),
        Mutant("orthogonal-gradient-projection", "- mean - how.at(z, i, 0) * projection;", "- mean;"),
        Mutant("orthogonal-constant-map", "return {true, 0, 0};", "return {false, 1, 0};"),
        Mutant("orthogonal-nan-in-a-constant-map", "if (low == high && total == total)", "if (low == high)"),
        Mutant(
            "orthogonal-teacher-stride",
            "(teacher * op.samples + sample) * positions",
            "(sample * op.teachers + teacher) * positions",
        ),
        Mutant("orthogonal-nan-dropped", "* (x <= 0 ? zero : x);", "* (x > 0 ? x : zero);"),
        Mutant(
            "orthogonal-mean-found-once",
            "(how.at(centred, i, left) - left) * scale",
            "how.at(centred, i, left) * scale",
        ),
        Mutant("orthogonal-scale-lost", "along * slope * own.scale", "along * slope"),
    ),
    *of(
        "csrc/cpu/spatial_attention_map.h",
        Mutant(
            "attention-groups-not-added",
            "for (int64_t group = 1; group < op.groups; ++group)",
            "for (int64_t group = 2; group < op.groups; ++group)",
        ),
        Mutant(
            "attention-last-row",
            "for (; row < count; ++row) add_weighted<1>",
            "for (; row + 1 < count; ++row) add_weighted<1>",
        ),
        Mutant(
            "attention-gradient-without-offset",
            "to[i] = from_float<T>(slope * grad[i] + offset);",
            "to[i] = from_float<T>(slope * grad[i]);",
        ),
        Mutant(
            "attention-gradient-share",
            "channels; ++c) slope[c] *= share, offset[c] *= share;",
            "channels; ++c) slope[c] *= share, offset[c] *= share * (c + 1 < channels);",
        ),
        Mutant("attention-gradient-of-the-first-sample", "if (group.sample != sample) {", "if (sample < 0) {"),
        Mutant(
            "attention-interleaved-vectors",
            "} else if (channels <= 4 * kLanes) {",
            "} else if (channels <= 5 * kLanes) {",
        ),
        Mutant(
            "attention-interleaved-gains",
            "for (int v = 1; v < Vectors; ++v) total += gains[v] * values[v];",
            "for (int v = 1; v + 1 < Vectors; ++v) total += gains[v] * values[v];",
        ),
        Mutant(
            "attention-gradient-other-strides",
            "at[c * layout.stride[1]] = from_float<T>(slope[c] * g + offset[c]);",
            "at[c * layout.stride[1]] = from_float<T>(slope[c] * g + offset[0]);",
        ),
    ),
    *of(
        "csrc/cpu/heatmap_to_boxes.h",
        Mutant(
            "boxes-threshold-inclusive",
            "if (!(map.at(y, x) - lowest > bound)) continue;",
            "if (!(map.at(y, x) - lowest >= bound)) continue;",
        ),
        Mutant(
            "boxes-threshold-inclusive-in-rows",
            "greater_bits(values - lowest, broadcast(bound))",
            "~less_bits(values - lowest, broadcast(bound)) & kAllLanes",
        ),
        Mutant(
            "boxes-absolute-threshold",
            "static_cast<float>(op.threshold) * (range.highest - range.lowest)",
            "static_cast<float>(op.threshold) * range.highest",
        ),
        Mutant(
            "boxes-behind-the-row",
            'load_partial(row + x, width - x, __builtin_nanf(""))',
            "load_partial(row + x, width - x, __builtin_inff())",
        ),
        Mutant("boxes-last-column", "static_cast<Value>(kept.right + 1)", "static_cast<Value>(kept.right)"),
        Mutant(
            "boxes-sides-swapped",
            "static_cast<Value>(kept.top) * image_height / rows",
            "static_cast<Value>(kept.top) * image_width / rows",
        ),
        Mutant("boxes-min-size-inclusive", "x2 - x1 < min_size ||", "x2 - x1 <= min_size ||"),
        Mutant("boxes-infinity", "found.finite = zero == 0;", "found.finite = true;"),
        Mutant("boxes-infinity-in-rows", "highest[0], sum(zero) == 0};", "highest[0], true};"),
        Mutant("boxes-bottom", "    kept.bottom = y;\n  }", "    kept.bottom = kept.top;\n  }"),
        Mutant("boxes-last-of-a-vector", "last = x + 31 - __builtin_clz(bits);", "last = x + __builtin_ctz(bits);"),
    ),
]
