"""ELoPE: network, localisers and crops, boxes in files, the embedding layer's training, heat maps and class means."""

from ..mutant import Mutant, of

NETWORK = ("python_tests/models/test_elope.py", "-k", "not table_3 and not exported")
BOXES = ("python_tests/data/test_boxed.py",)
LOCALISATION = ("python_tests/training/test_localisation.py",)

MUTANTS = [
    *of(
        "fgvc_ext/models/norm.py",
        Mutant("elope-rest-without-statistics", "if self.training and embeddings.shape[0] < 2:", "if False:"),
        tests=NETWORK,
    ),
    *of(
        "fgvc_ext/models/elope.py",
        Mutant("elope-crops-are-cut-again", "if not self.training:", "if True:"),
        Mutant("elope-size-of-images-ignored", "return resized_to(images, self.size), None", "return images, None"),
        Mutant("elope-localiser-learns", "localiser.requires_grad_(False)", "localiser"),
        Mutant(
            "elope-map-of-a-turned-image",
            "(images.shape[-2], images.shape[-1])",
            "(images.shape[-1], images.shape[-2])",
        ),
        Mutant("elope-prediction-ends-training", "self.train(training)", "pass"),
        tests=NETWORK,
    ),
    *of(
        "fgvc_ext/models/heads.py",
        Mutant("elope-maximum-of-k", '1 if pooling == "gmp" else k', "k"),
        Mutant(
            "elope-pooled-map-without-weights",
            "values[..., :k] if weight is None else values[..., :k] * weight",
            "values[..., :k]",
        ),
        Mutant("elope-average-is-no-share", " / features.shape[2:].numel()", ""),
        tests=NETWORK,
    ),
    *of(
        "fgvc_ext/models/localiser.py",
        Mutant("localiser-thumbnails-alias", ", antialias=True)", ")"),
        Mutant("localiser-half-a-pixel", "[:, None] - 0.5)", "[:, None])"),
        Mutant("localiser-lowest-of-all-maps", "maps.amin((2, 3), keepdim=True)", "maps.amin()"),
        Mutant("localiser-stem-of-the-classifier", "copy.deepcopy(getattr(source, name))", "getattr(source, name)"),
        Mutant("localiser-frozen-with-the-classifier", "(*layers.values()).requires_grad_(True)", "(*layers.values())"),
        Mutant("localiser-any-size-is-a-box", ", min_size=self.min_size)", ", min_size=0)"),
        Mutant("localiser-threshold-not-kept", '"threshold": self.threshold', '"threshold": 0.3'),
        Mutant(
            "localiser-largest-feature",
            "resized_to(images, self.size)).mean(1)",
            "resized_to(images, self.size)).amax(1)",
        ),
        tests=NETWORK,
    ),
    *of(
        "fgvc_ext/data/boxed.py",
        Mutant("boxed-box-of-the-row", "self.cut[index]", "self.cut[self.rows[index]]"),
        Mutant("boxed-touched-pixels-lost", "math.ceil(high)", "round(high)"),
        Mutant("boxed-nothing-remains", "max(first + 1, math.ceil(high))", "math.ceil(high)"),
        Mutant(
            "boxed-other-boxes-same-images",
            'return f"{self.whole.content_key()} {boxes}"',
            "return self.whole.content_key()",
        ),
        Mutant("boxed-digits", ":.9g", ":.7g"),
        Mutant("boxed-own-name-of-the-split", "boxes_of(file, dataset, split)", "boxes_of(file, dataset)"),
        Mutant("boxed-share-of-the-first", "areas[0] + areas[1] - both", "areas[0]"),
        tests=BOXES,
    ),
    *of(
        "fgvc_ext/training/embedding.py",
        Mutant("embedding-loss-without-weight", "weight * shared", "shared"),
        Mutant("embedding-logs-divided-twice", "loss.within * len(labels)", "loss.within"),
        Mutant("embedding-rest-begins-anew", 'group["lr"] * factor', 'group["lr"]'),
        Mutant("embedding-rest-has-a-schedule", '"constant": True', '"constant": False'),
        Mutant("means-of-any-length", "nn.functional.normalize(found) if normalize else found", "found"),
        Mutant("means-of-no-sample", 'sums["count"].clamp(min=1)[:, None]', 'sums["count"][:, None]'),
        Mutant("means-of-training-mode", "model.to(device).eval().embed", "model.to(device).embed"),
        tests=LOCALISATION,
    ),
    *of(
        "fgvc_ext/training/localisation.py",
        Mutant("heat-maps-nearest", 'mode="bilinear", align_corners=False)[:, 0]', 'mode="nearest")[:, 0]'),
        Mutant("heat-maps-larger-is-better", "higher_is_better = False", "higher_is_better = True"),
        Mutant("heat-maps-sum-over-positions", ".mean((1, 2))", ".sum((1, 2))"),
        Mutant("boxes-more-than-half", "ratio >= at", "ratio > at"),
        Mutant(
            "boxes-of-training-mode",
            "localiser.to(choose_device(engine.device)).eval()",
            "localiser.to(choose_device(engine.device))",
        ),
        Mutant("boxes-broken-images-stop", "_as_it_is, engine.broken_images,", '_as_it_is, "error",'),
        tests=LOCALISATION,
    ),
]
