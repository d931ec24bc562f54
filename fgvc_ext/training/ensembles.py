"""Ensembles of models that stages have trained, and how good they and every beginning of them are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fgvc_ext.data.loading import Batch, Samples
from fgvc_ext.models import Ensemble, load
from fgvc_ext.models.ensemble import Average, average_scores
from fgvc_ext.training.classification import Classification
from fgvc_ext.training.config import EngineConfig
from fgvc_ext.training.evaluation import evaluate_samples
from fgvc_ext.training.features import cached_evaluations
from fgvc_ext.training.stages import Artefact, Result, Results

Epoch = Literal["last", "best_val"]
"""The epoch of a trained model that is used later on: the last, or the best on validation images."""


def weights_of(result: Result, epoch: Epoch) -> Path:
    """The weights file of a stage's result."""
    return result.best if epoch == "best_val" else result.path


def ensemble_artefact(
    name: str,
    members: Sequence[str],
    evaluations: Mapping[str, Samples],
    engine: EngineConfig,
    *,
    average: Average = "probabilities",
    epoch: Epoch = "last",
    cached: bool = False,
    config: Mapping[str, Any],
) -> Artefact:
    """An `Ensemble` of the models that earlier stages have trained, evaluated with every beginning of it.

    Args:
        members: names of the stages, in the order of the ensemble.
        evaluations: samples by name. engine: how they are evaluated.
        average: what its scores are. epoch: of the members.
        cached: evaluate on cached features, where all members look through the same frozen layers.
        config: of the artefact's identity, by group, beside average and epoch.
    """

    def make(earlier: Results) -> Ensemble:
        return Ensemble([load(weights_of(result, epoch)) for result in earlier.values()], average)

    def measures(ensemble: Ensemble) -> dict[str, dict[str, float]]:
        seen = cached_evaluations(name, evaluations, ensemble.members, engine) if cached else evaluations
        return ensemble_measures(ensemble, seen, engine)

    how = {"average": average, "epoch": epoch, **({"evaluate_cached": True} if cached else {})}
    return Artefact(name=name, needs=members, make=make, measures=measures, config={**config, "ensemble": how})


class EnsembleAccuracy(Classification):
    """The evaluation of an ensemble of M members in one pass over the images.

    Beside the measures of any classifier there are, for n = 1 … M, `single_<n>_accuracy`, that of member n alone, and
    `probabilities_<n>_accuracy` and `logits_<n>_accuracy`, those of the first n members together by either average.
    """

    def __init__(self, ensemble: Ensemble) -> None:
        super().__init__(ensemble, nn.CrossEntropyLoss())
        self.ensemble = ensemble

    def eval_step(self, batch: Batch) -> dict[str, Tensor]:
        scores, label = self.ensemble.member_scores(batch["image"]), batch["label"]
        answers = {"single": scores, **{average: prefixes(scores, average) for average in get_args(Average)}}
        correct = {name: (answer.argmax(2) == label).sum(1) for name, answer in answers.items()}
        return {**self.sums(average_scores(scores, self.ensemble.average), label), **correct}

    def measures(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        found = super().measures(sums)
        for kind in ("single", *get_args(Average)):
            for n, correct in enumerate(sums[kind].tolist(), start=1):
                found[f"{kind}_{n}_accuracy"] = correct / float(sums["n"])
        return found


def prefixes(scores: Tensor, average: Average) -> Tensor:
    """Scores [M,N,C] of M members → [M,N,C]: at place n − 1 those of the first n members together."""
    return torch.stack([average_scores(scores[:n], average) for n in range(1, len(scores) + 1)])


def ensemble_measures(
    ensemble: Ensemble, evaluations: Mapping[str, Samples], engine: EngineConfig
) -> dict[str, dict[str, float]]:
    """Evaluation → measures of the ensemble, its members, and its first n members together (`EnsembleAccuracy`)."""
    task = EnsembleAccuracy(ensemble)
    return {name: evaluate_samples(task, samples, engine) for name, samples in evaluations.items()}
