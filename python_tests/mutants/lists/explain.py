"""fgvc_ext/explain: where models look, what they confuse, figures and report."""

from ..mutant import Mutant, of

COMPARISON = ("python_tests/explain/test_comparison.py",)
FIGURES = ("python_tests/explain/test_figures.py",)
REPORT = ("python_tests/explain/test_report.py",)

MUTANTS = [
    *of(
        "fgvc_ext/explain/crop.py",
        Mutant("explain-crop-rounded-down", "round((length - self.crop) / 2)", "(length - self.crop) // 2"),
        Mutant("explain-crop-offset-sign", "points.double() * scale - offset", "points.double() * scale + offset"),
        Mutant("explain-box-beyond-the-crop", "corners.clamp(0, self.crop)", "corners.clamp(min=0)"),
        tests=COMPARISON,
    ),
    *of(
        "fgvc_ext/explain/scene.py",
        Mutant("explain-parts-in-place", "torch.full_like(parts, torch.nan)", "parts"),
        Mutant("explain-part-on-the-edge", "(places < self.frame.crop)", "(places <= self.frame.crop)"),
        Mutant("explain-hidden-parts-visible", "(self._truth[row, :, 2:] > 0) & ", "(self._truth[row, :, 2:] >= 0) & "),
        Mutant("explain-nothing-kept", "if image.shown is not None:", "if image.shown is None:"),
        tests=COMPARISON,
    ),
    *of(
        "fgvc_ext/explain/comparison.py",
        Mutant("explain-minimum-of-all-maps", "maps.amin((-2, -1), keepdim=True)", "maps.amin()"),
        Mutant("explain-seeds-of-positions", "seed + torch.tensor(chosen)", "seed + torch.arange(len(chosen))"),
        Mutant("explain-example-without-its-part", "worth + 2 * (place[:, 2] > 0)", "worth + 0 * (place[:, 2] > 0)"),
        Mutant("explain-class-without-images", "if len(rows) == 0:", "if rows is None:"),
        Mutant("explain-features-of-all", "scene.batches(batch_size, rows=rows.tolist())", "scene.batches(batch_size)"),
        Mutant("explain-pairs-of-the-first-model", "last = list(answers)[-1]", "last = list(answers)[0]"),
        tests=COMPARISON,
    ),
    *of(
        "fgvc_ext/explain/cam.py",
        Mutant("explain-negative-evidence", "neginf=0.0).clamp(min=0)", "neginf=0.0).abs()"),
        Mutant("explain-box-rows-from-x", "rows = _covered(y1, y2, ", "rows = _covered(x1, x2, "),
        Mutant("explain-wide-neighbourhood", "3, stride=1, padding=1)", "5, stride=1, padding=2)"),
        Mutant("explain-corner-of-the-cell", "(index % w + 0.5)", "(index % w)"),
        Mutant("explain-part-counted-twice", "(touched > 0).sum(1)", "touched.sum(1)"),
        Mutant("explain-sample-deviation", "std(correction=0)", "std(correction=1)"),
        tests=("python_tests/explain/test_cam.py",),
    ),
    *of(
        "fgvc_ext/explain/confusions.py",
        Mutant("explain-confusion-transposed", "target * num_classes + predicted", "predicted * num_classes + target"),
        Mutant(
            "explain-confused-one-way", "torch.triu(matrix + matrix.T, diagonal=1)", "torch.triu(matrix, diagonal=1)"
        ),
        Mutant("explain-share-of-one-class", "/ (images[a] + images[b])", "/ images[a]"),
        tests=("python_tests/explain/test_confusions.py",),
    ),
    *of(
        "fgvc_ext/explain/embeddings.py",
        Mutant(
            "explain-plane-not-centred", "centred = centred - centred.mean(0)", "centred = centred - centred.mean()"
        ),
        Mutant("explain-classes-weigh-the-same", ".sum(1) @ counts.double()", ".sum(1).sum() * counts.double().mean()"),
        tests=FIGURES,
    ),
    *of(
        "fgvc_ext/explain/maps.py",
        Mutant("explain-constant-map", "if high <= low:", "if high < low:"),
        Mutant(
            "explain-mask-darkens-the-rest",
            "torch.where(hidden, (1 - darken) * base, base)",
            "torch.where(hidden, base, (1 - darken) * base)",
        ),
        Mutant(
            "explain-opacity-reversed",
            "(1 - opacity) * image.cpu().float() + opacity * colours",
            "opacity * image.cpu().float() + (1 - opacity) * colours",
        ),
        tests=("python_tests/explain/test_maps.py",),
    ),
    *of(
        "fgvc_ext/explain/figures.py",
        Mutant("explain-diagonal-lost", "shares.clone().fill_diagonal_(torch.nan)", "shares.fill_diagonal_(torch.nan)"),
        Mutant("explain-box-not-enlarged", "draw_boxes(image, scale * boxes[n])", "draw_boxes(image, boxes[n])"),
        Mutant(
            "explain-error-of-any-measure",
            "values = [1 - value for value in values] if accuracy else values",
            "values = [1 - value for value in values]",
        ),
        tests=FIGURES,
    ),
    *of(
        "fgvc_ext/explain/report.py",
        Mutant(
            "explain-headline-of-the-first",
            "finished[-1], _main_measure(finished[-1])",
            "finished[0], _main_measure(finished[0])",
        ),
        Mutant("explain-cut-lines-read", " and None not in row.values()]", "]"),
        Mutant("explain-other-evaluations-lost", "for kind in dict.fromkeys(named) if", "for kind in _KINDS if"),
        tests=REPORT,
    ),
    *of(
        "fgvc_ext/explain/document.py",
        Mutant("explain-cells-not-escaped", "return escape(str(value))", "return str(value)"),
        Mutant("explain-page-too-large", "len(page.encode()) > SIZE_LIMIT", "len(page.encode()) > 2 * SIZE_LIMIT"),
        tests=REPORT,
    ),
    *of(
        "fgvc_ext/explain/view.py",
        Mutant("explain-second-map", "else maps[0]", "else maps[-1]"),
        Mutant(
            "explain-map-of-the-first-class",
            "torch.arange(len(maps), device=maps.device), labels]",
            "torch.arange(len(maps), device=maps.device), 0]",
        ),
        Mutant(
            "explain-large-maps-count-more",
            "torch.stack([as_shares(each[:, 0]) for each in fine])",
            "torch.stack([each[:, 0] for each in fine])",
        ),
        tests=("python_tests/explain/test_view.py",),
    ),
    *of(
        "fgvc_ext/explain/ensembles.py",
        Mutant("explain-overlap-of-maxima", "torch.minimum(as_shares", "torch.maximum(as_shares"),
        Mutant(
            "explain-alpha-without-models", 'float(method["alpha"]), int(method["models"])', 'float(method["alpha"]), 2'
        ),
        tests=("python_tests/explain/test_ensembles.py",),
    ),
    *of(
        "fgvc_ext/explain/cam.py",
        Mutant(
            "explain-hidden-parts-own-points",
            "parts[rows, None, :, 2] <= 0, torch.inf",
            "parts[rows, None, :, 2] < 0, torch.inf",
        ),
        Mutant("explain-points-on-corners", "(torch.arange(n * finer) + 0.5)", "(torch.arange(n * finer) + 0.0)"),
        Mutant("explain-grad-cam-signs", ".sum(1).clamp(min=0)", ".sum(1).abs()"),
        tests=("python_tests/explain/test_cam.py",),
    ),
]
