"""ELoPE's network, its localisers, its crops, and what they cost."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fgvc_ext import reference
from fgvc_ext.models import ELoPE, LocalisationModule, MeanFeatureMap, build_backbone, crop_and_resize, load, save
from fgvc_ext.models.cost import cost
from fgvc_ext.models.heads import pooled_map
from fgvc_ext.models.localiser import paste_back, resized_to
from fgvc_ext.models.norm import EmbeddingNorm


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(3, 3, 72, 96, generator=torch.Generator().manual_seed(0))


def _backbone(name: str = "resnet10_narrow"):
    torch.manual_seed(0)
    return build_backbone(name)


def _model(*, localised: bool = False, **options) -> ELoPE:
    backbone = _backbone()
    localiser = LocalisationModule(backbone, threshold=0.85, min_size=2) if localised else None
    options = {"embedding_dim": 16, "size": 48 if localised else None, **options}
    return ELoPE(backbone, 5, localiser=localiser, **options).eval()


# ---------------------------------------------------------------- crops


def _by_grid_sample(images, boxes, size):
    steps, grids = (torch.arange(size) + 0.5) / size, []
    for x1, y1, x2, y2 in boxes:
        x = (x1 + steps * (x2 - x1)) / images.shape[-1] * 2 - 1
        y = (y1 + steps * (y2 - y1)) / images.shape[-2] * 2 - 1
        grids.append(torch.stack(torch.broadcast_tensors(x[None, :], y[:, None]), -1))
    return F.grid_sample(images, torch.stack(grids), padding_mode="border", align_corners=False)


@pytest.mark.parametrize("side", [1, 17, 100, 448])
def test_the_whole_image_at_its_own_size_is_the_image(side):
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    found = crop_and_resize(image, torch.tensor([[0.0, 0.0, side, side]]), side)
    torch.testing.assert_close(found, image, atol=1e-5, rtol=0)


def test_every_image_is_cut_to_its_own_box(images):
    boxes = torch.tensor([[3.3, 5.0, 60.0, 40.2], [-10.0, 20.0, 140.0, 77.7], [40.0, 1.0, 41.0, 2.0]])
    for size in (1, 20, 64):
        torch.testing.assert_close(
            crop_and_resize(images, boxes, size), _by_grid_sample(images, boxes, size), atol=1e-4, rtol=0
        )


def test_whole_pixels_are_copied_and_the_edge_goes_on(images):
    cut = crop_and_resize(images[:1], torch.tensor([[8.0, 16.0, 24.0, 32.0]]), 16)
    assert torch.equal(cut, images[:1, :, 16:32, 8:24])
    beyond = crop_and_resize(images[:1], torch.tensor([[-8.0, 0.0, 0.0, 8.0]]), 8)
    assert torch.equal(beyond, images[:1, :, :8, :1].expand(-1, -1, -1, 8))


def test_half_precision_comes_back_in_its_dtype(images):
    boxes = torch.tensor([[3.0, 5.0, 60.0, 40.0]] * 3)
    found = crop_and_resize(images.bfloat16(), boxes, 20)
    assert torch.equal(found, crop_and_resize(images.bfloat16().float(), boxes, 20).bfloat16())


@pytest.mark.parametrize("boxes", [torch.zeros(2, 4), torch.zeros(3, 5), torch.zeros(4)])
def test_boxes_of_another_shape_are_refused(images, boxes):
    with pytest.raises(ValueError, match=r"crop_and_resize: expected images \[N,3,H,W\], boxes \[N,4\]"):
        crop_and_resize(images, boxes, 8)


def test_a_map_is_pasted_back_where_its_crop_was():
    maps = torch.zeros(1, 1, 6, 6)
    maps[0, 0, 2, 4], maps[0, 0, 0, 0] = 5.0, -1.0
    box = torch.tensor([[32.0, 0.0, 64.0, 32.0]])  # the upper right quarter
    whole = paste_back(maps, box, (64, 64))
    assert whole.shape == (1, 1, 12, 12)
    torch.testing.assert_close(whole[:, :, :6, 6:], maps)
    assert (whole[:, :, 6:] == -1).all()
    assert (whole[:, :, :, :6] == -1).all()
    both = paste_back(torch.cat([maps, maps + 9]), box.expand(2, 4), (64, 64))
    torch.testing.assert_close(both[1:], whole + 9, msg="each has its own lowest value")


# ---------------------------------------------------------------- the classifier


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "pooled"),
    [
        ({"pooling": "gap"}, lambda f: f.mean((2, 3))),
        ({"pooling": "gmp", "k": 3}, lambda f: f.amax((2, 3))),
        ({"k": 3}, lambda f: f.flatten(2).sort(2, descending=True).values[..., :3].mean(2)),
    ],
)
def test_scores_are_pooled_embedded_and_classified(options, pooled, images):
    model = _model(**options)
    linear, norm, activation = model.embedding
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    hidden = linear(pooled(model.backbone(images)))
    hidden = (hidden - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
    expected = torch.where(hidden > 0, hidden, 0.25 * hidden)
    torch.testing.assert_close(model.embed(images), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(images), model.classifier(expected), rtol=1e-4, atol=1e-5)
    assert (linear.out_features, activation.weight.item()) == (16, 0.25)


@torch.no_grad()
def test_weights_of_the_values_start_at_one_and_count(images):
    plain, weighted = _model(), _model(weighted=True)
    weighted.load_state_dict({**weighted.state_dict(), **plain.state_dict()})
    assert torch.equal(weighted(images), plain(images))
    weighted.pooling.weight.copy_(torch.tensor([4.0, 0, 0, 0]))
    top = _model(pooling="gmp")
    top.load_state_dict(plain.state_dict())
    torch.testing.assert_close(weighted(images), top(images))
    groups = weighted.parameter_groups()
    assert groups["pooling"] == [weighted.pooling.weight]
    assert list(groups)[-3:] == ["pooling", "embedding", "classifier"]
    assert sum(len(group) for group in groups.values()) == len(list(weighted.parameters()))


def test_k_beyond_the_map_names_both_numbers(images):
    with pytest.raises(ValueError, match=r"k must be at most H\*W = 5\*6 = 30, got 31"):
        _model(k=31)(images)


@torch.no_grad()
def test_a_share_of_one_image_is_normalised_with_the_running_statistics():
    norm, one = EmbeddingNorm(4), torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    norm.running_mean.fill_(1.0)
    before = norm.running_var.clone()
    torch.testing.assert_close(norm.train()(one), norm.eval()(one))
    assert torch.equal(norm.running_var, before)
    assert norm.train()(one[:0]).shape == (0, 4)
    torch.testing.assert_close(norm.train()(torch.cat([one, -one])).mean(0), torch.zeros(4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "mean"}, "pooling: expected gap, gmp or gkmp, got 'mean'"),
        ({"pooling": "gap", "weighted": True}, "weighted: expected pooling gkmp, which alone has weights, got gap"),
        ({"embedding_dim": 0}, "at least one class and one embedding dimension, got 5 and 0"),
        ({"localised": True, "size": None}, "size: expected a number of pixels with a localiser, got None"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        _model(**options)


@torch.no_grad()
def test_the_output_of_frozen_layers_is_not_cut(images):
    """A backbone goes on from it; see `Backbone.forward`."""
    model = _model(size=48)
    model.backbone = nn.Identity()
    features = torch.rand(2, 256, 5, 5)
    assert torch.equal(model.embed(features), model.embedding(model.pooling(features)))
    with pytest.raises(
        ValueError, match=r"expected images \[N,3,H,W\], of which the localiser cuts, got \[2, 256, 5, 5\]"
    ):
        _model(localised=True)(features)


# ---------------------------------------------------------------- localisers


def test_the_module_is_a_resnets_beginning_at_64_pixels(images):
    backbone = _backbone("resnet50")
    module = LocalisationModule(backbone).eval()
    assert sum(p.numel() for p in module.parameters()) == 227_649  # "about 220,000"
    assert torch.equal(module.stem[0].weight, backbone.conv1.weight)
    assert torch.equal(module.stem[4][2].conv3.weight, backbone.layer1[2].conv3.weight)
    with torch.no_grad():
        module.stem[0].weight.zero_()
        assert backbone.conv1.weight.any(), "a copy"
        for size in ((64, 64), (72, 96), (300, 200)):
            assert module(torch.randn(2, 3, *size)).shape == (2, 14, 14)
        small = resized_to(images, 64)
        assert torch.equal(module(images), module(small))
    expected = F.interpolate(images, (64, 64), mode="bilinear", antialias=True)
    torch.testing.assert_close(small, expected)


@pytest.mark.parametrize("name", ["densenet121", "vgg11"])
def test_a_backbone_of_another_kind_gets_a_stem_of_its_own(name):
    module = LocalisationModule(_backbone(name))
    assert sum(p.numel() for p in module.parameters()) == 227_649
    assert module.settings()["stem"]["name"] == "resnet50"


def test_frozen_layers_of_the_classifier_learn_in_the_module():
    backbone = _backbone().requires_grad_(False)
    assert all(p.requires_grad for p in LocalisationModule(backbone).parameters())


@torch.no_grad()
def test_boxes_are_those_of_the_heat_maps(images):
    module = LocalisationModule(_backbone(), threshold=0.6, min_size=3).eval()
    expected = reference.heatmap_to_boxes(module(images), threshold=0.6, image_size=(72, 96), min_size=3)
    assert torch.equal(module.boxes(images), expected)
    module.min_size = 73.0  # more than the images have
    assert torch.equal(module.boxes(images), torch.tensor([[0.0, 0.0, 96.0, 72.0]] * 3))
    mean = MeanFeatureMap(_backbone(), 32, threshold=0.6).eval()
    expected = mean.backbone(F.interpolate(images, (32, 32), mode="bilinear", antialias=True)).mean(1)
    torch.testing.assert_close(mean(images), expected)


# ---------------------------------------------------------------- one pass


@torch.no_grad()
def test_one_pass_is_localiser_crop_and_classifier_by_hand(images):
    model = _model(localised=True)
    plain = ELoPE(model.backbone, 5, embedding_dim=16).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("localiser.")})
    boxes = model.localiser.boxes(images)
    assert (boxes[:, 2:] - boxes[:, :2] < torch.tensor([96.0, 72.0])).any(), "some box is smaller than its image"
    expected = plain(_by_grid_sample(images, boxes, 48))
    torch.testing.assert_close(model(images), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(model.boxes(images), boxes)
    assert plain.boxes(images) is None
    assert not any(p.requires_grad for p in model.localiser.parameters())
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    torch.testing.assert_close(model(images), plain(images), msg="in training the images are crops already")


@torch.no_grad()
def test_without_a_localiser_images_are_brought_to_the_size_it_was_trained_for(images):
    plain, sized = _model(), _model(size=48)
    sized.load_state_dict(plain.state_dict())
    torch.testing.assert_close(sized(images), plain(resized_to(images, 48)))
    assert torch.equal(sized(images[..., :48, :48]), plain(images[..., :48, :48]))


@pytest.mark.parametrize("kind", ["plain", "module", "mean"])
def test_a_file_gives_scores_and_the_box_in_one_call(kind, tmp_path):
    model = _model(localised=kind == "module", weighted=True)
    if kind == "mean":
        localiser = MeanFeatureMap(_backbone(), 48, threshold=0.5, min_size=1)
        model = ELoPE(_backbone(), 5, size=48, localiser=localiser).eval()
    model.classes = list("abcde")
    json.dumps(model.settings())
    save(model, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors")
    picture = torch.randint(0, 256, (3, 75, 131), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    other = picture[:, :60, :60]
    (found, second), (expected, _) = again.predict([picture, other]), model.predict([picture, other])
    assert (found, len(found.names), len(second.names)) == (expected, 5, 5)
    if kind == "plain":
        assert found.box is None
        return
    with torch.no_grad():  # in its own resolution
        pixels = again.preprocessing.normalise(picture)[None]
        torch.testing.assert_close(torch.tensor([found.box]), again.boxes(pixels))
        best = again(pixels).softmax(1).sort(descending=True)
    assert found.names == [model.classes[i] for i in best.indices[0]]
    assert found.probabilities == pytest.approx(best.values[0].tolist(), abs=1e-6)
    assert again.localiser.settings() == model.localiser.settings()
    again.train().predict([other])
    assert again.training, "a prediction leaves the mode as it was"


@torch.no_grad()
def test_one_pass_is_exported(images):
    model = _model(localised=True)
    batch, height, width = (
        torch.export.Dim("batch", min=2),
        torch.export.Dim("height", min=70, max=8192),
        torch.export.Dim("width", min=70, max=8192),
    )
    program = torch.export.export(model, (images,), dynamic_shapes=({0: batch, 2: height, 3: width},))
    module = program.module()
    torch.testing.assert_close(module(images), model(images))
    other = torch.randn(2, 3, 90, 80, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(module(other), model(other))


# ---------------------------------------------------------------- explanations


@torch.no_grad()
@pytest.mark.parametrize("options", [{"pooling": "gap"}, {"pooling": "gmp"}, {"k": 3}, {"weighted": True}])
def test_the_pooled_map_is_where_the_pooled_features_come_from(options, images):
    model = _model(**options)
    if options.get("weighted"):
        model.pooling.weight.copy_(torch.tensor([2.0, 0.5, 0.0, 1.0]))
    found, features = model.explain(images), model.backbone(images)
    pooled = found.maps["pooled"]
    assert pooled.shape == (3, 1, *features.shape[2:])
    torch.testing.assert_close(pooled.sum((1, 2, 3)), model.pooling(features).mean(1))
    torch.testing.assert_close(found.maps["mean feature map"], features.mean(1, keepdim=True))
    assert found.boxes == {}
    torch.testing.assert_close(found.scores, model(images))
    if options.get("pooling") == "gmp":
        position = features[0, 7].flatten().argmax()
        assert pooled[0].flatten()[position] > 0


@torch.no_grad()
@pytest.mark.parametrize("options", [{"pooling": "gap"}, {"k": 3}])
def test_of_no_image_there_is_no_pooled_map(options):
    assert pooled_map(_model(**options).pooling, torch.zeros(0, 8, 3, 2)).shape == (0, 1, 3, 2)


@torch.no_grad()
def test_maps_of_a_crop_are_shown_in_the_image(images):
    model = _model(localised=True)
    model.localiser.threshold = 0.5  # boxes in which more than one value of a map lies
    found = model.explain(images)
    boxes = found.boxes["looked at"][:, 0]
    assert torch.equal(boxes, model.boxes(images))
    torch.testing.assert_close(found.scores, model(images))
    pooled = found.maps["pooled"]
    assert pooled.shape == (3, 1, 6, 6)  # 48 pixels are 3 x 3 positions
    cut = model.backbone(crop_and_resize(images, boxes, 48)).mean(1, keepdim=True)
    torch.testing.assert_close(found.maps["mean feature map"], paste_back(cut, boxes, (72, 96)))
    assert found.maps["heat map"].shape == (3, 1, 14, 14)
    assert (found.maps["mean feature map"].amax((1, 2, 3)) > found.maps["mean feature map"].amin((1, 2, 3))).all()


# ---------------------------------------------------------------- cost


def test_table_3_follows_from_both_conventions():
    backbone = _backbone("resnet50")
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 200)]
    plain = cost(nn.Sequential(backbone, *head), 448)
    ours = cost(ELoPE(backbone, 200, size=448, localiser=LocalisationModule(backbone), weighted=True), 448)
    assert [f"{c.with_elementwise:.3e}" for c in (plain, ours)] == ["1.648e+10", "1.654e+10"]
    assert [f"{c.multiply_adds:.3e}" for c in (plain, ours)] == ["1.635e+10", "1.641e+10"]
    assert [round(c.parameters / 1e6) for c in (plain, ours)] == [24, 25]


def test_costs_are_counted_by_hand():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 30, 7)
    )
    found = cost(network.train(), 5, 6)
    assert network.training
    assert found.multiply_adds == 30 * 4 * 27 + 120 * 7
    assert found.with_elementwise == found.multiply_adds + 3 * 120
    assert found.parameters == 4 * 27 + 4 + 8 + 840 + 7
