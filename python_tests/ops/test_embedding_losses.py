"""Centre loss and Deep Fisher Faces, the other rows of ELoPE's Table 5, against sums written out sample by sample."""

from __future__ import annotations

import pytest
import torch

from fgvc_ext import nn
from fgvc_ext.reference.embedding_losses import centre_loss, deep_fisher_faces_loss

LABELS = torch.tensor([2, 0, 2, 1, 0, 2])


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(6, 3, dtype=torch.float64, generator=generator)
    return embeddings.requires_grad_(), torch.randn(5, 3, dtype=torch.float64, generator=generator)


def _moved(embeddings: torch.Tensor, centres: torch.Tensor, alpha: float) -> dict[int, torch.Tensor]:
    found = {}
    for label in (0, 1, 2):
        rows = [embeddings[n] for n in range(6) if LABELS[n] == label]
        found[label] = centres[label] - alpha * sum(centres[label] - row for row in rows) / (1 + len(rows))
    return found


def test_centre_loss_pulls_to_the_centres_from_before_the_step(batch):
    embeddings, centres = batch
    found = centre_loss(embeddings, LABELS, centres, alpha=0.3)
    expected = sum((embeddings[n] - centres[LABELS[n]]).square().sum() for n in range(6)) / 12
    torch.testing.assert_close(found.within, expected)
    assert found.between == 0
    found.within.backward()
    torch.testing.assert_close(embeddings.grad, (embeddings - centres[LABELS]).detach() / 6)
    moved = _moved(embeddings, centres, 0.3)
    torch.testing.assert_close(found.batch_means, torch.stack([moved[int(label)] for label in LABELS]).detach())


def test_deep_fisher_faces_has_hinges_that_are_not_squared(batch):
    embeddings, centres = batch
    found = deep_fisher_faces_loss(embeddings, LABELS, centres, alpha=0.3, margin=6.0, gamma=2.0)
    moved = _moved(embeddings, centres, 0.3)
    within = sum((embeddings[n] - moved[int(LABELS[n])]).square().sum() for n in range(6)) / 12
    hinges = [(6.0 - (moved[a] - moved[b]).square().sum()).clamp(min=0) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert sum(hinge > 0 for hinge in hinges) >= 1
    torch.testing.assert_close(found.within, within)
    torch.testing.assert_close(found.between, 2.0 / 4 * sum(hinges) / 3)
    expected = torch.autograd.grad(within + 0.5 * sum(hinges) / 3, embeddings)[0]
    torch.testing.assert_close(torch.autograd.grad(found.within + found.between, embeddings)[0], expected)


def test_deep_fisher_faces_draws_pairs_where_there_are_more(batch):
    embeddings, centres = batch
    values = set()
    for seed in range(12):
        options = {"alpha": 0.3, "margin": 50.0, "pairs": 1, "seed": torch.tensor(seed)}
        value = float(deep_fisher_faces_loss(embeddings, LABELS, centres, **options).between.detach())
        values.add(round(value, 9))
        assert value == float(deep_fisher_faces_loss(embeddings, LABELS, centres, **options).between.detach())
    moved = _moved(embeddings.detach(), centres, 0.3)
    single = {round(float(4 * (50.0 - (moved[a] - moved[b]).square().sum())), 9) for a, b in ((0, 1), (0, 2), (1, 2))}
    assert values == single


@pytest.mark.parametrize("variant", ["centre", "dff"])
def test_the_module_keeps_their_centres(variant, batch):
    embeddings, _ = batch
    module = nn.ClassMeanLoss(5, 3, alpha=0.3, normalize=False, variant=variant)
    before = module.class_means.clone()
    module(embeddings.float(), LABELS).backward()
    moved = _moved(embeddings.float(), before, 0.3)
    for label in range(5):
        torch.testing.assert_close(module.class_means[label], moved.get(label, before[label]).detach())
    module.eval()(embeddings.float(), LABELS)
    torch.testing.assert_close(module.class_means[0], moved[0].detach())
