"""csrc/cuda, run under emulation. What only a GPU can show stands behind test_cuda.py."""

from ..mutant import EMULATION, Mutant, of

GPU = "Under emulation every stream and every device is the same; test_cuda.py notices on a GPU."
ALL = (*EMULATION, "-m", "not slow")


def by(name: str) -> tuple[str, ...]:
    """The one test that serves, where its name is not the operator's."""
    return (f"{EMULATION[0]}::test_{name}",)


MUTANTS = [
    *of(
        "csrc/cuda/elements.cuh",
        Mutant("cuda-alignment-of-channels", "(layout.channels == 1 || aligned(layout.stride[1]))", "true"),
        Mutant("cuda-alignment-of-samples", "(layout.samples == 1 || aligned(layout.stride[0]))", "true"),
        Mutant("cuda-alignment-of-data", "reinterpret_cast<uintptr_t>(data) % (elements * size) == 0 &&", ""),
        Mutant("cuda-alignment-of-positions", "&& aligned(layout.positions()) &&", "&&"),
        Mutant("cuda-minus-zero", "0x7FFFFFFFu : __float_as_uint(x + 0.f);", "0x7FFFFFFFu : __float_as_uint(x);"),
        tests=ALL,
    ),
    *of(
        "csrc/cuda/index.cuh",
        Mutant("cuda-divisor", "- divisor_) / divisor_ + 1);", "- divisor_) / divisor_);"),
        Mutant("cuda-last-group-of-channels", "all - channel < 32 ?", "all - channel < 31 ?"),
        tests=ALL,
    ),
    *of(
        "csrc/cuda/launch.cuh",
        Mutant("cuda-stream", "stream_(current_stream(tensor.get_device_index()))", "stream_()", survives=GPU),
        Mutant("cuda-device-guard", "guard_(tensor.get_device_index())", "guard_(0)", survives=GPU),
        Mutant(
            "cuda-capacity", "if (k > 4) return function(Constant<8>());", "if (k > 5) return function(Constant<8>());"
        ),
        # Such a library would load under this torch, and perhaps not under the next one.
        Mutant(
            "binary-cuda-unstable-symbol",
            'cuh"\n',
            'cuh"\nnamespace at { int get_num_threads(); }\ninline int threads = at::get_num_threads();\n',
            tests=("python_tests/packaging/test_binary.py",),
        ),
        tests=ALL,
    ),
    *of(
        "csrc/cuda/selection.cuh",
        Mutant("cuda-syncwarp", "  __syncwarp();\n  if (lane < found)", "  if (lane < found)"),
        Mutant(
            "cuda-rank-ties",
            "<< 32 | other.position) > (uint64_t{other.key} << 32 | position)",
            "<< 32 | position) > (uint64_t{other.key} << 32 | other.position)",
        ),
        Mutant("cuda-float64-ties", "(position < other.position)", "(position > other.position)"),
        Mutant("cuda-more-than-a-warp", "if (found > kWarp) found =", "if (found > 2 * kWarp) found ="),
        Mutant("cuda-last-tie", "position(slot) <= last", "position(slot) < last"),
        tests=("python_tests/ops/test_emulation.py", "-k", "k_max", "-m", "not slow"),
    ),
    *of(
        "csrc/cuda/reduction.cuh",
        Mutant("cuda-block-reduce-barrier", "__syncthreads();  // the last call's values have been read\n", "\n"),
        Mutant(
            "cuda-last-warp",
            "for (int warp = 1; warp < Threads / kWarp; ++warp)",
            "for (int warp = 1; warp + 1 < Threads / kWarp; ++warp)",
        ),
        tests=ALL,
    ),
    *of(
        "csrc/cuda/loss_gradient.cuh",
        Mutant("cuda-second-loss", "gradients.load(loss * op.values + i)", "gradients.load(i)"),
        tests=("python_tests/ops/test_emulation.py", "-k", "class_mean or orthogonal", "-m", "not slow"),
    ),
    *of(
        "csrc/cuda/gradient_boosting_cross_entropy.cuh",
        Mutant(
            "cuda-million-row-sum",
            "  double total = 0;\n  int64_t used",
            "  Value total = 0;\n  int64_t used",
            tests=by("the_sum_of_many_losses_loses_nothing"),
        ),
        Mutant(
            "cuda-wrong-label",
            "if (!ignored) result.loss",
            "if (ignored) result.loss",
            tests=by("a_label_out_of_range_gives_nan"),
        ),
        Mutant("cuda-gradient-at-the-threshold", "!(score < threshold) ||", "score > threshold ||"),
        Mutant("cuda-label-among-negatives", "reached += i != label && ordered_key", "reached += ordered_key"),
    ),
    *of(
        "csrc/cuda/global_k_max_pool.cuh",
        Mutant(
            "cuda-pool-mean",
            "narrow<T>(static_cast<Value>(total / k))",
            "narrow<T>(static_cast<Value>(total / (k - 1)))",
        ),
        Mutant(
            "cuda-pool-narrow",
            "store(at, static_cast<int16_t>(found.position));",
            "store(at, static_cast<int8_t>(found.position));",
        ),
    ),
    *of(
        "csrc/cuda/global_k_max_pool_backward.cuh",
        Mutant(
            "cuda-pool-backward-syncwarp",
            "__syncwarp();  // no entry may be overwritten by another lane's zero\n",
            "\n",
        ),
        Mutant(
            "cuda-pool-weight-gradient-rows",
            "for (unsigned i = 1; i < rows; ++i) total +=",
            "for (unsigned i = 1; i + 1 < rows; ++i) total +=",
        ),
    ),
    *of(
        "csrc/cuda/diversify.cuh",
        Mutant("cuda-diversify-alpha", "return hide ? alpha * x : x;", "return hide ? 0 * alpha * x : x;"),
        Mutant("cuda-diversify-peak-draw", "i == 0 && call == 0 ? peak_threshold_", "i == 0 ? peak_threshold_"),
        Mutant(
            "cuda-diversify-seed-per-sample", "sample_ = op.seed_per_sample ? 0 :", "sample_ = op.seed_per_sample ? 1 :"
        ),
        Mutant(
            "cuda-diversify-rest-of-a-tile",
            "const uint32_t draw = x == peak ? 0 :",
            "const uint32_t draw = x > peak ? 0 :",
            tests=by("more_patches_than_shared_memory_holds"),
        ),
    ),
    *of(
        "csrc/cuda/spread_bits.cuh",
        Mutant("cuda-spread-alpha", "narrow<T>(share * static_cast<Value>(op.alpha))}", "narrow<T>(share)}"),
        tests=("python_tests/ops/test_emulation.py", "-k", "diversify or suppression_mask", "-m", "not slow"),
    ),
    *of(
        "csrc/cuda/orthogonal_loss.cuh",
        Mutant("cuda-orthogonal-teachers", "before + magnitude(z(map.load(i)))", "before + z(map.load(i))"),
        Mutant("cuda-orthogonal-first-teacher", "teacher == 0 ? Value(0) : gradient.load(i)", "gradient.load(i)"),
    ),
    *of(
        "csrc/cuda/class_mean_loss.cuh",
        Mutant("cuda-class-means-pairs", "if (other > row) between += hinge * hinge;", "between += hinge * hinge;"),
        Mutant("cuda-class-means-share", "- share * work.residuals.load(", "- 0 * work.residuals.load("),
        Mutant("cuda-class-means-label-of-the-end", "label < op.classes;", "label <= op.classes;"),
        Mutant("cuda-class-means-negative-label", "label >= 0 && label < op.classes;", "label < op.classes;"),
        Mutant(
            "cuda-class-means-wrong-label-is-a-class",
            "work.lead.store(row, valid ? first : -1);",
            "work.lead.store(row, valid ? first : row);",
        ),
        Mutant(
            "cuda-class-means-loss-of-a-wrong-label",
            "work.within.store(row, static_cast<Value>(NAN));",
            "work.within.store(row, 0);",
        ),
        Mutant(
            "cuda-class-means-gradient-of-a-wrong-label",
            "between.store(i, static_cast<Value>(NAN));",
            "between.store(i, 0);",
        ),
        Mutant(
            "cuda-class-means-mean-of-a-wrong-label",
            "batch_mean.store(i, narrow<M>(static_cast<Value>(NAN)))",
            "batch_mean.store(i, narrow<M>(static_cast<Value>(0)))",
        ),
        Mutant(
            "cuda-class-means-scale",
            "op.normalize ? scale_to_one(block_reduce<kClassThreads>(largest, Larger())) : Value(1);",
            "op.normalize && block_reduce<kClassThreads>(largest, Larger()) < 0 ? Value(2) : Value(1);",
        ),
    ),
    *of(
        "csrc/cuda/heatmap_to_boxes.cuh",
        Mutant(
            "cuda-boxes-bottom", "bottom = warp_reduce(bottom, Larger());", "bottom = warp_reduce(bottom, Smaller());"
        ),
    ),
    *of(
        "csrc/cuda/spatial_attention_map.cuh",
        Mutant(
            "cuda-attention-last-warp",
            "for (int other = 1; other < kWarpsPerBlock; ++other",
            "for (int other = 2; other < kWarpsPerBlock; ++other",
        ),
        Mutant(
            "cuda-attention-totals",
            "for (int64_t group = 1; group < op.groups; ++group)",
            "for (int64_t group = 2; group < op.groups; ++group)",
        ),
    ),
    *of(
        "csrc/cuda/location_heatmap.cuh",
        Mutant("cuda-location-barrier", "total[e];\n  __syncthreads();\n  if (row", "total[e];\n  if (row"),
        Mutant("cuda-location-last-channels", "(last < all ? last : all)", "last"),
        Mutant("cuda-location-rows", "other = 1; other < block.rows", "other = 1; other + 1 < block.rows"),
        Mutant("cuda-location-inclusive", "any |= sums.load(i) > mean;", "any |= sums.load(i) >= mean;"),
        Mutant("cuda-location-columns", "Index{column} * Elements + e) + 1)", "Index{column} * Elements) + 1)"),
    ),
    *of(
        "csrc/cuda/compose_parts.cuh",
        Mutant(
            "cuda-parts-columns-left", "    __syncthreads();  // what the last columns left here has been read\n", ""
        ),
        Mutant("cuda-parts-weights", "    __syncthreads();\n    double total", "    double total"),
        Mutant("cuda-parts-last-cell", "cell * 4 + 4 < columns ? cell * 4 + 4 : columns", "cell * 4 + 4"),
        Mutant("cuda-parts-many-boxes", "part < 32 ? of_box", "true ? of_box"),
        Mutant(
            "cuda-parts-interleaved",
            "of_block[threadIdx.x * kPartChannelsHere + c]",
            "of_block[threadIdx.x + c * kPartThreads]",
        ),
        Mutant(
            "cuda-parts-sample",
            "op.seed_per_sample ? 0 : static_cast<uint32_t>(sample)",
            "static_cast<uint32_t>(sample)",
        ),
    ),
]
