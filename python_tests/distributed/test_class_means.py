"""Class means over several processes equal those of one process with the global batch: gloo, two and three ranks."""

import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from .class_mean_training import CLASSES, Case, cases, run, train

pytestmark = [
    pytest.mark.xdist_group("class means of several processes"),  # one worker, which starts the ranks once
    pytest.mark.timeout(120),
    pytest.mark.skipif(not (distributed.is_available() and distributed.is_gloo_available()), reason="needs gloo"),
]
WORLD_SIZES = (2, 3)
PATIENCE = 60  # seconds for all cases of a world size, which take about five
# After one step and after many: what rounding in another order makes of it.
TOLERANCES = {
    (torch.float32, 1): 1e-6,
    (torch.float32, 20): 1e-5,
    (torch.float64, 1): 1e-12,
    (torch.float64, 20): 1e-12,
}
WRONG = 1e-3  # and what a wrong gradient makes at least

each_world_size = pytest.mark.parametrize("world_size", WORLD_SIZES)
each_case = pytest.mark.parametrize(
    ("world_size", "case"),
    [pytest.param(size, case, id=f"{size} ranks, {case.name}") for size in WORLD_SIZES for case in cases(size)],
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What every rank found, for every world size: processes are started once for all cases."""
    return {size: _all_ranks(size, tmp_path_factory.mktemp(f"ranks{size}")) for size in WORLD_SIZES}


def _all_ranks(world_size: int, folder: Path) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("forkserver")  # torch is imported once, in a process that has no threads yet
    context.set_forkserver_preload([run.__module__])
    ranks = [context.Process(target=run, args=(rank, world_size, str(folder))) for rank in range(world_size)]
    deadline = time.monotonic() + PATIENCE
    try:
        for rank in ranks:
            rank.start()
        # Looked at together: when one fails, the others wait for it, and need not be waited for.
        while any(rank.is_alive() for rank in ranks) and not any(rank.exitcode for rank in ranks):
            assert time.monotonic() < deadline, f"{world_size} ranks did not finish in {PATIENCE} s"
            time.sleep(0.05)
        assert [rank.exitcode for rank in ranks] == [0] * world_size
    finally:
        for rank in ranks:
            if rank.is_alive():
                rank.kill()
            rank.join()
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(world_size)]


def differences(actual: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """The largest absolute difference in parameters and means, and in the last gradients."""
    return {
        f"{kind} {name}": float((actual[kind][name] - value).abs().max())
        for kind in ("state", "grads")
        for name, value in expected[kind].items()
    }


@each_case
def test_several_processes_are_one_with_the_global_batch(
    results: dict[int, list[dict[str, Any]]], world_size: int, case: Case
) -> None:
    ranks = [rank[case.name] for rank in results[world_size]]
    expected = train(case)
    found = differences(ranks[0], expected)
    if case.gather != "ours":
        assert max(found.values()) > WRONG, "the comparison does not notice a wrong gradient"
        return
    tolerance = TOLERANCES[case.dtype, case.steps]
    if case.half:  # three times a gradient is rounded where the gradient itself was
        tolerance = 2**-8 * max(float(grad.abs().max()) for grad in expected["grads"].values())
    assert max(found.values()) <= tolerance, found
    losses = torch.stack([rank["losses"] for rank in ranks]).mean(0)
    torch.testing.assert_close(losses, expected["losses"], rtol=tolerance, atol=tolerance)
    for name in ("within", "between"):
        torch.testing.assert_close(ranks[0][name], expected[name], rtol=tolerance, atol=tolerance)


@each_case
def test_means_are_the_same_bits_on_all_ranks(
    results: dict[int, list[dict[str, Any]]], world_size: int, case: Case
) -> None:
    first, *others = (rank[case.name]["state"]["class_means.class_means"] for rank in results[world_size])
    same = [torch.equal(first, other) for other in others]
    assert all(same) is (case.gather != "every rank for itself")


@each_world_size
def test_one_class_has_no_between_loss(results: dict[int, list[dict[str, Any]]], world_size: int) -> None:
    for rank in results[world_size]:
        assert rank["all of one class"]["between"] == 0
        assert rank["all of one class"]["within"] > 0


@each_world_size
def test_evaluation_waits_for_nobody(results: dict[int, list[dict[str, Any]]], world_size: int) -> None:
    assert results[world_size][0]["evaluation"].isfinite()
    assert all("evaluation" not in rank for rank in results[world_size][1:])


@each_world_size
def test_a_nan_on_one_rank_leaves_the_means_of_all(results: dict[int, list[dict[str, Any]]], world_size: int) -> None:
    for rank in results[world_size]:
        loss: Tensor = rank["nan on one rank"]
        assert loss.isnan()
        assert (rank["means after nan"] == 0).all()


@each_world_size
def test_a_wrong_label_on_one_rank_ends_all(results: dict[int, list[dict[str, Any]]], world_size: int) -> None:
    message = f"class_mean_loss: labels[1] = {CLASSES} is not in [0, {CLASSES}), the range of {CLASSES} classes"
    assert [rank["wrong label"] for rank in results[world_size]] == [message] * world_size


@each_world_size
def test_wrong_batch_sizes_are_refused(results: dict[int, list[dict[str, Any]]], world_size: int) -> None:
    for number, rank in enumerate(results[world_size]):
        assert rank["wrong sizes"].startswith(
            f"ClassMeanLoss: batch_sizes must have {world_size} entries, one per rank, and 2 for rank {number}, "
            "got [2, 2"
        )
