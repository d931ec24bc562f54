"""fgvc_ext/models: layers and their names, weights to start from, weights files, predictions."""

from ..mutant import Mutant, of

BACKBONES = ("python_tests/models/test_backbone.py",)
STARTING = ("python_tests/models/test_starting_weights.py",)
FILES = ("python_tests/models/test_weights_file.py",)
COMBINED = ("python_tests/models/test_combined.py", "-k", "not exported")
TIMM = ("python_tests/models/test_timm_backbone.py",)

MUTANTS = [
    *of(
        "fgvc_ext/models/norm.py",
        Mutant("transfer-statistics-of-one", "embeddings.shape[0] < 2", "embeddings.shape[0] < 1"),
        tests=("python_tests/models/test_knowledge_transfer.py",),
    ),
    *of(
        "fgvc_ext/models/backbone.py",
        Mutant(
            "models-mean-and-std-swapped",
            '"mean": IMAGENET_MEAN, "std": IMAGENET_STD',
            '"mean": IMAGENET_STD, "std": IMAGENET_MEAN',
        ),
        Mutant("models-levels-compute-one-less", "if known.index(group) > last:", "if known.index(group) >= last:"),
        Mutant(
            "models-levels-in-the-order-of-layers",
            "return [found[name] for name in names]",
            "return [value for name, value in found.items() if name in names]",
        ),
        tests=BACKBONES,
    ),
    *of(
        "fgvc_ext/models/timm_backbone.py",
        Mutant("models-timm-tokens-unnormed", 'self.norm = "NCHW", 0, True', 'self.norm = "NCHW", 0, False'),
        Mutant("models-timm-idle-layers-trained", "named[name].requires_grad_(False)", "pass"),
        Mutant("models-timm-tokens-of-the-last-group", "self.order[0] if path in self.loose else", ""),
        Mutant("models-timm-no-rotary-positions", "if self.group_of.calls.rotary:", "if False:"),
        Mutant("models-timm-positions-not-fitted", "dict(convert(dict(state), self.body.model))", "dict(state)"),
        tests=TIMM,
    ),
    *of(
        "fgvc_ext/models/timm_library.py",
        Mutant("models-timm-last-patches-missing", "model.patch_embed.dynamic_img_pad = True", "pass"),
        Mutant("models-timm-image-size-ignored", '{"img_size": image_size}', "{}"),
        tests=TIMM,
    ),
    *of(
        "fgvc_ext/models/timm_layers.py",
        Mutant(
            "models-timm-prefix-on-top", "torch.cat((positions, first), dim=1)", "torch.cat((first, positions), dim=1)"
        ),
        Mutant("models-timm-computes-all", "raise _Reached", "pass"),
        tests=TIMM,
    ),
    *of(
        "fgvc_ext/models/torchvision_backbone.py",
        Mutant("models-resnet-keeps-its-pooling", 'if n not in ("avgpool", "fc")}', 'if n not in ("fc",)}'),
        Mutant("models-resnet10-stride", "(32, 64, 128, 256), (1, 2, 2, 1)", "(32, 64, 128, 256), (1, 2, 2, 2)"),
        Mutant(
            "models-stride-in-both-convolutions",
            "block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride",
            "block.conv1.stride = block.conv2.stride",
        ),
        Mutant("models-densenet-last-norm", 'number = 4 if part == "norm5"', 'number = 5 if part == "norm5"'),
        tests=BACKBONES,
    ),
    *of(
        "fgvc_ext/models/pretrained.py",
        Mutant(
            "models-missing-layers-pass",
            'missing=[name for name in missing if name.rpartition(".")[0] not in fresh],',
            "missing=[],",
        ),
        Mutant(
            "models-unexpected-names-pass",
            "unexpected=[name for name in unexpected if not name.startswith((*HEADS, *LATER))],",
            "unexpected=[],",
        ),
        Mutant(
            "models-wrong-shapes-pass",
            'resized = [name for name in shapes if name.startswith("classifier.") or name.rpartition(".")[0] in heads]',
            "resized = list(shapes)",
        ),
        Mutant("models-weights-run-code", '"cpu", weights_only=True', '"cpu", weights_only=False'),
        Mutant("models-one-wrapper-alone", "while name.startswith(WRAPPERS):", "if name.startswith(WRAPPERS):"),
        Mutant("models-classifier-is-needed", '("classifier", *groups)', "groups"),
        tests=BACKBONES,
    ),
    *of(
        "fgvc_ext/models/starting_weights.py",
        Mutant(
            "models-hash-of-the-file-before",
            "_sha256(self.file, status.st_size, status.st_mtime_ns)",
            "_sha256(self.file, 0, 0)",
        ),
        Mutant("models-damaged-weights-pass", "if not found.startswith(self.hash_prefix):", "if not found:"),
        Mutant("models-download-unchecked", "self.hash_prefix or None, progress", "None, progress"),
        tests=STARTING,
    ),
    *of(
        "fgvc_ext/models/config.py",
        Mutant(
            "models-recorded-for-any-name",
            'if known.get("name") == source.name and "sha256" in known:',
            'if "sha256" in known:',
        ),
        Mutant("models-changed-file-passes", "if known is not None and source.sha256() != known:", "if known == '':"),
        Mutant("models-download-for-a-look", "if not download:", "if download is None:"),
        tests=STARTING,
    ),
    *of(
        "fgvc_ext/models/weights_file.py",
        Mutant(
            "models-file-without-a-version", 'metadata.get("format") != FORMAT', 'metadata.get("format", 1) != FORMAT'
        ),
        Mutant("models-metadata-in-any-order", "**metadata}, sort_keys=True)", "**metadata})"),
        Mutant("models-weights-are-shared", ".contiguous().clone()", ".contiguous()"),
        tests=FILES,
    ),
    *of(
        "fgvc_ext/models/model.py",
        Mutant("models-left-in-training", "return model.eval().to(device)", "return model.train().to(device)"),
        Mutant("models-preprocessing-forgotten", "model.preprocessing.options(),", "Preprocessing().options(),"),
        Mutant("models-least-probable-first", "argsort(descending=True, stable=True)", "argsort(stable=True)"),
        Mutant("models-mode-not-put-back", "self.train(training)", "self.train()"),
        Mutant(
            "models-box-axes-swapped", "boxes[row].cpu(), *image.shape[-2:])", "boxes[row].cpu(), *image.shape[:0:-1])"
        ),
        Mutant("models-later-batches-are-cut", "images[first : first + batch_size]]", "images[first : batch_size]]"),
        tests=FILES,
    ),
    *of(
        "fgvc_ext/models/subtle_differences.py",
        Mutant(
            "models-evaluation-hides-too",
            "if self.diversification is None or not self.training:",
            "if self.diversification is None:",
            survives="The block gives the plain mean in evaluation by itself: the check only saves it the call.",
        ),
        Mutant("models-patch-size-forgotten", '"patch_size": patch_size,', '"patch_size": 3,', tests=FILES),
        tests=("python_tests/models/test_subtle_differences.py",),
    ),
    *of(
        "fgvc_ext/models/heads.py",
        Mutant("models-large-first-scores", "std=0.01", "std=1.0"),
        tests=("python_tests/models/test_subtle_differences.py",),
    ),
    *of(
        "fgvc_ext/models/heads.py",
        Mutant("combined-block-left-out", "if self.diversification is None else self.diversification(maps, seed)", ""),
        Mutant("combined-masks-of-no-seed", "self.diversification(maps, seed)", "self.diversification(maps)"),
        tests=COMBINED,
    ),
    *of(
        "fgvc_ext/models/combined.py",
        Mutant("combined-average-of-one-head", "found[0] if len(found) == 1 else ", ""),
        Mutant("combined-average-of-the-model-alone", "average or self.average", "self.average"),
        Mutant("combined-probabilities-always", "average or self.average", 'average or "probabilities"'),
        Mutant("combined-average-forgotten", '"average": average,', '"average": "probabilities",'),
        Mutant("combined-seed-forgotten", "maps(features, seed)", "maps(features)"),
        Mutant(
            "combined-map-head-is-shown-first",
            'maps = {"attention": spatial_attention_map(features)[:, None]}',
            'maps = {"mean": features.mean(1, keepdim=True)}',
        ),
        tests=COMBINED,
    ),
    *of(
        "fgvc_ext/models/ensemble.py",
        Mutant("ensemble-sum-of-probabilities", " - math.log(len(scores))", ""),
        Mutant("ensemble-mean-of-logarithms", "log_softmax(2).logsumexp(0)", "log_softmax(2).mean(0)"),
        Mutant(
            "ensemble-members-of-other-classes",
            'for name in ("classes", "preprocessing")',
            'for name in ("preprocessing",)',
        ),
        Mutant(
            "ensemble-groups-of-the-last", "groups.setdefault(name, []).extend(parameters)", "groups[name] = parameters"
        ),
        tests=("python_tests/models/test_ensemble.py",),
    ),
    *of(
        "fgvc_ext/models/knowledge_transfer.py",
        Mutant("transfer-official-mean-pooling", "features.amax((2, 3))", "features.mean((2, 3))"),
        Mutant("transfer-official-relu", "nn.ELU(inplace=True)", "nn.ReLU(inplace=True)"),
        tests=("python_tests/models/test_knowledge_transfer.py",),
    ),
    *of(
        "fgvc_ext/models/model.py",
        Mutant(
            "transfer-maps-without-bias",
            "linear.weight[:, :, None, None], linear.bias)",
            "linear.weight[:, :, None, None])",
        ),
        tests=("python_tests/models/test_knowledge_transfer.py",),
    ),
]
