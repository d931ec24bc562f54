"""The training step of dual attention fusion as one would write it first: eager, image by image, box by box.

It takes the layers of a task's model and computes everything else anew, from the paper's formulas. It waits for the
device wherever that is convenient.
"""

from __future__ import annotations

import math

import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

from fgvc_ext.reference.compose_parts import blur, normals
from fgvc_ext.training.dual_attention import DualAttentionClassification


def naive_step(task: DualAttentionClassification, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every part of the loss by name, and "loss", their sum with the factors of the settings."""
    model, method, images, label = task.network, task.method, batch["image"], batch["label"]
    student, found = model.student, dict[str, Tensor]()
    levels = _levels(student.backbone, images, student.names)
    scores = student.classifier(student.dropout(levels[-1].mean((2, 3))))
    found["pred"] = F.cross_entropy(scores, label)

    heat = _heat(levels, images.shape[-2:])
    object_masks = [_foreground(one) for one in heat]
    regions = _regions(model.proposals, levels, images.shape[-2:], object_masks)
    boxes, region_scores, valid = zip(*regions, strict=True)

    parts = _compose(task, images, boxes, batch["seed"])
    part_levels = _levels(student.backbone, parts.flatten(0, 1), student.names)
    part_scores = student.classifier(student.dropout(part_levels[-1].mean((2, 3)))).view(*parts.shape[:2], -1)
    kept = [s[v] if v.any() else s for s, v in zip(part_scores, valid, strict=True)]
    found["con"] = method.con_weight * F.cross_entropy(torch.stack([s.mean(0) for s in kept]), label)
    found["rank"] = _rank(region_scores, part_scores, valid, label, method.margin)
    found |= _box_losses(boxes, valid, object_masks, method, images.shape[-2:])

    saliency = torch.stack([_union(one, images.shape[-2:]) for one in boxes])[:, None]
    wide = torch.cat([images, torch.stack(heat)[:, None], saliency], 1)
    taught, teacher_levels, grouped = _teach(model.teacher, wide, saliency)
    found["teacher"] = F.cross_entropy(taught, label)
    mean = torch.stack([_grouping(one, groups) for one, groups in grouped]).mean()
    found["grouping"] = method.grouping_weight * 0.5 * mean**2

    hints = []
    for name in method.hint_levels:
        number = ("res3", "res4", "res5").index(name)
        guided = task.losses["hint"][name].regressor(levels[number])
        hints.append(0.5 * F.mse_loss(guided, teacher_levels[number].detach()))
    t = method.temperature
    soft = -(t**2) * ((taught.detach() / t).softmax(1) * F.log_softmax(scores / t, 1)).sum(1).mean()
    found["distill"] = task.ramp * (method.hint_weight * torch.stack(hints).mean() + soft)

    fused = model.fusion.linear(torch.cat([scores, taught], 1).detach())
    found["fusion"] = F.cross_entropy(fused, label)
    own = sum(found[name] for name in ("pred", "con", "rank", "overlap", "area", "distill"))
    return {**found, "loss": own + found["teacher"] + found["grouping"] + found["fusion"]}


def _levels(backbone, images: Tensor, names: list[str]) -> list[Tensor]:
    found = {}
    for name, layer in backbone.named_children():
        images = found[name] = layer(images)
    return [found[name] for name in names]


def _heat(levels: list[Tensor], size) -> list[Tensor]:
    maps = []
    for sample in range(len(levels[0])):
        total = torch.zeros(size)
        for level in levels:
            a = level[sample].detach().sum(0)
            mask = (a > a.mean()).float()
            mask = torch.ones_like(mask) if mask.sum() == 0 else mask
            total += F.interpolate(mask[None, None], size, mode="nearest-exact")[0, 0]
        maps.append(total / 3)
    return maps


def _foreground(heat: Tensor) -> Tensor:
    for mask in (heat >= 0.5, heat > 0):
        if mask.any():
            return mask
    return torch.ones_like(heat, dtype=torch.bool)


def _regions(network, levels, size, masks) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each image its boxes, their scores, and which of them are valid."""
    levels = [level.detach() for level in levels]
    pyramid, above, maps = network.pyramid, None, []
    for number in (2, 1, 0):
        own = pyramid.lateral[number](levels[number])
        above = own if above is None else own + F.interpolate(above, own.shape[-2:], mode="nearest")
        maps.insert(0, pyramid.output[number](above))
    scores, changes, anchors = [], [], []
    scale = math.sqrt(size[0] * size[1]) / 448
    for one, base in zip(maps, (48, 96, 192), strict=True):
        score, change = network.score(one), network.change(one)
        height, width = one.shape[-2:]
        for y in range(height):
            for x in range(width):
                for anchor in range(9):
                    scores.append(score[:, anchor, y, x])
                    changes.append(change[:, 4 * anchor : 4 * anchor + 4, y, x])
                    side, ratio = base * 2 ** (anchor // 3 / 3) * scale, (2 / 3, 1, 3 / 2)[anchor % 3]
                    centre = ((x + 0.5) * size[1] / width, (y + 0.5) * size[0] / height)
                    anchors.append([*centre, side * math.sqrt(ratio), side / math.sqrt(ratio)])
    scores, changes, anchors = torch.stack(scores, 1), torch.stack(changes, 1), torch.tensor(anchors)
    found = []
    for sample, mask in enumerate(masks):
        boxes = _decode(changes[sample], anchors, size)
        inside = mask[anchors[:, 1].long(), anchors[:, 0].long()]
        places = inside.nonzero()[:, 0]
        kept = places[
            torchvision.ops.nms(boxes[places].detach(), scores[sample, places].detach(), network.iou_threshold)
        ]
        rest = [place for place in scores[sample].argsort(descending=True).tolist() if place not in set(kept.tolist())]
        rest.sort(key=lambda place: not inside[place])  # suppressed ones first
        valid = torch.arange(network.regions) < len(kept)
        index = torch.cat([kept, torch.tensor(rest, dtype=torch.int64)])[: network.regions]
        found.append((boxes[index], scores[sample, index], valid))
    return found


def _decode(changes: Tensor, anchors: Tensor, size) -> Tensor:
    x, y = anchors[:, 0] + changes[:, 0] * anchors[:, 2], anchors[:, 1] + changes[:, 1] * anchors[:, 3]
    w = anchors[:, 2] * torch.exp(changes[:, 2].clamp(max=math.log(62.5)))
    h = anchors[:, 3] * torch.exp(changes[:, 3].clamp(max=math.log(62.5)))
    boxes = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1)
    boxes = torchvision.ops.clip_boxes_to_image(boxes, tuple(size))
    assert (boxes[:, 2:] - boxes[:, :2]).min() >= 1, "no box here is thinner than a pixel"
    return boxes


def _box_mask(box: Tensor, size) -> Tensor:
    y, x = torch.arange(size[0])[:, None] + 0.5, torch.arange(size[1]) + 0.5
    return (x >= box[0]) & (x < box[2]) & (y >= box[1]) & (y < box[3])


def _union(boxes: Tensor, size) -> Tensor:
    return torch.stack([_box_mask(box, size) for box in boxes.detach()]).any(0).float()


@torch.no_grad()
def _compose(task, images: Tensor, boxes, seeds: Tensor) -> Tensor:
    size, options = images.shape[-2:], task.method
    blurred = blur(images, options.blur_sigma * math.sqrt(size[0] * size[1]) / 448)
    noise = options.noise_std * normals(seeds, len(images), *size, images.dtype)
    found = []
    for sample, image in enumerate(images):
        masks = [_box_mask(box, size) for box in boxes[sample]]
        for own in masks:
            part = blurred[sample].clone()
            for other in masks:
                part[:, other] = image[:, other] + noise[sample][:, other]
            part[:, own] = image[:, own]
            found.append(part)
    return torch.stack(found).view(len(images), -1, *images.shape[1:])


def _rank(scores, part_scores: Tensor, valid, label: Tensor, margin: float) -> Tensor:
    total = torch.zeros(())
    for sample, own in enumerate(scores):
        targets = [F.cross_entropy(one[None], label[sample : sample + 1]).detach() for one in part_scores[sample]]
        for i in range(len(own)):
            for j in range(len(own)):
                if valid[sample][i] and valid[sample][j] and targets[j] > targets[i]:
                    total = total + torch.clamp(margin - own[i] + own[j], min=0)
    return total / len(scores)


def _box_losses(boxes, valid, masks, method, size) -> dict[str, Tensor]:
    overlap, area = torch.zeros(()), torch.zeros(())
    smallest = method.min_area * size[0] * size[1] / 448**2
    for own, mask, ok in zip(boxes, masks, valid, strict=True):
        own, target = own[ok], max(float(mask.sum()) / method.parts, smallest)
        areas = (own[:, 2] - own[:, 0]) * (own[:, 3] - own[:, 1])
        if len(own):
            area = area + (areas / target - 1).abs().mean()
        pairs = []
        for i in range(len(own)):
            for j in range(i + 1, len(own)):
                width = torch.minimum(own[i, 2], own[j, 2]) - torch.maximum(own[i, 0], own[j, 0])
                height = torch.minimum(own[i, 3], own[j, 3]) - torch.maximum(own[i, 1], own[j, 1])
                pairs.append(method.iou_weight * width.clamp(min=0) * height.clamp(min=0) / (areas[i] + areas[j]))
        if pairs:
            overlap = overlap + torch.stack(pairs).mean()
    return {"overlap": overlap / len(boxes), "area": area / len(boxes)}


def _teach(teacher, images: Tensor, saliency: Tensor):
    features, found, grouped = images, {}, []
    for name, layer in teacher.backbone.named_children():
        for block in layer if name.startswith("layer") else [layer]:
            if not hasattr(block, "bilinear"):
                features = block(features)
                continue
            own = _bilinear_block(block, features, saliency, grouped)
            own = F.relu(block.bn2(block.conv2(own)))
            shortcut = features if block.downsample is None else block.downsample(features)
            features = F.relu(block.bn3(block.conv3(own)) + shortcut)
        found[name] = features
    last = _bilinear_block(teacher.last, features, saliency, grouped)
    return teacher.classifier(last.mean((2, 3))), [found[name] for name in teacher.names], grouped


def _bilinear_block(block, features: Tensor, saliency: Tensor, grouped: list) -> Tensor:
    share = F.adaptive_avg_pool2d(saliency, features.shape[-2:])
    own = F.relu(block.bn1(block.conv1(features * share)))
    grouped.append((own, block.groups))
    samples, channels, height, width = own.shape
    per_group = channels // block.groups
    a = (own + block.bilinear.position[:, None, None]).view(samples, block.groups, per_group, height, width)
    products = torch.tanh((a[:, :, :, None] * a[:, :, None]).sum(1) / 32).flatten(1, 2)
    rows = products.permute(0, 2, 3, 1).reshape(-1, 1, per_group**2)
    resized = F.interpolate(rows, channels, mode="linear", align_corners=True)
    return own + block.bilinear.norm(resized.view(samples, height, width, channels).permute(0, 3, 1, 2))


def _grouping(features: Tensor, groups: int) -> Tensor:
    channels = features.shape[1]
    z = features.flatten(2) + 1e-3
    z = z / (z.square().sum(2, keepdim=True) + 1e-10).sqrt()
    correlation = torch.stack([one @ one.T for one in z]).mean(0)
    target = torch.block_diag(*[torch.ones(channels // groups, channels // groups)] * groups)
    return 1e-3 / (channels / 512) ** 2 * (correlation - target).square().sum()
