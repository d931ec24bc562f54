"""Models that learn from those before them, and answer together: settings, teachers, ensembles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fgvc_ext.data.pipeline import Datasets, evaluation_samples
from fgvc_ext.explain.view import ModelView, view_of
from fgvc_ext.models import Ensemble, Model, load
from fgvc_ext.models.ensemble import Average
from fgvc_ext.training.attention_transfer import AttentionTransfer, Balance, Student
from fgvc_ext.training.classifier_stage import classifier_stage
from fgvc_ext.training.config import RunConfig, at_least
from fgvc_ext.training.device import choose_device
from fgvc_ext.training.ensembles import Epoch, ensemble_artefact, weights_of
from fgvc_ext.training.sampling import derive_seed
from fgvc_ext.training.stages import Artefact, Results, Stage


@dataclass
class MembersConfig:
    """How models learn from earlier ones, and how they answer together."""

    models: int = at_least(1, 5)
    """N: models that are trained one after another."""
    alpha: float = at_least(0, 0.5)
    """Weight of the orthogonal loss; 0: no model has teachers."""
    balance: Balance = "absolute"
    """absolute: equation 6. relative: rescaled in every step to alpha times the cross-entropy (public code)."""
    teacher: Epoch = "last"
    """The epoch of a model that teaches and stands in the ensemble; best_val needs validation images."""
    no_teachers: tuple[str, ...] = ()
    """Models that teach no other, such as model2."""
    average: Average = "probabilities"
    """What the ensemble averages; both are reported."""
    baseline: bool = False
    """Train the baseline ensemble beside: as many models, of the same seeds, without teachers."""

    def check(self, datasets: Datasets, group: str = "method") -> None:
        """Raise ValueError for settings that are not possible, or not with these data.

        Args:
            group: where a driver has these settings, as its flags name it.
        """
        names = self.ensembles()["ensemble"]
        if unknown := [name for name in self.no_teachers if name not in names]:
            raise ValueError(f"--{group}.no-teachers: expected some of {', '.join(names)}, got {unknown[0]!r}")
        if self.teacher == "best_val" and datasets.val is None:
            raise ValueError(f"--{group}.teacher best_val: expected validation images (--data.val-fraction), got none")

    def ensembles(self) -> dict[str, list[str]]:
        """Ensembles and their models in order; the baseline's first model is the same, which has no teacher either."""
        numbers = range(2, self.models + 1)
        found = {"plain_ensemble": ["model1", *(f"plain{n}" for n in numbers)]} if self.baseline else {}
        return {**found, "ensemble": ["model1", *(f"model{n}" for n in numbers)]}  # the last is what the run ships

    def members(self) -> dict[str, int]:
        """The models of all ensembles, in the order of their training, with their numbers."""
        return {name: n for names in reversed(self.ensembles().values()) for n, name in enumerate(names, start=1)}

    def teachers_of(self, name: str) -> list[str]:
        """The earlier models from which this one learns; none of them where it is one of the baseline's."""
        taught, n = name.startswith("model") and self.alpha > 0, self.members()[name]
        names = self.ensembles()["ensemble"]
        return [other for other in names[: n - 1] if taught and other not in self.no_teachers]

    def transfer(self, name: str) -> dict[str, Any]:
        """The settings on which this model depends: none of how models learn, where it has no teachers."""
        transfer = {"alpha": self.alpha, "balance": self.balance, "teacher": self.teacher}
        return transfer if self.teachers_of(name) else {}

    def seed_of(self, name: str, seed: int) -> int:
        """Of a run with this seed: models of the same number, with and without teachers, have the same one."""
        return derive_seed(seed, f"model {self.members()[name]}")

    def learning(self, model: Student, earlier: Results) -> dict[str, Any]:
        """The arguments of `AttentionTransfer` with which this model learns from those that it needs.

        Raises:
            ValueError: models are to look elsewhere, and the map that says where they look is frozen.
        """
        if self.alpha > 0 and self.models > 1:
            model.backbone.require_trainable_map("knowledge transfer")
        teachers = [load(weights_of(result, self.teacher)) for result in earlier.values()]
        return {"teachers": teachers, "alpha": self.alpha, "balance": self.balance}

    def stages(
        self,
        config: RunConfig,
        datasets: Datasets,
        build: Callable[[Results], AttentionTransfer],
        settings: Mapping[str, Any],
        group: str = "method",
    ) -> list[Stage | Artefact]:
        """The models one after another, then the ensembles. Models n with and without teachers have the same seed.

        Args:
            build: the models that one learns from → its task, see `learning`.
            settings: of the method, on which every model depends.
            group: see `check`, whose errors this raises.
        """
        self.check(datasets, group)
        models = [
            classifier_stage(
                name,
                config,
                datasets,
                build,
                {**settings, **self.transfer(name)},
                needs=self.teachers_of(name),
                seed=self.seed_of(name, config.seed),
            )
            for name in self.members()
        ]
        return [*models, *self._artefacts(config, datasets)]

    def figures(self, config: RunConfig, datasets: Datasets, results: Results) -> None:
        """What the report shows of members and ensembles: see `explain_ensembles`."""
        from fgvc_ext.explain.ensembles import explain_ensembles  # it needs matplotlib, and only a report does

        files = {name: weights_of(result, self.teacher) for name, result in results.items()}
        device = choose_device(config.engine.device)
        taught = self.models > 1 and bool(self.teachers_of("model2"))
        explain_ensembles(config.out, datasets.test, files, self.ensembles(), taught=taught, device=device)

    def _artefacts(self, config: RunConfig, datasets: Datasets) -> list[Artefact]:
        """The ensembles of a run."""
        evaluations = evaluation_samples(datasets, config.model.preprocessing(config.data))
        how: Any = {"average": self.average, "epoch": self.teacher, "cached": config.model.evaluate_cached}
        how["config"] = {"data": config.data}
        return [ensemble_artefact(name, of, evaluations, config.engine, **how) for name, of in self.ensembles().items()]


def view_of_ensembles(model: Model) -> ModelView | None:
    """The ensembles side by side; where their members look is shown by `MembersConfig.figures`."""
    return view_of(model) if isinstance(model, Ensemble) else None
