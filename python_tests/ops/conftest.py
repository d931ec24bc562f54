from collections.abc import Iterator

import pytest
import torch

from fgvc_ext import _library

from . import spec

INSTRUCTION_SETS = _library._module.supported_instruction_sets() if _library._module else []
DEVICES = ["cpu", pytest.param("cuda", marks=[
    pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
])]  # fmt: skip
needs_libraries = pytest.mark.skipif(not _library.has_schemas(), reason="the package has no compiled libraries")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
each_spec = pytest.mark.parametrize("spec", spec.SPECS, ids=lambda spec: spec.name)
each_differentiable = pytest.mark.parametrize(
    "spec", [one for one in spec.SPECS if one.differentiable], ids=lambda spec: spec.name
)


@pytest.fixture(params=INSTRUCTION_SETS or ["none"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this processor in turn."""
    if not INSTRUCTION_SETS:
        pytest.skip("the package has no compiled libraries")
    before = _library.instruction_set()
    _library._module.use_instruction_set(request.param)
    yield request.param
    _library._module.use_instruction_set(before)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
