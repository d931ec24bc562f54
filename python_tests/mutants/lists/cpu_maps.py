"""csrc/cpu: the kernels on maps, and what every instruction set and operator shares."""

from ..mutant import Mutant, of

# Everything that compares with the reference.
ALL = ("python_tests/ops/test_contract.py", "-k", "equal or layouts or nan")

MUTANTS = [
    *of(
        "csrc/cpu/global_k_max_pool.h",
        Mutant("pool-mean-of-k", "total / static_cast<double>(k)", "total / static_cast<double>(k + (k > 8))"),
        Mutant("pool-weight-order", "weight[rank] * values[rank]", "weight[k - 1 - rank] * values[rank]"),
        Mutant(
            "pool-interleaved-last-channels",
            "load_partial(from + channel, channels - channel, 0.f));",
            "load_partial(from + channel, channels - channel - 1, 0.f));",
        ),
        Mutant(
            "pool-interleaved-rest-of-stripes",
            "for (int i = 0; start < positions; ++start, ++i) stripes[i]",
            "for (int i = 0; start + 1 < positions; ++start, ++i) stripes[i]",
            survives="The bound only becomes lower, and with it the number of candidates larger: an optimisation.",
        ),
        Mutant(
            "pool-interleaved-nan-passed-over",
            "lanes + (start + i) * kTile), bound))",
            "lanes + (start + i) * kTile), bound) & ~unordered_bits(load(lanes + (start + i) * kTile)))",
        ),
        Mutant(
            "pool-backward-no-clearing-of-strided-maps",
            "for (int64_t c = 0; c < tile.channels; ++c) at[c * layout.stride[1]] = T{};",
            "for (int64_t c = 1; c < tile.channels; ++c) at[c * layout.stride[1]] = T{};",
        ),
        Mutant(
            "pool-backward-garbage-below-tolerance",
            "std::memset(base + c * layout.stride[1], 0, positions * sizeof(T));",
            "std::memset(base + c * layout.stride[1], 1, positions * sizeof(T));",
        ),
        Mutant("pool-backward-index-of-the-end", "index >= positions) continue;", "index > positions) continue;"),
        Mutant(
            "pool-weight-gradient-last-map",
            "last = smaller(op.maps, first + op.maps_per_chunk)",
            "last = smaller(op.maps, first + op.maps_per_chunk - 1)",
        ),
        Mutant(
            "pool-weight-gradient-share",
            "for (int64_t rank = 0; rank < op.k; ++rank) sums[rank] += share * values[rank];",
            "for (int64_t rank = 0; rank < op.k; ++rank) sums[rank] += share * values[0];",
        ),
    ),
    *of(
        "csrc/cpu/k_largest.h",
        Mutant(
            "pool-heap-ties",
            "return nan_a != nan_b ? nan_a : index_a < index_b;",
            "return nan_a != nan_b ? nan_a : index_a > index_b;",
        ),
        Mutant(
            "pool-heap-nan-last", "return nan_a != nan_b ? nan_a : index_a", "return nan_a != nan_b ? nan_b : index_a"
        ),
        Mutant("pool-insertion-ties", "value > values[at - 1]; --at)", "value >= values[at - 1]; --at)"),
        Mutant(
            "pool-candidates-limit",
            "ranks.unranked |= lane_bits(count > kStripes);",
            "ranks.unranked |= lane_bits(count > kStripes + 1);",
        ),
        Mutant("pool-rank-ties", "above |= x > ranks.values[rank];", "above |= x >= ranks.values[rank];"),
        Mutant("pool-nan-is-ranked", "ranks.unranked |= lane_bits(x != x);", "ranks.unranked |= lane_bits(x < x);"),
        Mutant("pool-lowest-is-ranked", "ranks.unranked = equal_bits(top[k - 1], lowest);", "ranks.unranked = 0;"),
        Mutant(
            "pool-last-candidates",
            "& ((1u << (end - i)) - 1);\n      compress_store(to, bits, index);",
            "& ((1u << (end - i - 1)) - 1);\n      compress_store(to, bits, index);",
        ),
        tests=(
            "python_tests/ops/test_global_k_max_pool.py",
            "python_tests/ops",
            "-k",
            "global_k_max_pool",
            "-m",
            "not slow",
            "--ignore=python_tests/ops/test_emulation.py",
            "--ignore=python_tests/ops/test_memory_sectors.py",
        ),
    ),
    *of(
        "csrc/cpu/diversify.h",
        Mutant(
            "diversify-spread-rest",
            "for (; i < positions; ++i) to[i] = bits",
            "for (; i + 1 < positions; ++i) to[i] = bits",
        ),
        Mutant("diversify-spread-row", "if (++x == layout.width) x = 0, ++y;", "if (++x == layout.width) x = 0;"),
        Mutant("diversify-alpha-hidden", "return visible + alpha * hidden;", "return visible + 0 * alpha * hidden;"),
        Mutant(
            "diversify-peaks-stay-in-patches",
            "((sixteen_bits(map_bits, start) & ~peaks) |",
            "((sixteen_bits(map_bits, start)) |",
        ),
        Mutant(
            "diversify-threshold-inclusive",
            "words_.word[draw % 4] < static_cast<uint32_t>(threshold)",
            "words_.word[draw % 4] <= static_cast<uint32_t>(threshold)",
            survives="Differs where a random word equals the threshold exactly: one draw of four billion.",
        ),
        Mutant(
            "diversify-always-hides", "if (threshold >> 32) return ~Words{};", "if (threshold >> 33) return ~Words{};"
        ),
        Mutant(
            "diversify-sample-of-own-seed",
            "op.seed_per_sample ? 0 : static_cast<uint32_t>(tile.sample)",
            "op.seed_per_sample ? 1 : static_cast<uint32_t>(tile.sample)",
        ),
        Mutant(
            "diversify-bits-over-a-word",
            "if (at % 32) store(to + kTile, row >> static_cast<uint32_t>(32 - at % 32));",
            "if (at % 32 > 31) store(to + kTile, row >> static_cast<uint32_t>(32 - at % 32));",
        ),
        Mutant(
            "diversify-columns-from-zero",
            "(high == 32 ? ~0u : (1u << high) - 1) & ~((1u << low) - 1)",
            "(high == 32 ? ~0u : (1u << high) - 1)",
        ),
        Mutant("diversify-nan-has-peaks", "if (nan)\n      suppress(", "if (!nan)\n      suppress("),
        Mutant(
            "diversify-float64-alpha",
            "total += suppressed >> i & 1 ? alpha * x : x;",
            "total += suppressed >> i & 1 ? x : x;",
        ),
        Mutant("diversify-float64-last-bits", "suppressed &= (1u << i) - 1;", "suppressed &= (1u << i) - 2;"),
        Mutant(
            "diversify-gradient-alpha",
            "hidden[c] = from_float<T>(share * static_cast<Value>(op.alpha));",
            "hidden[c] = from_float<T>(share);",
        ),
        Mutant(
            "diversify-gradient-float-tail",
            "to[i] = bits[i >> 3] >> (i & 7) & 1 ? hidden : plain;\n}\n\n",
            "to[i] = bits[i >> 3] >> (i & 3) & 1 ? hidden : plain;\n}\n\n",
        ),
        Mutant(
            "diversify-gradient-strided-bits",
            "at[c * layout.stride[1]] = bits[c * bytes + (i >> 3)] >> (i & 7)",
            "at[c * layout.stride[1]] = bits[c * bytes + (i >> 3)] >> (i & 6)",
        ),
        Mutant(
            "diversify-last-byte",
            "if (start + 8 < positions) bits[start / 8 + 1]",
            "if (start + 9 < positions) bits[start / 8 + 1]",
        ),
    ),
    *of(
        "csrc/cpu/vector.h",
        Mutant(
            "vector-half-partial",
            "for (int i = 0; i < count; ++i) x[i] = to_float(from",
            "for (int i = 0; i + 1 < count; ++i) x[i] = to_float(from",
        ),
        Mutant("vector-exp-range", "y = x < -87.3365478f ? Floats{} : y;", "y = x < -8.73365478f ? Floats{} : y;"),
        Mutant("vector-exp-degree", "p = p * r + 1.f / 720;", "p = p * r;"),
        Mutant(
            "vector-avx2-maximum",
            "return _mm256_max_ps(a, b);",
            "return _mm256_max_ps(b, a);",
            survives="Only a NaN tells: a map that has one goes another way, a row of scores is NaN anyway.",
        ),
        Mutant(
            "vector-avx512-select",
            "return _mm512_mask_blend_ps(bits, b, a);",
            "return _mm512_mask_blend_ps(bits, a, b);",
            survives="Where the processor has no AVX-512, nothing runs it; test_contract.py notices on one that has.",
        ),
        tests=ALL,
    ),
    *of(
        "csrc/cpu/rows.h",
        Mutant(
            "rows-end",
            "if (i < size) total += term(RestOfRow{size}, i);",
            "if (i + 1 < size) total += term(RestOfRow{size}, i);",
        ),
        tests=ALL,
    ),
    *of(
        "csrc/cpu/maps.h",
        Mutant(
            "maps-gathered-rows",
            "rows[channel * pitch + y * layout.width + x] =",
            "rows[channel * pitch + y * layout.height + x] =",
        ),
        Mutant(
            "maps-half-rows",
            "for (int64_t i = whole; i < positions; ++i) scratch[i] = to_float(base[i]);",
            "for (int64_t i = whole; i + 1 < positions; ++i) scratch[i] = to_float(base[i]);",
        ),
        Mutant(
            "maps-interleaved-end",
            "const int64_t valid = channels - channel < kLanes ? channels - channel : kLanes;",
            "const int64_t valid = channels - channel < kLanes ? channels - channel - 1 : kLanes;",
        ),
        tests=ALL,
    ),
    *of(
        "csrc/cpu/labels.h",
        Mutant("labels-equal-to-classes", "labels[row] >= classes)", "labels[row] > classes)"),
        tests=("python_tests/ops/test_gradient_boosting_cross_entropy.py", "python_tests/ops/test_class_mean_loss.py"),
    ),
    *of(
        "csrc/cpu/global_k_max_pool.cpp",
        Mutant(
            "pool-weight-gradient-by-thread",
            "op.maps_per_chunk = 1024;",
            "op.maps_per_chunk = 1 + op.maps / torch::stable::get_num_threads();",
        ),
    ),
    # Such a library would load under this torch, and perhaps not under the next one.
    *of(
        "csrc/cpu/labels.h",
        Mutant(
            "binary-cpu-unstable-symbol",
            "<string>\n",
            "<string>\nnamespace at { int get_num_threads(); }\ninline int threads = at::get_num_threads();\n",
            tests=("python_tests/packaging/test_binary.py",),
        ),
    ),
    *of(
        "csrc/cpu/instruction_set.cpp",
        Mutant("instruction-set-environment", "return found < 0 ? widest() : found;", "return widest();"),
        Mutant(
            "instruction-set-not-asked-for",
            ' && __builtin_cpu_supports("avx512vl")',
            "",
            tests=("python_tests/packaging/test_build.py", "-k", "the_processor_is_asked"),
        ),
        tests=("python_tests/packaging/test_machine.py", "-k", "instruction_set"),
    ),
    *of(
        "csrc/cpu/location_heatmap.h",
        Mutant("location-equal-to-the-mean", "any |= sums[i] > mean;", "any |= sums[i] >= mean;"),
        Mutant("location-inclusive", "mask[i] = sums[i] > mean ?", "mask[i] = sums[i] >= mean ?"),
        Mutant("location-groups-not-added", "for (int64_t group = 1; group", "for (int64_t group = 2; group"),
        Mutant("location-nan", "mean != mean ? kNoMask : any", "any"),
        Mutant("location-same-row", "same &= from[number] == last[number];", "same = from[number] == last[number];"),
        Mutant(
            "location-last-rows", "for (; row < count; ++row) add_rows<1>", "for (; row + 1 < count; ++row) add_rows<1>"
        ),
    ),
    *of(
        "csrc/cpu/location_heatmap.cpp",
        Mutant(
            "location-sums-by-thread",
            "constexpr int64_t kChannelsPerGroup = 256;",
            "const int64_t kChannelsPerGroup = 1 + layout.channels / torch::stable::get_num_threads();",
        ),
    ),
    *of(
        "csrc/cpu/compose_parts.h",
        Mutant("parts-last-cell", "if (whole == op.small_width) return;", "return;"),
        Mutant("parts-noise-position", "static_cast<uint32_t>(first + x) + re", "static_cast<uint32_t>(x) + re"),
        Mutant(
            "parts-stream-of-the-sample",
            "static_cast<uint64_t>(op.seed[sample]), 0}",
            "static_cast<uint64_t>(op.seed[0]), 0}",
        ),
        Mutant(
            "parts-noise-of-one-part",
            "op.parts > 1 && part < op.parts",
            "part < op.parts",
            survives="It costs time only: one part shows no noise.",
        ),
        Mutant("parts-covered-of-the-last-row", "if (!any) std::memset(covered, 0, pitch * sizeof(int32_t));", ""),
        Mutant("parts-fours", "* 0.25f + 0.125f", "* 0.25f"),
        Mutant("parts-ends-of-the-small-row", "line_[width + 1] = line_[width];", ""),
        Mutant(
            "parts-mixed-vector",
            "T mixed[kStep];\n        copy(x, x + kStep, mixed);",
            "T mixed[kStep];\n        copy(x, x + kStep - 1, mixed);",
        ),
        Mutant("parts-mean", "factor * op.column_factor());", "factor * factor);"),
    ),
]
