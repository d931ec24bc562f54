"""fgvc_ext/reference: the oracle itself. The kernels differ from it then, and so do the examples by hand."""

from ..mutant import Mutant, of

MUTANTS = [
    *of(
        "fgvc_ext/reference/global_k_max_pool.py",
        Mutant(
            "reference-pool-unstable",
            "stable=True",
            "stable=False",
        ),
        Mutant("reference-pool-mean", "(largest.sum(dim=2) / k)", "(largest.sum(dim=2) / max(1, k - 1))"),
        Mutant("reference-pool-dtype", ".values[:, :, :k].to(dtype)", ".values[:, :, :k]"),
    ),
    *of(
        "fgvc_ext/reference/diversify.py",
        Mutant(
            "reference-diversify-peaks", "torch.where(peaks, hide_peaks, patches)", "patches | (peaks & hide_peaks)"
        ),
        Mutant(
            "reference-diversify-alpha", "alpha * values, values).mean", "alpha * values, values * (1 - alpha)).mean"
        ),
        Mutant("reference-diversify-threshold", "round(probability * 2**32)", "round(probability * (2**32 - 1))"),
        Mutant(
            "reference-diversify-layout",
            "torch.empty_like(maps, dtype=torch.bool).copy_(mask)",
            "mask",
            survives="Torch's where happens to keep the layout of its first tensor: only a promise is lost.",
        ),
        Mutant(
            "reference-diversify-operator",
            "OPERATOR_ID = 1",
            "OPERATOR_ID = 2",
        ),
        Mutant(
            "reference-diversify-columns",
            "column = torch.arange(width, device=maps.device) // patch_size",
            "column = torch.arange(width, device=maps.device) % columns",
        ),
    ),
    *of(
        "fgvc_ext/reference/gradient_boosting_cross_entropy.py",
        Mutant("reference-boosting-ties", "(negatives >= threshold)", "(negatives > threshold)"),
        Mutant("reference-boosting-mean", "total / used.sum()", "total / len(used)"),
        Mutant("reference-boosting-nan", " | values.isnan().any(dim=1, keepdim=True)", ""),
        Mutant("reference-boosting-k", "if k < classes - 1:", "if k < classes - 2:"),
    ),
    *of(
        "fgvc_ext/reference/class_mean_loss.py",
        Mutant(
            "reference-class-means-rate",
            "step = (batch.counts * batch.old_means - batch.sums) / (1 + batch.counts)",
            "step = (batch.counts * batch.old_means - batch.sums) / batch.counts.clamp(min=1)",
        ),
        Mutant(
            "reference-class-means-pairs",
            "leads[:, None] & leads & (order[:, None] < order)",
            "leads[:, None] & leads & (order[:, None] <= order)",
        ),
        Mutant(
            "reference-class-means-scale",
            "exponents = most - (magnitudes.view(words) >> mantissa)",
            "exponents = most // 2 + 0 * (magnitudes.view(words) >> mantissa)",
        ),
        Mutant("reference-class-means-constant", "class_means.detach()[torch.where", "class_means[torch.where"),
        Mutant(
            "reference-class-means-official-pairs",
            "number = min(OFFICIAL_PAIRS, samples * (samples - 1))",
            "number = min(OFFICIAL_PAIRS, samples * (samples - 1) // 2)",
        ),
        Mutant(
            "reference-class-means-operator",
            "OFFICIAL_PAIRS_OPERATOR_ID = 3",
            "OFFICIAL_PAIRS_OPERATOR_ID = 1",
        ),
        Mutant(
            "reference-class-means-close-pairs",
            "_drawn(different & close, number, seed)",
            "_drawn(different, number, seed)",
        ),
        Mutant(
            "reference-class-means-distance",
            "distant = difference.detach().square().sum(dim=2) >= margin",
            "distant = difference.detach().square().sum(dim=2) > 4 * margin",
        ),
    ),
    *of(
        "fgvc_ext/reference/orthogonal_loss.py",
        Mutant(
            "reference-orthogonal-deviation",
            "variance = centred.square().mean(spatial, keepdim=True)",
            "variance = centred.var(spatial, keepdim=True)",
        ),
        Mutant("reference-orthogonal-constant-teachers", "teacher_maps.detach().to(dtype)", "teacher_maps.to(dtype)"),
        Mutant(
            "reference-orthogonal-constant-map",
            "centred / torch.where(constant, 1.0, variance).sqrt()",
            "centred / variance.sqrt()",
        ),
        Mutant(
            "reference-orthogonal-scale",
            "scale = centred.detach().abs()",
            "scale = centred.abs()",
            survives="A gradient through the scale cancels: z does not depend on it.",
        ),
    ),
    *of(
        "fgvc_ext/reference/spatial_attention_map.py",
        Mutant("reference-attention-constant-weights", "weights = values.mean(", "weights = values.detach().mean("),
        Mutant(
            "reference-attention-sum",
            "(weights * values).mean(dim=1)",
            "(weights * values).sum(dim=1) / max(2, values.shape[1])",
        ),
    ),
    *of(
        "fgvc_ext/reference/heatmap_to_boxes.py",
        Mutant(
            "reference-boxes-inclusive", "kept = values - lowest > threshold *", "kept = values - lowest >= threshold *"
        ),
        Mutant(
            "reference-boxes-nothing-kept",
            " & (right > left)",
            "",
            survives="Without anything kept, right - left is minus the image's width, less than any min_size.",
        ),
        Mutant("reference-boxes-min-size", "(bottom - top >= float(min_size))", "(bottom - top > float(min_size))"),
        Mutant(
            "reference-boxes-edge", "behind = torch.where(kept, index + 1, 0)", "behind = torch.where(kept, index, 0)"
        ),
    ),
    *of(
        "fgvc_ext/reference/labels.py",
        Mutant("reference-labels-range", "(labels < 0) | (labels >= classes)", "(labels < 0) | (labels > classes)"),
        Mutant("reference-labels-first", "int(wrong.nonzero()[0])", "int(wrong.nonzero()[-1])"),
        tests=("python_tests/ops/test_gradient_boosting_cross_entropy.py", "python_tests/ops/test_class_mean_loss.py"),
    ),
    *of(
        "fgvc_ext/reference/philox.py",
        Mutant(
            "reference-philox-carry",
            "k0, k1 = k0 + _KEY_STEPS[0] & WORD, k1 + _KEY_STEPS[1] & WORD",
            "k0, k1 = k0 + _KEY_STEPS[0], k1 + _KEY_STEPS[1]",
        ),
        Mutant(
            "reference-philox-sample",
            "if seed.dim() == 0 else torch.zeros_like(seed)",
            "if seed.dim() == 0 else torch.arange(samples, device=device)",
        ),
        tests=("python_tests/ops/test_diversify.py", "python_tests/packaging/test_philox.py"),
    ),
    *of(
        "fgvc_ext/reference/accumulation.py",
        Mutant("reference-accumulation", "torch.float64 if dtype == torch.float64 else torch.float32", "dtype"),
        tests=(
            "python_tests/ops/test_contract.py",
            "python_tests/ops/test_class_mean_loss.py",
            "python_tests/ops/test_orthogonal_loss.py",
            "-m",
            "not slow",
        ),
    ),
    *of(
        "fgvc_ext/reference/location_heatmap.py",
        Mutant("reference-location-inclusive", "aggregation > threshold", "aggregation >= threshold"),
        Mutant("reference-location-constant", "(above | nothing)", "above"),
        Mutant(
            "reference-location-nearest",
            "(2 * torch.arange(count, device=device) + 1)",
            "2 * torch.arange(count, device=device)",
        ),
    ),
    *of(
        "fgvc_ext/reference/compose_parts.py",
        Mutant("reference-parts-edge", "(x1 <= x) & (x < x2)", "(x1 < x) & (x <= x2)"),
        Mutant("reference-parts-operator", "OPERATOR_ID = 2", "OPERATOR_ID = 1"),
        Mutant(
            "reference-parts-pool",
            "count_include_pad=False",
            "count_include_pad=True",
            survives="Without padding there is nothing to count.",
        ),
        Mutant("reference-parts-radius", "math.ceil(3 * sigma)", "math.ceil(2 * sigma)"),
        Mutant("reference-parts-reflection", "2 * (size - 1) - places", "2 * size - 1 - places"),
    ),
]
