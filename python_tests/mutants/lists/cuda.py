"""csrc/cuda, run under emulation. What only a GPU can show stands behind test_cuda.py."""

from ..mutant import EMULATION, Mutant, of

GPU = "Every stream and device is the same under emulation: test_cuda.py notices on a GPU."

MUTANTS = [
    *of(
        "csrc/cuda/elements.cuh",
        Mutant("cuda-chunk-alignment-of-channels", "(layout.channels == 1 || aligned(layout.stride[1]))", "true"),
        Mutant("cuda-chunk-alignment-of-samples", "(layout.samples == 1 || aligned(layout.stride[0]))", "true"),
        Mutant("cuda-chunk-alignment-of-data", "reinterpret_cast<uintptr_t>(data) % (elements * size) == 0 &&", ""),
        Mutant(
            "cuda-key-of-minus-zero",
            "const uint32_t bits = x != x ? 0x7FFFFFFFu : __float_as_uint(x + 0.f);",
            "const uint32_t bits = x != x ? 0x7FFFFFFFu : __float_as_uint(x);",
        ),
        tests=(*EMULATION, "-m", "not slow"),
    ),
    *of(
        "csrc/cuda/launch.cuh",
        Mutant(
            "cuda-stream",
            "stream_(current_stream(tensor.get_device_index()))",
            "stream_()",
            survives=GPU,
            tests=("python_tests/ops/test_cuda.py", "python_tests/ops/test_emulation.py", "-m", "not slow"),
        ),
        Mutant(
            "cuda-device-guard",
            "guard_(tensor.get_device_index())",
            "guard_(0)",
            survives=GPU,
            tests=("python_tests/ops/test_cuda.py", "python_tests/ops/test_emulation.py", "-m", "not slow"),
        ),
    ),
    *of(
        "csrc/cuda/selection.cuh",
        Mutant(
            "cuda-syncwarp",
            "  __syncwarp();\n  if (lane < found) list.entry[rank] = mine;",
            "  if (lane < found) list.entry[rank] = mine;",
        ),
        Mutant(
            "cuda-rank-ties",
            "(uint64_t{key} << 32 | other.position) > (uint64_t{other.key} << 32 | position)",
            "(uint64_t{key} << 32 | position) > (uint64_t{other.key} << 32 | other.position)",
        ),
        Mutant(
            "cuda-more-than-a-warp",
            "if (found > kWarp) found = collect_fewer",
            "if (found > 2 * kWarp) found = collect_fewer",
        ),
        tests=("python_tests/ops/test_emulation.py", "-k", "global_k_max_pool or k_max", "-m", "not slow"),
    ),
    *of(
        "csrc/cuda/reduction.cuh",
        Mutant("cuda-block-reduce-barrier", "__syncthreads();  // the last call's values have been read\n", "\n"),
        tests=(*EMULATION, "-m", "not slow"),
    ),
    *of(
        "csrc/cuda/gradient_boosting_cross_entropy.cuh",
        Mutant(
            "cuda-million-row-sum",
            "  double total = 0;\n  int64_t used = 0;",
            "  Value total = 0;\n  int64_t used = 0;",
        ),
        Mutant("cuda-wrong-label", "if (!ignored) result.loss", "if (ignored) result.loss"),
        Mutant("cuda-gradient-of-the-threshold", "!(score < threshold) ||", "score > threshold ||"),
    ),
    *of(
        "csrc/cuda/diversify.cuh",
        Mutant("cuda-diversify-alpha", "return hide ? alpha * x : x;", "return hide ? 0 * alpha * x : x;"),
    ),
    *of(
        "csrc/cuda/orthogonal_loss.cuh",
        Mutant("cuda-orthogonal-teachers", "before + fabs(z(map.load(i)))", "before + z(map.load(i))"),
    ),
    *of(
        "csrc/cuda/class_mean_loss.cuh",
        Mutant("cuda-class-means-pairs", "if (other > row) between += hinge * hinge;", "between += hinge * hinge;"),
    ),
    *of(
        "csrc/cuda/heatmap_to_boxes.cuh",
        Mutant(
            "cuda-boxes-bottom", "bottom = warp_reduce(bottom, Larger());", "bottom = warp_reduce(bottom, Smaller());"
        ),
    ),
    *of(
        "csrc/cuda/launch.cuh",
        Mutant(
            "binary-cuda-unstable-symbol",
            'cuh"\n',
            'cuh"\nnamespace at { int get_num_threads(); }\ninline int threads = at::get_num_threads();\n',
            tests=("python_tests/packaging/test_binary.py",),
        ),
    ),
    *of(
        "csrc/cuda/spatial_attention_map.cuh",
        Mutant(
            "cuda-attention-last-warp",
            "for (int other = 1; other < kWarpsPerBlock; ++other",
            "for (int other = 2; other < kWarpsPerBlock; ++other",
        ),
    ),
]
