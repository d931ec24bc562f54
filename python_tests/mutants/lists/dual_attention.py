"""Dual attention fusion: part proposals and part attention, the teacher's blocks, the model, and its training step."""

from ..mutant import Mutant, of

MODELS = "python_tests/models"
TRAINING = "python_tests/training"
PROPOSALS = (f"{MODELS}/test_part_proposal.py",)
NETWORK = (f"{MODELS}/test_dual_attention.py", "-k", "not exported and not no_resnet")
STEP = (
    f"{TRAINING}/test_dual_attention_gradients.py",
    f"{TRAINING}/test_dual_attention_step.py",
    "-k",
    "not every_switch and not waits and not one_graph",
)

MUTANTS = [
    *of(
        "fgvc_ext/models/part_proposal.py",
        Mutant("anchors-at-the-corner", "dtype=torch.float32) + 0.5) * down", "dtype=torch.float32)) * down"),
        Mutant(
            "anchors-ratio-outside",
            "for scale in self.scales for ratio in self.ratios]",
            "for ratio in self.ratios for scale in self.scales]",
        ),
        Mutant("anchors-area-with-the-ratio", "side / root] for", "side] for"),
        Mutant("anchors-of-any-image", "return side / IMAGE_SIDE", "return 1.0"),
        Mutant("boxes-any-growth", ".clamp(max=LONGEST).exp(), image_size[1]", ".exp(), image_size[1]"),
        Mutant("boxes-without-a-pixel", "high - low < 1", "high - low < 0"),
        Mutant("boxes-pixel-outside", "- 0.5).clamp(0, length - 1)", "- 0.5)"),
        Mutant("centres-turned", "y * width + x]", "x * width + y]"),
        Mutant("pyramid-without-above", "else own + F.interpolate", "else own + 0 * F.interpolate"),
        Mutant("pyramid-not-detached", "level.detach() if self.detach else level", "level"),
        Mutant("towers-not-small", "std=0.01", "std=0.1"),
        Mutant("regions-scores-of-others", "scores.gather(1, indices), decode", "scores[:, : self.regions], decode"),
        Mutant("regions-anywhere", "positive = centre_values(foreground, places)", "pass"),
        Mutant("regions-one-threshold", "iou_threshold=self.iou_threshold", "iou_threshold=0.5"),
        tests=PROPOSALS,
    ),
    *of(
        "fgvc_ext/models/part_attention.py",
        Mutant("foreground-one-level-suffices", "levels >= threshold", "levels > 0"),
        Mutant("foreground-nothing-is-nothing", "some | nothing[:, None, None]", "some"),
        Mutant("union-of-the-first", ".any(dim=1, keepdim=True).float()", "[:, :1].float()"),
        Mutant("union-with-the-edge", "(x < high_x)", "(x <= high_x)"),
        Mutant("filter-without-floor", "self.floor + (1 - self.floor) * pooled", "pooled"),
        Mutant("filter-learnt-beyond-one", "self.learnt.weight.dtype)).sigmoid()", "self.learnt.weight.dtype))"),
        tests=(f"{MODELS}/test_part_attention.py",),
    ),
    *of(
        "fgvc_ext/models/deep_bilinear.py",
        Mutant("bilinear-groups-rounded-down", "math.ceil(math.log2", "math.floor(math.log2"),
        Mutant(
            "bilinear-filter-behind-the-norm",
            "self.bn1(self.attention(self.conv1(features), saliency))",
            "self.attention(self.bn1(self.conv1(features)), saliency)",
        ),
        Mutant("bilinear-last-at-random", "nn.init.dirac_(convolution.weight)", "pass"),
        Mutant("bilinear-shortcut-lost", "return F.relu(found + shortcut), grouped", "return F.relu(found), grouped"),
        Mutant("bilinear-heat-map-filters", "saliency = images[:, 4:]", "saliency = images[:, 3:4]"),
        Mutant(
            "bilinear-scores-before-the-last",
            "Taught(self.classifier(features.mean((2, 3)))",
            "Taught(self.classifier(levels[-1].mean((2, 3)))",
        ),
        Mutant("bilinear-frozen-layers-learn", "backbone.freeze(frozen_until)", "pass"),
        Mutant(
            "bilinear-sites-turned",
            "zip(self.names[-2:], SITES[:2], strict=True):\n            if",
            "zip(self.names[-2:], SITES[1::-1], strict=True):\n            if",
        ),
        tests=(f"{MODELS}/test_deep_bilinear.py",),
    ),
    *of(
        "fgvc_ext/models/backbone.py",
        Mutant("backbone-images-have-three-channels", "images.shape[1] != self.in_channels", "images.shape[1] != 3"),
        Mutant("backbone-new-channels-in-front", "(0, 0, 0, 0, 0, missing)", "(0, 0, 0, 0, missing, 0)"),
        tests=(f"{MODELS}/test_deep_bilinear.py",),
    ),
    *of(
        "fgvc_ext/models/dual_attention.py",
        Mutant("dual-fusion-starts-as-the-sum", "torch.eye(num_classes) / 2", "torch.eye(num_classes)"),
        Mutant("dual-fusion-reaches-the-networks", "both.detach() if self.detach else both", "both"),
        Mutant("dual-blur-of-any-size", " * relative_side(images.shape[-2:])", ""),
        Mutant("dual-teacher-is-the-student", "copy.deepcopy(backbone) if use_teacher", "backbone if use_teacher"),
        Mutant("dual-object-at-any-threshold", "foreground(heat, self.fg_threshold)", "foreground(heat, 0.9)"),
        Mutant("dual-any-switch", "if switches[name] and not switches[before]:", "if False:"),
        Mutant("dual-explains-the-student", "scores = self.fusion(scores, taught.scores)", "pass"),
        Mutant("dual-blocks-counted-twice", "for p in parameters if id(p) not in apart", "for p in parameters"),
        Mutant(
            "dual-images-in-turn",
            "images.repeat_interleave(boxes.shape[1], dim=0)",
            "images.repeat(boxes.shape[1], 1, 1, 1)",
        ),
        tests=NETWORK,
    ),
    *of(
        "fgvc_ext/models/pretrained.py",
        Mutant(
            "weights-for-one-network",
            "for prefix, backbone in networks.items():",
            "for prefix, backbone in list(networks.items())[:1]:",
        ),
        Mutant("weights-of-images-alone", "backbone.fitted(rename(name), tensor)", "tensor"),
        tests=NETWORK,
    ),
    *of(
        "fgvc_ext/training/part_losses.py",
        Mutant(
            "ranking-worse-is-better",
            "targets[:, None] > targets[:, :, None]",
            "targets[:, None] < targets[:, :, None]",
        ),
        Mutant("ranking-of-any-region", "& valid[:, None] & valid[:, :, None]", ""),
        Mutant(
            "ranking-mean-over-pairs", "/ max(1, len(scores))\n    return Ranking", "/ pairs.sum()\n    return Ranking"
        ),
        Mutant("parts-mean-of-all", "(valid | ~valid.any(dim=1, keepdim=True))", "torch.ones_like(valid)"),
        Mutant("parts-mean-of-none", "(valid | ~valid.any(dim=1, keepdim=True))", "valid"),
        Mutant("soft-without-the-square", "temperature**2 / max", "temperature / max"),
        Mutant("soft-teacher-learns", "_wide(teacher.detach()) / temperature", "_wide(teacher) / temperature"),
        Mutant("hint-whole-square", "return 0.5 * difference", "return difference"),
        Mutant("hint-teacher-learns", "_wide(teacher.detach())\n", "_wide(teacher)\n"),
        Mutant("areas-of-any-region", " & valid[..., None]", ""),
        tests=(f"{TRAINING}/test_part_losses.py",),
    ),
    *of(
        "fgvc_ext/training/dual_attention.py",
        Mutant("dual-step-seeds-lost", 'found.boxes.detach(), batch["seed"])', "found.boxes.detach(), 0)"),
        Mutant("dual-step-smallest-area-of-448", " * relative_side(images.shape[-2:]) ** 2", ""),
        Mutant(
            "dual-step-area-by-the-side", "relative_side(images.shape[-2:]) ** 2", "relative_side(images.shape[-2:])"
        ),
        Mutant(
            "dual-step-area-without-object",
            "if seen.object is not None and method.area_weight:",
            "if method.area_weight:",
        ),
        Mutant("dual-step-no-ramp", "return self.ramp * (", "return 1.0 * ("),
        Mutant("dual-step-ramp-from-one", "epoch / epochs)", "(epoch + 1) / epochs)"),
        Mutant("dual-step-hints-added", "torch.stack(each).mean() if each", "torch.stack(each).sum() if each"),
        Mutant("dual-step-convex-is-a-sum", "else 1.0 - method.hint_weight", "else 1.0"),
        Mutant("dual-step-teacher-unweighted", "method.teacher_weight * _total", "_total"),
        Mutant("dual-step-plain-grouping", ".mean().square()", ".mean()"),
        Mutant("dual-step-logs-of-no-sample", "if n:  #", "if True:  #"),
        Mutant("dual-step-one-rate", '"lr": group["lr"] * self.method.sppn_lr', '"lr": group["lr"]'),
        Mutant(
            "dual-step-headline-of-the-student",
            "self.sums(found[headline], label)",
            'self.sums(found["student"], label)',
        ),
        tests=STEP,
    ),
]
