"""Localisers that learn a classifier's maps, the boxes that they find, embeddings and their means."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fgvc_ext.data import BrokenImageError, ImageDataset
from fgvc_ext.data.loading import Samples
from fgvc_ext.models import ELoPE, LocalisationModule, MeanFeatureMap, build_backbone
from fgvc_ext.nn import ClassMeanLoss
from fgvc_ext.training import EngineConfig, Frozen, OptimConfig
from fgvc_ext.training.embedding import EmbeddingClassification, FineTunedPooling, mean_embeddings
from fgvc_ext.training.localisation import HeatMapRegression, find_boxes, localisation_accuracy
from fgvc_ext.training.optimisation import build_optimizer, build_scheduler, last_factor

ENGINE = EngineConfig(device="cpu", workers=0)


class Pictures(ImageDataset):
    """Noise of different sizes; `broken` images cannot be read."""

    def __init__(self, count: int = 4, broken: tuple[int, ...] = ()) -> None:
        labels = torch.tensor([0, 1, 1, 3])[:count]
        super().__init__("pictures", "train", list("abcd"), labels, [str(i) for i in range(count)])
        self.broken = broken

    def load(self, index: int) -> torch.Tensor:
        if index in self.broken:
            raise BrokenImageError(f"cannot decode image {index}: planted")
        generator = torch.Generator().manual_seed(index)
        return torch.randint(0, 256, (3, 60 + 7 * index, 90 - 5 * index), dtype=torch.uint8, generator=generator)

    def content_key(self) -> str:
        return "1"


@pytest.fixture(scope="module")
def localiser() -> LocalisationModule:
    torch.manual_seed(0)
    return LocalisationModule(build_backbone("resnet10_narrow"), threshold=0.85, min_size=2).eval()


@torch.no_grad()
def test_boxes_are_found_in_every_images_own_resolution(localiser):
    data = Pictures()
    found = find_boxes(localiser.train(), data, ENGINE)
    localiser.eval()
    alone = [localiser.boxes(localiser.preprocessing.normalise(data.load(i))[None]) for i in range(4)]
    assert torch.equal(found, torch.cat(alone))
    assert (found[:, 2:] <= torch.tensor([[90, 60], [85, 67], [80, 74], [75, 81]])).all()
    assert len({tuple(box) for box in found.tolist()}) == 4


def test_an_image_that_cannot_be_read_stops_or_has_one_pixel(localiser):
    with pytest.raises(BrokenImageError, match="image 2"):
        find_boxes(localiser, Pictures(broken=(2,)), ENGINE)
    skip = EngineConfig(device="cpu", workers=0, broken_images="skip")
    found = find_boxes(localiser, Pictures(broken=(2,)), skip)
    assert found[2].tolist() == [0, 0, 1, 1]
    assert torch.equal(found[[0, 1, 3]], find_boxes(localiser, Pictures(), ENGINE)[[0, 1, 3]])


def test_half_in_common_is_right():
    true = torch.tensor([[0.0, 0, 10, 10]] * 3)
    found = torch.tensor([[0.0, 0, 10, 5], [0.0, 0, 10, 4.9], [0, 0, 20, 20]])
    table = localisation_accuracy({"module": found, "true": true}, true)
    assert table["module"]["accuracy"] == pytest.approx(1 / 3)
    assert table["module"]["mean_iou"] == pytest.approx((0.5 + 0.49 + 0.25) / 3)
    assert table["true"] == {"accuracy": 1.0, "mean_iou": 1.0}


def test_the_module_learns_the_classifiers_mean_map_and_the_classifier_nothing():
    torch.manual_seed(0)
    backbone = build_backbone("resnet10_narrow")
    task = HeatMapRegression(LocalisationModule(backbone), Frozen(MeanFeatureMap(backbone, 48))).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    batch = {"image": torch.randn(4, 3, 48, 48), "label": torch.zeros(4, dtype=torch.int64)}
    answer = task.step(batch)
    answer["loss"].backward()
    assert all(torch.equal(value, backbone.state_dict()[name]) for name, value in before.items())
    assert all(p.grad is None for p in backbone.parameters())
    assert all(p.grad is not None for p in task.parameters())
    task.eval()
    with torch.no_grad():
        target = backbone.eval()(batch["image"]).mean(1, keepdim=True)
        target = F.interpolate(target, (14, 14), mode="bilinear", align_corners=False)[:, 0]
        difference = (task.model(batch["image"]) - target).abs()
        expected = torch.where(difference < 1, 0.5 * difference**2, difference - 0.5).mean()
        sums = task.eval_step(batch)
    torch.testing.assert_close(sums["smooth_l1"] / 4, expected)
    assert not task.higher_is_better


class _Embedder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(3, 2)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        assert not self.training
        return self.project(images.mean((2, 3)))


def _tiny(image: torch.Tensor) -> torch.Tensor:
    return image[:, :8, :8] / 255


def test_class_means_are_those_of_all_embeddings():
    torch.manual_seed(0)
    model, data = _Embedder().eval(), Pictures()
    with torch.no_grad():
        rows = model.embed(torch.stack([_tiny(data.load(i)) for i in range(4)]))
    model.train()
    engine = EngineConfig(device="cpu", workers=0, eval_batch_size=3)
    found = mean_embeddings(model, Samples(data, _tiny), 4, engine, normalize=False)
    torch.testing.assert_close(found, torch.stack([rows[0], rows[1:3].mean(0), torch.zeros(2), rows[3]]))
    unit = mean_embeddings(model, Samples(data, _tiny), 4, engine)
    torch.testing.assert_close(unit[1], F.normalize(rows[1:3]).mean(0))
    torch.testing.assert_close(unit.norm(dim=1)[[0, 3]], torch.ones(2))


def _embedding_task(kind: type = EmbeddingClassification, **options) -> EmbeddingClassification:
    model = ELoPE(build_backbone("resnet10_narrow"), 3, k=2, weighted=True, embedding_dim=4)
    return kind(model, nn.CrossEntropyLoss(), ClassMeanLoss(3, 4, margin=4.0), weight=1.5, **options)


def test_the_embedding_loss_has_its_weight_and_is_logged_as_a_sum():
    torch.manual_seed(0)
    task, batch = _embedding_task(), {"image": torch.randn(5, 3, 48, 48), "label": torch.tensor([0, 1, 1, 2, 0])}
    answer, part = task.step(batch), task.losses["embedding"]
    assert (part.within > 0, part.between > 0) == (True, True)
    with torch.no_grad():
        entropy = F.cross_entropy(task.model(batch["image"]), batch["label"])
    torch.testing.assert_close(answer["loss"].detach(), entropy + 1.5 * (part.within + part.between))
    for name in ("within", "between"):
        torch.testing.assert_close(answer["logs"][name] / answer["n"], getattr(part, name))


def test_only_the_pooling_weights_have_the_fine_tunings_rate():
    before = OptimConfig(epochs=4, lr=0.5, new_layers_lr=0.8, schedule="step", step_epochs=2, step_factor=0.1)
    task = _embedding_task(FineTunedPooling, before=before)
    old, new, weights = task.param_groups(OptimConfig(lr=0.3, schedule="step", new_layers=()))
    assert [group["lr"] for group in (old, new, weights)] == pytest.approx([0.05, 0.08, 0.3])
    assert [group["constant"] for group in (old, new, weights)] == [True, True, False]
    assert [id(p) for p in weights["params"]] == [id(task.model.pooling.weight)]
    assert len(old["params"]) + len(new["params"]) + 1 == len(list(task.parameters()))


@pytest.mark.parametrize(
    ("schedule", "times"), [("step", None), ("step", 1), ("step", 9), ("cosine", None), ("constant", None)]
)
def test_the_last_factor_is_that_of_the_schedule(schedule, times):
    config = OptimConfig(epochs=5, lr=1.0, schedule=schedule, step_epochs=2, step_times=times)
    optimizer = build_optimizer([{"params": [nn.Parameter(torch.ones(1))]}], config)
    schedule = build_scheduler(optimizer, config, 3)
    for _ in range(12):  # to the beginning of the fifth epoch
        optimizer.step()
        schedule.step()
    assert math.isclose(optimizer.param_groups[0]["lr"], last_factor(config), rel_tol=1e-6)


@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_a_constant_group_keeps_its_rate_and_the_others_theirs(warmup):
    config = OptimConfig(epochs=3, lr=1.0, schedule="step", step_epochs=1, warmup_epochs=warmup)
    plain, mixed = [], []
    for rates, constant in ((plain, False), (mixed, True)):
        groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": 0.5, "constant": constant}]
        groups.append({"params": [nn.Parameter(torch.ones(1))], "lr": 1.0})
        optimizer = build_optimizer(groups, config)
        schedule = build_scheduler(optimizer, config, 2)
        for _ in range(6):
            rates.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            schedule.step()
    assert [rate for rate, _ in mixed] == [0.5] * 6
    assert [rate for _, rate in mixed] == [rate for _, rate in plain]
    assert [rate for rate, _ in plain] != [0.5] * 6
