"""Configurations as nested dataclasses: the groups that drivers share, and their way to JSON and back."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from fgvc_ext.atomic_files import write_atomically
from fgvc_ext.data.pipeline import DataConfig
from fgvc_ext.models.config import ModelConfig

T = TypeVar("T")
Precision = Literal["auto", "fp32", "bf16", "fp16"]


def at_least(limit: float, default: Any) -> Any:
    """A field whose value `check_limits` holds against a lower limit."""
    return field(default=default, metadata={"at_least": limit})


@dataclass
class OptimConfig:
    """The optimiser and its schedule. Epochs count passes over the training images; batch sizes are global."""

    epochs: int = at_least(1, 150)
    batch_size: int = at_least(1, 32)
    """Images of one optimiser step, over all processes and accumulated parts."""
    accumulate: int = at_least(1, 1)
    """Parts into which a batch is cut to save memory; their gradients are summed before the step."""
    lr: float = at_least(0, 0.001)
    """Learning rate of the backbone."""
    new_layers_lr: float | None = at_least(0, None)
    """Learning rate of the layers named in new_layers; None: the same as lr."""
    new_layers: tuple[str, ...] = ("classifier",)
    """Groups of layers that start at random: classifier, or a group of the backbone such as layer4."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = at_least(0, 0.9)
    """sgd: weight of the steps before."""
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    """adamw: decay of the means of the gradient and of its square."""
    weight_decay: float = at_least(0, 1e-4)
    schedule: Literal["step", "cosine", "constant"] = "step"
    step_epochs: int = at_least(1, 50)
    """schedule=step: epochs between two reductions."""
    step_factor: float = at_least(0, 0.1)
    """schedule=step: factor of a reduction."""
    step_times: int | None = at_least(1, None)
    """schedule=step: reductions at most; None: as many as the epochs have room for."""
    warmup_epochs: float = at_least(0, 0.0)
    """Epochs in which the rate rises linearly to its full value."""
    clip_grad_norm: float | None = at_least(0, None)
    """Largest norm of the gradient, to which a longer one is scaled; None: as it is."""
    ema_decay: float | None = None
    """Decay of an exponential moving average of the weights, which is then evaluated and saved; None: off."""
    label_smoothing: float = at_least(0, 0.0)
    """Share of the target that cross-entropy spreads over all classes."""
    balanced: bool = False
    """Draw the images of an epoch with replacement, every class with the same probability, however large it is."""


@dataclass
class EngineConfig:
    """How the machine is used."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, …; auto takes a GPU where there is one."""
    precision: Precision = "auto"
    """auto: bf16 on a GPU that has it, else fp32. A run keeps what it began with."""
    channels_last: bool = True
    """Memory layout of images and feature maps; False: contiguous."""
    compile: bool = False
    """torch.compile the training step."""
    deterministic: bool = False
    """Only algorithms that give the same bits every time, also on a GPU; some are slower."""
    tf32: bool = True
    """On a GPU: TensorFloat-32 for what is computed in fp32."""
    cudnn_benchmark: bool = True
    """On a GPU: let cuDNN try its algorithms and take the fastest; off with deterministic."""
    sync_batch_norm: bool = False
    """With several GPUs: BatchNorm of the global batch; off: each process' BatchNorm sees its share."""
    workers: int = at_least(-1, -1)
    """Processes that load images, of each training process; -1: as many as it has cores, at most 8."""
    checkpoint_every: int = at_least(0, 0)
    """Steps between two checkpoints, beside the one at the end of every epoch; 0: only that one."""
    eval_every: int = at_least(1, 1)
    """Epochs between two evaluations; the last epoch is always evaluated."""
    eval_batch_size: int = at_least(1, 64)
    look_every: int = at_least(0, 0)
    """Steps between two looks at what the device has found, such as a loss that is not finite. 0: every step on a CPU,
    where looking costs nothing; every 20 on a GPU, which is waited for."""
    max_skipped_steps: int = at_least(0, 0)
    """Steps in a row with a non-finite loss or gradient that are left out before the run stops."""
    broken_images: Literal["error", "skip"] = "error"
    """What an image that cannot be read does: stop the run, or be left out and counted, in evaluation too."""


@dataclass
class RunConfig:
    """What every driver's command line has. A driver derives its own from it, with a group `method`."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    out: Path = Path("runs/run")
    """Folder of the run. Left at its default, a finished run or one of other settings is not touched: the new one gets
    the next number (runs/demo-2)."""
    seed: int = 0
    resume: str = "auto"
    """auto: go on with the run in --out, if there is one. must, never: demand or refuse one. PATH: its checkpoint."""
    force_stage: tuple[str, ...] = ()
    """Stages to do again although they are done, or were begun with other settings or inputs."""
    limit_train: int | None = at_least(1, None)
    """Use only so many training images."""
    limit_test: int | None = at_least(1, None)
    """Use only so many test images."""
    report: bool = True
    """Write report.html with curves, activation maps and confusions at the end."""
    dry_run: bool = False
    """Show configuration, data and the stages with what is done of them, then stop."""
    debug: bool = False
    """Show an error with its traceback."""


# What may differ when a run is continued: where things are and how fast they go, never what is computed.
MACHINE_FIELDS = (
    "out",
    "resume",
    "force_stage",
    "dry_run",
    "report",
    "debug",
    "data.root",
    "data.cache",
    "model.weights",  # its content is compared, not its path
    "engine.device",
    "engine.workers",
    "engine.checkpoint_every",
    "engine.eval_batch_size",
    "engine.look_every",
    "engine.max_skipped_steps",  # says when to stop, not what is computed
)


class ConfigMismatch(ValueError):  # noqa: N818 (says what happened)
    """A stage or checkpoint belongs to another configuration, other data or other results of earlier stages."""


def check_limits(config: Any, prefix: str = "--") -> None:
    """ValueError for the first number below its limit (`at_least`), infinite or NaN, which its flag names."""
    for entry in dataclasses.fields(config):
        value, flag = getattr(config, entry.name), prefix + entry.name.replace("_", "-")
        limit = entry.metadata.get("at_least")
        if dataclasses.is_dataclass(value):
            check_limits(value, f"{flag}.")
            continue
        if limit is not None and value is not None and not value >= limit:  # so that NaN is refused too
            raise ValueError(f"{flag}: expected at least {limit}, got {value}")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{flag}: expected a finite number, got {number}")


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dataclass or nested mapping → {"group.field": value}, with tuples as lists and paths as strings (as in JSON)."""
    items = config.items() if isinstance(config, Mapping) else dataclasses.asdict(config).items()
    flat: dict[str, Any] = {}
    for name, value in items:
        if _has_fields(value):
            flat.update(flatten(value, f"{prefix}{name}."))
        elif isinstance(value, (tuple, list)):
            flat[prefix + name] = list(value)
        else:
            flat[prefix + name] = str(value) if isinstance(value, Path) else value
    return flat


def only(settings: T, names: Iterable[str]) -> T:
    """Settings of which these fields are kept and all others have their defaults: what a stage depends on."""
    kept: Any = {name: getattr(settings, name) for name in names}
    return dataclasses.replace(type(settings)(), **kept)  # type: ignore[type-var]  # of a dataclass


def identity(config: Any, ignore: Iterable[str] = MACHINE_FIELDS) -> dict[str, Any]:
    """The flattened fields that decide what is computed; of a dataclass, or of a dictionary of them by group."""
    ignored = set(ignore)
    return {name: value for name, value in sorted(flatten(config).items()) if name not in ignored}


def digest(value: Any) -> str:
    """sha256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def defaults(config: Any) -> dict[str, Any]:
    """The defaults of the fields of a dataclass, or of a dictionary of them by group: flat, as in `identity`.

    They are what a run did that was begun before the field was added. So a field that is added must do by default
    what was done without it.
    """
    return flatten(_defaults(config))


def _defaults(config: Any) -> dict[str, Any]:
    if isinstance(config, Mapping):
        return {name: _defaults(value) for name, value in config.items() if _has_fields(value)}
    found = {}
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if _has_fields(value):
            found[entry.name] = _defaults(value)
        elif entry.default is not dataclasses.MISSING:
            found[entry.name] = entry.default
        elif entry.default_factory is not dataclasses.MISSING:
            found[entry.name] = entry.default_factory()
    return found


def _has_fields(value: Any) -> bool:
    return isinstance(value, Mapping) or dataclasses.is_dataclass(value)


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], defaults: Mapping[str, Any] = types.MappingProxyType({})
) -> list[str]:
    """One line for each field that differs: "optim.lr: 0.01 in the run, 0.02 now".

    A field that the run lacks had its default there. One that only the run has is a difference: nothing does any more
    what it stood for.
    """
    absent = object()

    def show(value: Any) -> str:
        text = "absent" if value is absent else json.dumps(value)
        return text if len(text) <= 200 else f"{text[:180]} … ({len(text)} characters)"

    names = sorted({*old, *new})
    pairs = [(name, old.get(name, defaults.get(name, absent)), new.get(name, absent)) for name in names]
    return [f"{name}: {show(before)} in the run, {show(now)} now" for name, before, now in pairs if before != now]


def save_config(config: Any, file: Path) -> None:
    """Write the resolved configuration as nested JSON."""
    text = json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n"
    write_atomically(file, lambda stream: stream.write(text.encode()))


def load_config(cls: type[T], file: str | Path) -> T:
    """Read what `save_config` wrote. Unknown fields and wrong types are refused by name.

    A missing field gets its default: a configuration that an older version has written loads.
    """
    path = Path(file)
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"configuration {path} does not exist") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"configuration {path} is not JSON: {error}") from None
    return _build(cls, values, str(path))


def _build(cls: type[T], values: Any, where: str) -> T:
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected an object with the fields of {cls.__name__}, got {values!r}")
    hints = typing.get_type_hints(cls)
    known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{where}: unknown field {unknown[0]!r}; {cls.__name__} has {', '.join(sorted(known))}")
    return cls(**{name: _convert(hints[name], value, f"{where}: {name}") for name, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(arguments[0], item, where) for item in value)
    if origin is Literal and value in arguments:
        return value
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise ValueError(f"{where}: expected {getattr(hint, '__name__', hint)}, got {value!r}")
