"""Optimiser, schedule and moving average: what the settings say is what is computed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fgvc_ext.training import OptimConfig
from fgvc_ext.training.optimisation import MovingAverage, build_optimizer, build_scheduler


def _after(optimizer_of, steps: int = 3) -> torch.Tensor:
    """The parameter after some steps along gradients that change."""
    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = optimizer_of([{"params": [parameter]}])
    for step in range(steps):
        parameter.grad = torch.tensor([0.5, -0.3]) * (step + 1)
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_is_of_the_kind_that_was_asked_for(nesterov):
    config = OptimConfig(lr=0.1, momentum=0.8, nesterov=nesterov, weight_decay=0.01)
    own = _after(lambda groups: build_optimizer(groups, config))
    torchs = _after(lambda groups: torch.optim.SGD(groups, 0.1, 0.8, 0.0, 0.01, nesterov))
    torch.testing.assert_close(own, torchs)


def test_a_cosine_rises_to_the_full_rate_and_ends_at_zero():
    config = OptimConfig(epochs=5, lr=0.4, schedule="cosine", warmup_epochs=2)
    optimizer = build_optimizer([{"params": [nn.Parameter(torch.zeros(1))]}], config)
    scheduler = build_scheduler(optimizer, config, 4)
    rates = [scheduler.get_last_lr()[0]]
    for _ in range(5 * 4):
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    assert rates[8] == pytest.approx(0.4)
    assert max(rates) == pytest.approx(0.4)
    assert rates[14] == pytest.approx(0.2), "half of the way down"
    assert rates[20] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("times", "expected"), [(None, [1, 1, 0.5, 0.5, 0.25, 0.25]), (1, [1, 1, 0.5, 0.5, 0.5, 0.5])])
def test_steps_down_are_as_many_as_asked_for(times, expected):
    """Every so many epochs, or once: both readings of a recipe that drops its rate after 50 epochs."""
    config = OptimConfig(epochs=6, lr=1.0, schedule="step", step_epochs=2, step_factor=0.5, step_times=times)
    optimizer = build_optimizer([{"params": [nn.Parameter(torch.zeros(1))]}], config)
    scheduler, rates = build_scheduler(optimizer, config, 3), []
    for step in range(6 * 3):
        rates.append(optimizer.param_groups[0]["lr"])
        assert rates[-1] == pytest.approx(expected[step // 3])
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("warmup", [0.0, 0.5])
@pytest.mark.parametrize("times", [None, 1, 3])
def test_a_stepwise_schedule_goes_on_beyond_the_end_that_it_was_made_for(times, warmup):
    more = {"lr": 1.0, "step_epochs": 2, "step_factor": 0.5, "step_times": times, "warmup_epochs": warmup}

    def rates(scheduler, optimizer, count: int) -> list[float]:
        found = []
        for _ in range(count):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return found

    def made(epochs: int):
        config = OptimConfig(epochs=epochs, schedule="step", **more)
        optimizer = build_optimizer([{"params": [nn.Parameter(torch.zeros(1))]}], config)
        return build_scheduler(optimizer, config, 3), optimizer

    whole, first, second = made(8), made(4), made(8)
    expected = rates(*whole, 24)
    assert rates(*first, 12) == expected[:12]
    second[1].load_state_dict(first[1].state_dict())
    second[0].load_state_dict(first[0].state_dict())
    assert rates(*second, 12) == expected[12:]


def test_the_average_begins_with_the_first_parameters_that_it_sees():
    task = nn.Linear(2, 1)
    average = MovingAverage(task, 0.75)
    usable, weights = torch.tensor(True), []
    for value in (4.0, 8.0):
        with torch.no_grad():
            task.weight.fill_(value)
        average.update(task, usable)
        weights.append(average.module.weight.clone())
    torch.testing.assert_close(weights[0], torch.full((1, 2), 4.0))
    torch.testing.assert_close(weights[1], torch.full((1, 2), 5.0))
