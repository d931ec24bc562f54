"""csrc/common and csrc/library.cpp: what both host sides check and allocate, dtypes, layouts, Philox."""

from ..mutant import EMULATION, Mutant, of

HOSTILE = ("python_tests/ops/test_hostile.py", "python_tests/ops/test_contract.py", "-m", "not slow")
CONTRACT = (
    "python_tests/ops/test_contract.py",
    "python_tests/ops/test_gradients.py",
    "-k",
    "equal or layouts or nan or empty or strides or support",
)

MUTANTS = [
    *of(
        "csrc/common/diversify.h",
        Mutant(
            "diversify-gradient-not-dense",
            "const Tensor dense_grad = as_dense(grad);",
            "const Tensor dense_grad = grad;",
        ),
        Mutant(
            "diversify-patch-size-clipped", "std::min(patch_size, longer_side)", "std::min(patch_size, layout.height)"
        ),
        Mutant(
            "diversify-seed-strided", "const Tensor dense_seed = as_dense(seed);", "const Tensor dense_seed = seed;"
        ),
    ),
    *of(
        "csrc/common/global_k_max_pool.h",
        Mutant("pool-narrow-indices-limit", "kInt16Positions = 32768;", "kInt16Positions = 65536;"),
        Mutant("pool-gradient-not-dense", ".grad = as_dense(grad),", ".grad = grad,"),
        Mutant(
            "pool-weight-dtype",
            "const auto weights = as_accumulation(weight, features);",
            "const auto weights = weight;",
        ),
        Mutant("pool-k-not-checked", "k >= 1 && k <= layout.positions()", "k >= 1", tests=HOSTILE),
    ),
    *of(
        "csrc/common/gradient_boosting_cross_entropy.h",
        Mutant("boosting-target-strided", "const Tensor labels = as_dense(target);", "const Tensor labels = target;"),
        Mutant("boosting-gradient-strided", "dense_grad = as_dense(grad);", "dense_grad = grad;"),
        Mutant(
            "boosting-saved-rows",
            "{first, first + bytes, first + 2 * bytes,",
            "{first, first + 2 * bytes, first + bytes,",
            survives="Forward and backward name the rows by this one function.",
        ),
        Mutant("boosting-k-clipped", "std::min(k, classes)", "k", tests=HOSTILE),
    ),
    *of(
        "csrc/common/class_mean_loss.h",
        Mutant(
            "class-means-means-strides-swapped",
            ".means_stride = {class_means.stride(0), class_means.stride(1)}",
            ".means_stride = {class_means.size(1), class_means.stride(1)}",
        ),
        Mutant(
            "class-means-labels-strided",
            "const Tensor dense_labels = as_dense(labels);",
            "const Tensor dense_labels = labels;",
        ),
    ),
    *of(
        "csrc/common/orthogonal_loss.h",
        Mutant("orthogonal-student-strided", "student = as_dense(student_map)", "student = student_map"),
        Mutant("orthogonal-no-teacher", "teachers > 0", "teachers >= 0", tests=HOSTILE),
    ),
    *of(
        "csrc/common/heatmap_to_boxes.h",
        Mutant(
            "boxes-strides-swapped",
            "{heatmaps.stride(0), heatmaps.stride(1), heatmaps.stride(2)}",
            "{heatmaps.stride(0), heatmaps.stride(2), heatmaps.stride(1)}",
        ),
    ),
    *of(
        "csrc/common/spatial_attention_map.h",
        Mutant(
            "attention-gradient-not-dense",
            "const Tensor dense_grad = as_dense(grad);",
            "const Tensor dense_grad = grad;",
        ),
        Mutant(
            "attention-groups-rounded-down",
            "groups = ceil_divide(layout.channels, channels_per_group);\n  check",
            "groups = std::max<int64_t>(1, layout.channels / channels_per_group);\n  check",
        ),
    ),
    *of(
        "csrc/common/loss_gradient.h",
        Mutant(
            "losses-gradients-strided",
            "gradients.scalar_type() == wide && gradients.is_contiguous()",
            "gradients.scalar_type() == wide",
            tests=HOSTILE,
        ),
    ),
    *of(
        "csrc/common/checks.h",
        Mutant("checks-dims", "that(tensor.dim() == dims, name", "that(tensor.dim() >= dims, name"),
        Mutant("checks-saved-contiguous", "that(tensor.is_contiguous(), name", "that(true, name"),
        Mutant("checks-saved-dtype", "that(tensor.scalar_type() == dtype, name", "that(true, name"),
        Mutant(
            "checks-device",
            "that(device_type(tensor) == device_type(first) &&",
            "that(true ||",
            survives="On a machine without a GPU every tensor that reaches a kernel is on the CPU.",
        ),
        Mutant(
            "checks-negative-strides",
            "if (size[i] < 0 || stride[i] < 0) return false;",
            "if (size[i] < 0) return false;",
            survives="Torch makes no tensor of negative strides.",
        ),
        Mutant(
            "checks-overlap",
            "if (size[i] > 1 && stride[i] != elements) return false;",
            "if (size[i] > 1 && stride[i] > elements) return false;",
        ),
        Mutant(
            "checks-overflow",
            "if (__builtin_mul_overflow(elements, size[i], &elements)) return false;",
            "elements *= size[i];",
        ),
        Mutant("checks-positions", "width == 0 || height <= INT32_MAX / width", "true"),
        Mutant(
            "checks-size-of-a-seed",
            'input("seed", tensor, first, ScalarType::Long, {first.size(0)});',
            'input("seed", tensor, first, ScalarType::Long, {tensor.size(0)});',
        ),
        tests=HOSTILE,
    ),
    *of(
        "csrc/common/dtype.h",
        Mutant("dtype-bfloat16-truncated", "(bits + 0x7FFF + (bits >> 16 & 1)) >> 16", "bits >> 16"),
        Mutant("dtype-bfloat16-nan", "bits >> 16 | 0x40", "0x7F80"),
        Mutant(
            "dtype-half-ties",
            "0x38000000u + 0xFFF + (magnitude >> 13 & 1)",
            "0x38000000u + 0x1000",
            survives="Ties away from zero instead of to even: the error of a result stays half a unit.",
        ),
        Mutant("dtype-half-infinity", "magnitude >= 0x477FF000u", "magnitude >= 0x47800000u"),
        tests=CONTRACT,
    ),
    *of(
        "csrc/common/layout.h",
        Mutant("layout-evenly-spaced", "stride[2] == width * stride[3]", "stride[2] >= width"),
        Mutant("layout-rows-contiguous", "(stride[2] == width || height == 1)", "true"),
        Mutant(
            "layout-offset", "sample * stride[0] + channel * stride[1]", "sample * stride[0] + channel * height * width"
        ),
        tests=CONTRACT,
    ),
    *of(
        "csrc/common/tiles.h",
        Mutant("tiles-rounded-down", "(a + b - 1) / b;", "(a + b - 2) / b;"),
        Mutant(
            "tiles-in-place",
            "(dtype == Dtype::float32 || dtype == Dtype::float64) && layout.map_is_contiguous()",
            "(dtype == Dtype::float32 || dtype == Dtype::float64)",
        ),
        tests=CONTRACT,
    ),
    *of(
        "csrc/common/tensor.h",
        Mutant(
            "tensor-as-dense",
            "return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);",
            "return tensor;",
        ),
        Mutant(
            "tensor-accumulation-dtype",
            "as_dense(tensor->scalar_type() == dtype ? *tensor :",
            "as_dense(true ? *tensor :",
        ),
        tests=CONTRACT,
    ),
    *of(
        "csrc/common/philox.h",
        Mutant("philox-rounds", "round < 10;", "round < 9;"),
        Mutant("philox-key", "static_cast<uint32_t>(seed >> 32)", "0"),
        tests=("python_tests/ops/test_diversify.py", "python_tests/packaging/test_philox.py"),
    ),
    *of(
        "csrc/library.cpp",
        Mutant(
            "library-keeps-values-schema",
            "bool keep_values, bool wide_indices=False",
            "bool keep_values, bool wide_indices=True",
            tests=(
                "python_tests/ops/test_global_k_max_pool.py",
                "python_tests/ops",
                "-k",
                "global_k_max_pool",
                "-m",
                "not slow",
            ),
        ),
    ),
    *of(
        "csrc/common/location_heatmap.h",
        Mutant("location-nearest", "(2 * i + 1) * source_count", "2 * i * source_count"),
        Mutant("location-number-of-levels", "levels >= 1 && levels <= kMostLevels", "levels <= kMostLevels"),
    ),
    *of(
        "csrc/common/compose_parts.h",
        Mutant("parts-reflected-period", "2 * (size - 1)", "2 * size"),
        Mutant("parts-pixel-on-the-edge", "ceil(side - 0.5)", "floor(side - 0.5) + 1"),
        Mutant("parts-share-of-the-next", "(2 * i + 1) * size + count", "2 * i * size + count"),
        Mutant("parts-radius", "ceil(3 * small_sigma())", "ceil(2 * small_sigma())"),
        Mutant("parts-divisors", "layout.height % part_height == 0 &&", ""),
    ),
    *of(
        "csrc/common/normal.h",
        Mutant("normal-half-a-word", "(Lanes::to_float(word) + 0.5f)", "Lanes::to_float(word)"),
        Mutant("normal-quadrant", "((quarter + 1) & 2) != 0", "(quarter & 2) != 0"),
        Mutant("normal-log-series", "p = p * square + 1.f / 3;", "p = p * square + 0.333f;"),
        Mutant("normal-channels", "second * other.cosine", "second * other.sine"),
        Mutant("normal-wide-angle", "sin(kTurn * u[1])", "sin(kTurn * u[3])"),
        tests=("python_tests/ops/test_compose_parts.py",),
    ),
    *of(
        "csrc/common/normal.h",
        Mutant("normal-device-half-a-turn", "first * cospi(2 * u[1])", "first * cospi(u[1])"),
        Mutant("normal-device-channels", "second * cospi(2 * u[3])", "second * sinpi(2 * u[3])"),
        Mutant("normal-device-words", "first * sinpi(2 * u[1])", "first * sinpi(2 * u[3])"),
        tests=(*EMULATION, "-m", "not slow", "-k", "compose_parts"),
    ),
]
