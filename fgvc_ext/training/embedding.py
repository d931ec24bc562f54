"""Classifiers with an embedding layer, whose embeddings have a loss of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from fgvc_ext.data.loading import Batch, Samples, to_device
from fgvc_ext.models.heads import Pooling
from fgvc_ext.nn import ClassMeanLoss
from fgvc_ext.training import distributed
from fgvc_ext.training.classification import Classification
from fgvc_ext.training.config import EngineConfig, OptimConfig, at_least
from fgvc_ext.training.device import choose_device, worker_count
from fgvc_ext.training.evaluation import add_sums
from fgvc_ext.training.optimisation import last_factor
from fgvc_ext.training.sampling import evaluation_loader


@dataclass
class EmbeddingConfig:
    """What lies between feature maps and scores (ELoPE, section 4): pooling, embedding layer, and its loss."""

    pooling: Pooling = "gkmp"
    """Mean, maximum, or mean of the k largest values of a feature map (equation 3)."""
    k: int = at_least(1, 4)
    """K of gkmp."""
    embedding_dim: int = at_least(1, 512)
    """Width of the embedding layer."""
    embedding_loss: Literal["none", "within", "within+between", "centre", "dff"] = "within+between"
    """L_w, L_w + L_b (equations 5–12), or the losses that they are compared with: centre loss, Deep Fisher Faces."""
    loss_weight: float = at_least(0, 2.0)
    """λ: weight of the embedding loss beside cross-entropy."""
    alpha: float = at_least(0, 0.5)
    """Learning rate of the class means."""
    margin: float = at_least(0, 0.75)
    """m: squared distance that two class means should have."""
    gamma: float = at_least(0, 16.0)
    """Weight of the between-class loss."""
    variant: Literal["paper", "official"] = "paper"
    """official: the class-mean loss of the authors' public code."""

    @property
    def normalize(self) -> bool:
        """Whether the loss is of embeddings of length one, as the paper's own are."""
        return self.embedding_loss.startswith("within")

    def head(self) -> dict[str, Any]:
        """The arguments of `models.ELoPE`."""
        return {"pooling": self.pooling, "k": self.k, "embedding_dim": self.embedding_dim}

    def losses(self, classes: int, label_smoothing: float) -> dict[str, Any]:
        """The arguments of `EmbeddingClassification`: cross-entropy, and the embedding loss of a row of Table 5."""
        entropy = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        return {"loss": entropy, "embedding_loss": self.embedding(classes), "weight": self.loss_weight}

    def embedding(self, classes: int) -> ClassMeanLoss | None:
        if self.embedding_loss == "none":
            return None
        return ClassMeanLoss(
            classes,
            self.embedding_dim,
            alpha=self.alpha,
            margin=self.margin,
            gamma=0.0 if self.embedding_loss == "within" else self.gamma,
            normalize=self.normalize,
            variant=self.variant if self.normalize else self.embedding_loss,
        )


class Embedding(Protocol):
    """A classifier of embeddings, such as `models.ELoPE`."""

    classifier: nn.Module

    def embed(self, images: Tensor) -> Tensor:
        """images [N,3,H,W] → embeddings [N,E]."""


class EmbeddingClassification(Classification):
    """L = L_CE + λ · L_e (ELoPE, eq. 1 and 5).

    Args:
        model: `embed(images) -> [N,E]`, `classifier(embeddings) -> scores [N,C]`, and `parameter_groups()`.
        loss: of scores [N,C] and labels [N].
        embedding_loss: `nn.ClassMeanLoss`, whose parts "within" and "between" are then logged; None: L_CE alone.
        weight: λ; the paper's is 2.
    """

    def __init__(
        self, model: nn.Module, loss: nn.Module, embedding_loss: nn.Module | None, *, weight: float = 2.0
    ) -> None:
        super().__init__(model, loss)
        if embedding_loss is not None:
            self.losses["embedding"] = embedding_loss
        self.weight = weight

    @property
    def evaluates_images(self) -> bool:
        """See `Task`: a localiser cuts images in evaluation, a training is given what was cut."""
        return getattr(self.model, "localiser", None) is not None

    def step(self, batch: Batch) -> dict[str, Any]:
        labels, model = batch["label"], self.model
        embeddings: Tensor = model.embed(batch["image"])  # type: ignore[operator]
        answer = self.answer(model.classifier(embeddings), labels)  # type: ignore[operator]
        if "embedding" in self.losses:
            add_embedding_loss(answer, self.losses["embedding"], self.weight, embeddings, labels, self.batch_sizes)
        return answer


def add_embedding_loss(
    answer: dict[str, Any],
    loss: Any,
    weight: float,
    embeddings: Tensor,
    labels: Tensor,
    batch_sizes: Sequence[int],
) -> None:
    """Add λ · L_e, and its parts to be logged, to what a training step returns.

    Args:
        loss: `nn.ClassMeanLoss`. weight: λ. batch_sizes: see `Task`.
    """
    shared = loss(embeddings, labels, batch_sizes=batch_sizes or None)
    answer["loss"] = answer["loss"] + weight * shared
    # Of the global batch, so every process reports the same mean.
    answer["logs"] |= {"within": loss.within * len(labels), "between": loss.between * len(labels)}


class FineTunedPooling(EmbeddingClassification):
    """The fine-tuning of pooling weights: they have the stage's rate and schedule, everything else goes on as before.

    Args:
        model: its `pooling.weight` are the weights.
        before: how the model was trained before, whose last rates the rest of it keeps.
    """

    def __init__(self, *arguments: Any, before: OptimConfig, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.before = before

    def param_groups(self, config: OptimConfig) -> list[dict[str, Any]]:
        weight: Any = self.model.pooling.weight  # type: ignore[union-attr]
        groups, factor = super().param_groups(self.before), last_factor(self.before)
        rest = [[parameter for parameter in group["params"] if parameter is not weight] for group in groups]
        steady = [
            {"params": parameters, "lr": group["lr"] * factor, "constant": True}
            for parameters, group in zip(rest, groups, strict=True)
        ]
        return [*steady, {"params": [weight], "lr": config.lr, "constant": False}]


def mean_embeddings(
    model: Embedding, samples: Samples, classes: int, engine: EngineConfig, *, normalize: bool = True
) -> Tensor:
    """The mean of each class's embeddings over all samples, in evaluation: float32 [C,E] on the CPU.

    A class without samples has zeros. Every process embeds its share, and all get the whole.

    Args:
        model: a module whose `embed` takes the samples' images.
        normalize: bring every embedding to length one first, as the class-mean loss does.
    """
    device, sums = choose_device(engine.device), dict[str, Tensor]()
    embed = model.to(device).eval().embed  # type: ignore[attr-defined]
    rows = distributed.own_rows(len(samples))
    loader = evaluation_loader(samples, rows, engine.eval_batch_size, workers=worker_count(engine))
    try:
        with torch.no_grad():
            for batch in loader:
                if len(batch["label"]):
                    found = embed(to_device(batch, device, normalise=samples.normalise)["image"]).cpu().double()
                    found = nn.functional.normalize(found) if normalize else found
                    total = found.new_zeros(classes, found.shape[1]).index_add_(0, batch["label"], found)
                    add_sums(sums, {"total": total, "count": torch.bincount(batch["label"], minlength=classes)})
    finally:
        loader.close()
    sums = distributed.reduce_sums(sums)
    return (sums["total"] / sums["count"].clamp(min=1)[:, None]).float()
