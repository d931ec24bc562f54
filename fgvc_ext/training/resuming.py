"""What is checked, and put back, before a run goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fgvc_ext.training.config import ConfigMismatch, differences
from fgvc_ext.training.run_folder import RunFolder
from fgvc_ext.training.state import Checkpoints, load_checkpoint
from fgvc_ext.training.task import Stage


def check_inputs(stage: Stage, run: RunFolder) -> None:
    """Raise ConfigMismatch, with both hashes, where a stage began with other files than it is given now."""
    entry = run.stage(stage.name)
    if entry is not None and (lines := differences(entry.get("inputs", {}), stage.inputs)):
        raise ConfigMismatch(f"stage {stage.name} builds on other files:\n  " + "\n  ".join(lines))


def reopen_from(file: Path, stages: Sequence[Stage], run: RunFolder) -> None:
    """Make the stage that a checkpoint belongs to, and all after it, not done."""
    names = [stage.name for stage in stages]
    owner = next((number for number, name in enumerate(names) if file.name.startswith(f"{name}-e")), None)
    if owner is None:
        raise ValueError(f"resume: {file} is not a checkpoint of the stages {', '.join(names)}")
    run.refuse_other(load_checkpoint(file)["identity"], f"checkpoint {file}")
    run.begin()
    for name in names[owner:]:
        Checkpoints(run.checkpoints, name).discard_newer(file if name == names[owner] else None)
    run.update(stages=[entry for entry in run.data["stages"] if entry["name"] in names[:owner]])
