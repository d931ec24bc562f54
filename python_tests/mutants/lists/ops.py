"""fgvc_ext/ops and fgvc_ext/_library.py: arguments, autograd, fake kernels, which kernel runs."""

from ..mutant import Mutant, of, operators

GRAPHS = ("python_tests/ops/test_gradients.py", "python_tests/ops/test_graphs.py", "-m", "not slow")
IMPORT = (*(f"python_tests/packaging/test_{name}.py" for name in ("import", "backend", "machine")), "-m", "not slow")
# Every operator's own file, where its messages stand.
OWN_TESTS = tuple(f"python_tests/ops/test_{name}.py" for name in operators())

MUTANTS = [
    *of(
        "fgvc_ext/ops/_checks.py",
        Mutant(
            "checks-py-dimensions",
            'value.dim() != shape.count(",") + (shape != "[]")',
            'value.dim() < shape.count(",") + (shape != "[]")',
        ),
        Mutant(
            "checks-py-bool-is-an-int",
            "numbers.Integral)) and not isinstance(value, bool)",
            "numbers.Integral))",
        ),
        Mutant("checks-py-float32-limit", "abs(number) <= LARGEST_FLOAT32", "abs(number) <= _LARGEST"),
        Mutant("checks-py-probability", "0 <= p <= 1", "0 <= p < 1"),
        Mutant(
            "checks-py-positions",
            "positions > MOST_POSITIONS",
            "positions >= 2 * MOST_POSITIONS",
            survives="Maps of so many positions take gigabytes: no test makes one.",
        ),
        Mutant(
            "checks-py-beside-float64",
            "value.dtype == torch.float32 and first.dtype != torch.float64",
            "value.dtype == torch.float32",
        ),
        Mutant(
            "checks-py-seed-rows",
            "seed.dim() == 1 and seed.shape[0] != maps.shape[0]",
            "seed.dim() == 1 and seed.shape[0] < maps.shape[0]",
        ),
        Mutant(
            "checks-py-nan",
            "if not (-_LARGEST <= value <= _LARGEST and accepts(value)):",
            "if value < -_LARGEST or value > _LARGEST or not accepts(value):",
            survives="A NaN is in no range that an argument has: `accepts` refuses it.",
        ),
        Mutant("checks-py-height-and-width", "return height, width", "return width, height"),
        Mutant(
            "checks-py-numpy-as-it-comes",
            "isinstance(value, (int, float)) else float(value)",
            "True else value",
            tests=("python_tests/ops/test_checks.py",),
        ),
        Mutant(
            "checks-py-numpy-int-as-it-comes",
            "(int, torch.SymInt)) else operator.index(value)",
            "object) else 0",
            tests=("python_tests/ops/test_checks.py",),
            survives="Torch takes NumPy's integers as they are, too.",
        ),
        Mutant("checks-py-labels-device", "check_device(op, name, value, first_name, first)\n    rows", "rows"),
        tests=OWN_TESTS,
    ),
    *of(
        "fgvc_ext/ops/_operator.py",
        Mutant(
            "operator-second-backward",
            'return Operator(f"{name}_backward", fake, backward=refuse, vmap=vmap)',
            'return Operator(f"{name}_backward", fake, vmap=vmap)',
        ),
        Mutant(
            "operator-forward-mode-dropped", "if forward_ad._current_level >= 0:", "if forward_ad._current_level >= 1:"
        ),
        Mutant(
            "operator-export-keeps-values",
            "if torch.compiler.is_exporting() or transforms_are_active():\n        return True",
            "if transforms_are_active():\n        return True",
        ),
        Mutant(
            "operator-no-grad-records",
            "return torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)",
            "return torch._C._any_requires_grad(*arguments)",
            survives="Under no_grad an autograd.Function records nothing all the same: only time is lost.",
        ),
        Mutant(
            "operator-channels-last-strides",
            "if tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last):\n        "
            "return tensor.stride()",
            'return torch.empty(tensor.shape, device="meta").stride()',
            tests=("python_tests/ops/test_contract.py", "python_tests/ops/test_graphs.py", "-m", "not slow"),
        ),
        Mutant(
            "operator-vmap-in-dims",
            "return argument.select(dim, number) if isinstance(dim, int) else argument",
            "return argument.select(0, number) if isinstance(dim, int) else argument",
        ),
        Mutant(
            "operator-vmap-folds-all",
            "if not batched <= set(tensors) or not folds(*arguments):",
            "if not batched <= set(tensors):",
        ),
        Mutant("operator-vmap-other-dim", "tensor.movedim(dim, 0)", "tensor"),
        Mutant(
            "operator-transform-as-usual",
            "return self._transform(*arguments) if self.differentiable else self.raw(*arguments)",
            "return self._record(*arguments) if self.differentiable else self.raw(*arguments)",
        ),
        tests=GRAPHS,
    ),
    *of(
        "fgvc_ext/ops/diversify.py",
        Mutant(
            "diversify-py-alpha-lost",
            "ctx.alpha, ctx.size, ctx.stride = alpha, maps.shape, dense_strides(maps)",
            "ctx.alpha, ctx.size, ctx.stride = 0.1, maps.shape, dense_strides(maps)",
        ),
        Mutant(
            "diversify-py-saves-the-maps",
            "ctx.save_for_backward(bits)",
            'ctx.save_for_backward(bits), setattr(ctx, "maps", maps)',
        ),
        Mutant(
            "diversify-py-thresholds-swapped",
            "hide_threshold(p_peak), hide_threshold(p_patch), patch_size",
            "hide_threshold(p_patch), hide_threshold(p_peak), patch_size",
        ),
        Mutant("diversify-py-fake-bytes", "return (height * width + 7) // 8", "return (height * width + 8) // 8"),
    ),
    *of(
        "fgvc_ext/ops/global_k_max_pool.py",
        Mutant("pool-py-wide-indices", "LARGEST_INT16_MAP = 32768", "LARGEST_INT16_MAP = 32769"),
        Mutant("pool-py-k-above-positions", "if k > positions:", "if k > positions + 1:"),
        Mutant(
            "pool-py-keeps-values",
            "keep_values = weight is not None and wants_gradient(weight)",
            "keep_values = weight is not None",
        ),
        Mutant("pool-py-fake-values", "k if keep_values else 0", "k"),
        Mutant(
            "pool-py-gradients-swapped",
            "features if features_wanted else None, None, weights",
            "features, None, weights",
            survives="Autograd drops a gradient that nobody wants: only time is lost.",
        ),
        Mutant("pool-py-folds-weights", "return not arguments[-1]", "return True"),
    ),
    *of(
        "fgvc_ext/ops/gradient_boosting_cross_entropy.py",
        Mutant(
            "boosting-py-reductions", 'REDUCTIONS = ("none", "mean", "sum")', 'REDUCTIONS = ("none", "sum", "mean")'
        ),
        Mutant(
            "boosting-py-loss-dtype",
            "dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32",
            "dtype = scores.dtype",
        ),
        Mutant(
            "boosting-py-ignored-labels",
            'look_at_labels(OP, "target", target, classes, ignore_index)',
            'look_at_labels(OP, "target", target, classes)',
            survives="Runs on a GPU only: test_cuda.py notices there.",
        ),
    ),
    *of(
        "fgvc_ext/ops/class_mean_loss.py",
        Mutant(
            "class-means-py-losses-swapped",
            "_class_mean_loss_backward(within, between, gradients, ctx.dtype)",
            "_class_mean_loss_backward(between, within, gradients, ctx.dtype)",
        ),
        Mutant("class-means-py-labels-not-looked-at", "if check_labels() and not labels.is_cpu", "if False"),
        Mutant(
            "class-means-py-labels-always-looked-at", "if check_labels() and not labels.is_cpu", "if not labels.is_cpu"
        ),
        Mutant(
            "class-means-py-labels-of-the-embeddings",
            'look_at_labels(OP, "labels", labels, class_means.shape[0])',
            'look_at_labels(OP, "labels", labels, embeddings.shape[0])',
        ),
        Mutant("class-means-py-rate-zero", "lambda number: 0 <= number <=", "lambda number: 0 < number <="),
        Mutant(
            "class-means-py-differentiable-means",
            "ctx.mark_non_differentiable(batch_means)",
            "ctx.mark_non_differentiable()",
        ),
    ),
    *of(
        "fgvc_ext/ops/orthogonal_loss.py",
        Mutant(
            "orthogonal-py-sizes",
            "teacher_maps.shape[1:] != student_map.shape",
            "teacher_maps.shape[2:] != student_map.shape[1:]",
        ),
        Mutant("orthogonal-py-no-teacher", "if teacher_maps.shape[0] == 0:", "if teacher_maps.numel() == 0 and False:"),
    ),
    *of(
        "fgvc_ext/ops/spatial_attention_map.py",
        Mutant("attention-py-no-channels", "if 0 in features.shape[1:]:", "if 0 in features.shape[2:]:"),
        Mutant(
            "attention-py-fake-layout", "return torch.empty_like(features)", "return features.new_empty(features.shape)"
        ),
    ),
    *of(
        "fgvc_ext/ops/heatmap_to_boxes.py",
        Mutant("boxes-py-gradient", "= heatmaps.detach(), float(threshold)", "= heatmaps, float(threshold)"),
        Mutant("boxes-py-threshold-one", "lambda value: 0 <= value <= 1", "lambda value: 0 < value <= 1"),
    ),
    *of(
        "fgvc_ext/_library.py",
        Mutant(
            "library-compiled-enforces-nothing",
            "    if _compiled_asked:\n        raise RuntimeError(",
            "    if _compiled_asked and runs and False:\n        raise RuntimeError(",
        ),
        Mutant("library-warns-each-time", "if message not in _warned:", "if True:"),
        Mutant("library-truncated", "if actual < end:", "if actual < end // 2:"),
        Mutant(
            "library-unknown-backend", 'if _backend not in ("", "compiled", "reference"):', 'if _backend == "eager":'
        ),
        Mutant("library-unknown-isa", "if asked not in supported:", "if asked not in supported and False:"),
        Mutant("library-reference-stays", "        _reference_asked = before", "        _reference_asked = True"),
        Mutant(
            "library-cuda-major",
            'if torch.version.cuda.split(".")[0] != built.split(".")[0]:',
            "if torch.version.cuda != built:",
        ),
        Mutant("library-ptx", "return capability >= built  # PTX", "return capability[0] == built[0]  # PTX"),
        Mutant(
            "library-no-kernel-of-an-operator",
            "_kernels[device].update(kernels)",
            "_kernels[device].update(_operators())",
        ),
        tests=IMPORT,
    ),
    *of(
        "fgvc_ext/ops/location_heatmap.py",
        Mutant("location-py-gradient", "[level.detach() for level in features]", "list(features)"),
        Mutant("location-py-pixels", "height * width > MOST_POSITIONS", "height * width > 2 * MOST_POSITIONS + 2"),
        Mutant("location-py-samples", "level.shape[0] != first.shape[0]", "level.shape[0] < first.shape[0]"),
        Mutant("location-py-check", "check_labels() and not torch", "not torch"),
    ),
    *of(
        "fgvc_ext/ops/compose_parts.py",
        Mutant("parts-py-mode", 'noise_mode == "replace", part_height', 'noise_mode == "add", part_height'),
        Mutant("parts-py-largest-sigma", "value <= LARGEST_SIGMA,", "value <= 2 * LARGEST_SIGMA,"),
        Mutant("parts-py-sides", "height % part_height or width % part_width", "height % part_height"),
        Mutant("parts-py-name", 'seed_tensor(OP, seed, images, "images")', "seed_tensor(OP, seed, images)"),
    ),
]
