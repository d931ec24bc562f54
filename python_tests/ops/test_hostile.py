"""Raw operators called with anything (hostile.py): each call returns or raises, none ends the process."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fgvc_ext import _library

from . import hostile
from .conftest import needs_libraries

pytestmark = [needs_libraries, pytest.mark.timeout(1200)]
ROOT = Path(__file__).parents[2]
OPERATORS = hostile.operators() if _library.has_schemas() else []
FEW, MANY = 300, 10_000


def make_calls(tmp_path: Path, first: int, count: int, *names: str) -> str:
    """What the process printed; fails with the call that ended it, or that took too long."""
    at = tmp_path / "call"
    environment = {**os.environ, "FGVC_EXT_HOSTILE_CALL": str(at), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "python_tests.ops.hostile"]
    result = subprocess.run(
        [*command, str(first), str(count), *names], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if result.returncode != 0:
        name, number = at.read_text().split()
        again = f"{' '.join(command)} {number} 1 {name}"
        pytest.fail(f"call {number} of {name} ended the process ({result.returncode}). To repeat it: {again}\n"
                    f"{result.stderr[-3000:]}")  # fmt: skip
    return result.stdout


def assert_some_return(output: str, count: int) -> None:
    """Else the calls would try no kernel."""
    for line in output.splitlines():
        returned = int(line.split()[-2])
        assert count // 10 < returned < count, line


def test_a_few_hostile_calls_of_every_operator(tmp_path: Path) -> None:
    output = make_calls(tmp_path, 0, FEW, *OPERATORS)
    assert [line.split(":")[0] for line in output.splitlines()] == OPERATORS
    assert_some_return(output, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATORS)
def test_many_hostile_calls(name: str, tmp_path: Path) -> None:
    assert_some_return(make_calls(tmp_path, FEW, MANY, name), MANY)


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_is_called_as_the_specs_call_it(name: str) -> None:
    """Hostile arguments start as valid ones; the same number always makes the same call."""
    assert len(hostile.valid_calls(name)) > 5
    schema = getattr(torch.ops.fgvc_ext, name).default._schema
    for number in range(20):
        one, other = hostile.arguments(name, number), hostile.arguments(name, number)
        assert len(one) == len(schema.arguments)
        assert list(map(hostile.describe, one)) == list(map(hostile.describe, other))


@pytest.mark.parametrize("name", [name for name in OPERATORS if name.endswith("_backward")])
def test_a_gradient_of_overlapping_elements_is_refused(name: str) -> None:
    """No process ends of it: but parallel tasks would write the same element."""
    operator = getattr(torch.ops.fgvc_ext, name).default
    names = [argument.name for argument in operator._schema.arguments]
    if "stride" not in names:
        pytest.skip("the gradient has the layout of a saved tensor")
    place = names.index("stride")
    valid = next(list(call) for call in hostile.valid_calls(name) if call[0].numel() > 1)
    operator(*valid)
    for stride in ([0] * len(valid[place]), [1] * len(valid[place]), [-1, *valid[place][1:]]):
        with pytest.raises(RuntimeError, match=f"{name}: .*stride"):
            operator(*valid[:place], stride, *valid[place + 1 :])


@pytest.mark.parametrize(
    ("name", "saved"),
    [
        ("diversify_backward", "bits"),
        ("global_k_max_pool_backward", "indices"),
        ("global_k_max_pool_backward", "values"),
        ("gradient_boosting_cross_entropy_backward", "rows"),
    ],
)
def test_a_saved_tensor_of_other_strides_is_refused(name: str, saved: str) -> None:
    """The kernels read it as forward wrote it: with these strides they would take the numbers of other elements."""
    operator = getattr(torch.ops.fgvc_ext, name).default
    place = [argument.name for argument in operator._schema.arguments].index(saved)
    calls = [call for call in hostile.valid_calls(name) if call[place] is not None and call[place].dim() > 1]
    valid = next(list(call) for call in calls if min(call[place].shape[-2:]) > 1)
    operator(*valid)
    turned = valid[place].transpose(-1, -2).contiguous().transpose(-1, -2)  # the same numbers
    with pytest.raises(RuntimeError, match=f"{name}: {saved} must be contiguous, as forward saved it"):
        operator(*valid[:place], turned, *valid[place + 1 :])


def test_a_call_that_ends_the_process_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "program.py"
    program.write_text("""
import os, sys
from python_tests.ops import hostile
hostile.call = lambda name, number: os.abort() if number == 7 else True
hostile.main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
""")
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **options: run(
        [command[0], str(program), *command[3:]], **options
    ))  # fmt: skip
    with pytest.raises(pytest.fail.Exception, match=f"call 7 of {OPERATORS[0]} ended the process"):
        make_calls(tmp_path, 5, 10, OPERATORS[0])


def with_tensor(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The argument with its tensor changed, of a list the first; None where it has none."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
        return [change(value[0]), *value[1:]]
    return None


@pytest.mark.parametrize("name", OPERATORS)
def test_a_tensor_of_another_dtype_is_refused(name: str) -> None:
    """Saved tensors too: a kernel would read them as what they are not."""
    operator = getattr(torch.ops.fgvc_ext, name).default
    valid = list(next(iter(hostile.valid_calls(name))))
    tried = 0
    for place, value in enumerate(valid):
        changed = with_tensor(value, lambda tensor: tensor.to(torch.int8))
        if changed is not None:
            tried += 1
            with pytest.raises(RuntimeError, match=f"{name}: .*dtype"):
                operator(*valid[:place], changed, *valid[place + 1 :])
    assert tried > 0


@pytest.mark.parametrize("name", [name for name in OPERATORS if name.endswith("_backward")])
def test_a_gradient_of_more_elements_than_can_be_counted_is_refused(name: str) -> None:
    operator = getattr(torch.ops.fgvc_ext, name).default
    names = [argument.name for argument in operator._schema.arguments]
    if "stride" not in names:
        pytest.skip("the gradient has the layout of a saved tensor")
    valid = next(list(call) for call in hostile.valid_calls(name) if call[0].numel() > 1)
    valid[names.index("size")], valid[names.index("stride")] = [2**32, 2**32, 1, 1], [1, 2**32, 1, 1]
    with pytest.raises(RuntimeError, match=f"{name}: size and stride must be those of a dense tensor"):
        operator(*valid)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_map_of_too_many_positions_is_refused(name: str) -> None:
    """32 bits name them. The map takes no memory: all of its elements are one."""
    operator = getattr(torch.ops.fgvc_ext, name).default
    valid = next(list(call) for call in hostile.valid_calls(name) if with_tensor(call[0], lambda t: t) is not None)
    if not isinstance(valid[0], torch.Tensor) or valid[0].dim() != 4:
        pytest.skip("its first tensor is no image of maps")
    huge = torch.zeros(1, 1, 1, 1).expand(1, 1, 2**16, 2**15)
    with pytest.raises(RuntimeError, match=rf"{name}: .*2\^31 - 1 positions"):
        operator(huge, *valid[1:])
