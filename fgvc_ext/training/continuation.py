"""With which settings a stage that was begun may go on: the same, those of a newer version, other epochs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fgvc_ext.training.config import differences, digest

EPOCHS, SCHEDULE = "optim.epochs", "optim.schedule"
ENDLESS = ("step", "constant")
"""Schedules whose rates do not depend on where the training ends: with these its end can be moved. The others (cosine)
would have trained the past epochs with other rates, so that what came out would be the result of no setting at all."""


def refusals(
    before: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any], trained: int | None
) -> list[str]:
    """Why a stage that was begun as `before` cannot go on as `now`: a line each; none where it can.

    Args:
        before, now: the stage's identities, flat.
        defaults: of the fields of `now`, see `config.defaults`.
        trained: epochs that the stage has behind it; None for what has no epochs of its own, an artefact.
    """
    lines = differences(before, now, defaults)
    if trained is None or [line.partition(":")[0] for line in lines] != [EPOCHS]:
        return lines
    if now.get(SCHEDULE) not in ENDLESS:
        why = f"the rates of {SCHEDULE} {now.get(SCHEDULE)} depend on it (those of {' and '.join(ENDLESS)} do not)"
    elif now[EPOCHS] <= trained:
        why = f"{trained} are trained already"
    else:
        return []
    return [f"{lines[0]}: {why}"]


def is_moved(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether the training is to end at another epoch than it was begun for."""
    return EPOCHS in before and before[EPOCHS] != now.get(EPOCHS)


def stage_hash(identity: Mapping[str, Any]) -> str:
    """The hash by which a stage knows its checkpoints: of all that decided them, not of an end that can be moved."""
    endless = identity.get(SCHEDULE) in ENDLESS
    return digest({name: value for name, value in identity.items() if not (endless and name == EPOCHS)})
