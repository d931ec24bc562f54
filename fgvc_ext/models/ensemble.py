"""Several models that answer together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from fgvc_ext.models.model import Explanation, Model, describe, from_description

Average = Literal["probabilities", "logits"]
"""What is averaged over the members: their probabilities, or their scores before the softmax."""
T = TypeVar("T")


def average_scores(scores: Tensor, average: Average) -> Tensor:
    """Scores [M,N,C] of M models → [N,C]: the logarithm of their mean probabilities, or their mean."""
    if average == "logits":
        return scores.mean(0)
    return scores.log_softmax(2).logsumexp(0) - math.log(len(scores))


class Ensemble(Model, method="ensemble"):
    """Models that see the same images and whose answers are averaged. Any `Model` may be a member.

    The weights of member n (from 0) are under `models.<n>.`. Class names and preprocessing are those of the members.

    Args:
        members: at least one, with the same class names and preprocessing.
        average: "probabilities": the scores are the logarithm of the members' mean probabilities, so that their
            softmax is that mean. "logits": they are the members' mean scores.

    Raises:
        ValueError: no members, members that differ in classes or preprocessing, or another `average`.
    """

    def __init__(self, members: Sequence[Model], average: Average = "probabilities") -> None:
        if not members:
            raise ValueError("Ensemble: members: expected at least one model, got none")
        if average not in get_args(Average):
            raise ValueError(f"Ensemble: average: expected one of {', '.join(get_args(Average))}, got {average!r}")
        for name in ("classes", "preprocessing"):
            values = [getattr(member, name) for member in members]
            if differing := [value for value in values if value != values[0]]:
                raise ValueError(f"Ensemble: expected members with the same {name}, got {values[0]} and {differing[0]}")
        super().__init__(members[0].preprocessing)
        self.models = nn.ModuleList(members)
        self.average: Average = average
        self.classes = list(members[0].classes)

    @property
    def members(self) -> list[Model]:
        """The models, in their order."""
        return [member for member in self.models if isinstance(member, Model)]

    def member_scores(self, images: Tensor) -> Tensor:
        """images [N,3,H,W] → every member's scores [M,N,C]."""
        return torch.stack([member(images) for member in self.members])

    def forward(self, images: Tensor) -> Tensor:
        """images [N,3,H,W] → scores [N,C], averaged over the members."""
        return average_scores(self.member_scores(images), self.average)

    def explain(self, images: Tensor) -> Explanation:
        """The scores, and what every member uses: its first map as "member 1" and so on, and its first boxes."""
        found = [member.explain(images) for member in self.members]
        scores = [
            member(images) if one.scores is None else one.scores
            for member, one in zip(self.members, found, strict=True)
        ]
        return Explanation(
            maps=_first_of_each([one.maps for one in found]),
            boxes=_first_of_each([one.boxes for one in found]),
            scores=average_scores(torch.stack(scores), self.average),
        )

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The members' groups; those of the same name are one."""
        groups: dict[str, list[nn.Parameter]] = {}
        for member in self.members:
            for name, parameters in member.parameter_groups().items():
                groups.setdefault(name, []).extend(parameters)
        return groups

    def settings(self) -> dict[str, Any]:
        return {"average": self.average, "members": [describe(member) for member in self.members]}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Ensemble:
        return cls([from_description(member) for member in settings["members"]], settings["average"])


def _first_of_each(found: Sequence[Mapping[str, T]]) -> dict[str, T]:
    return {f"member {n}": next(iter(one.values())) for n, one in enumerate(found, start=1) if one}
