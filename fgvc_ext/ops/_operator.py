"""What every operator needs of torch, written once: its fake kernel, its gradient and its rule for ``vmap``.

An operator of the library is an :class:`Operator` beside its public function; so is its backward. A call takes the
cheapest way that serves:

- nothing to record: straight to the kernel, below autograd;
- a gradient to record: an ``autograd.Function`` of the old style, a third faster than what ``register_autograd``
  makes;
- a transform of ``torch.func``: the same as a Function of the new style, which transforms can see through;
- a graph that is traced (``torch.compile``, ``torch.export``): the raw operator, whose formula is registered, so that
  an exported program can be trained.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._library import has_schema

SetupContext = Callable[[Any, tuple[Any, ...], Any], None]
Backward = Callable[..., Any]
Vmap = Callable[..., tuple[Any, Any]]


class Operator:
    """The raw operator ``torch.ops.fgvc_ext.<name>``, called with its positional arguments.

    Args:
        name: as in ``csrc/library.cpp``.
        fake: its fake kernel: results of the sizes, dtypes and strides that the kernel gives.
        setup_context, backward: as in ``torch.library.register_autograd``; without them it has no gradient.
        vmap: as in ``torch.library.register_vmap``; by default the operator is called once per element of the batch.
    """

    def __init__(
        self,
        name: str,
        fake: Callable[..., Any],
        setup_context: SetupContext | None = None,
        backward: Backward | None = None,
        vmap: Vmap | None = None,
    ) -> None:
        self.name = name
        if not has_schema(name):  # a library without it, or none: the public function takes the reference
            return
        raw = getattr(torch.ops.fgvc_ext, name).default
        self.raw = raw
        self.differentiable = backward is not None
        torch.library.register_fake(f"fgvc_ext::{name}", fake)
        torch.library.register_vmap(f"fgvc_ext::{name}", vmap or _one_by_one(raw))
        if backward is None:
            return
        setup = setup_context or _save_nothing
        torch.library.register_autograd(f"fgvc_ext::{name}", backward, setup_context=setup)
        self._record = _fast_function(raw, setup, backward).apply
        self._transform = _transformable_function(raw, setup, backward).apply

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return self.raw(*arguments)
        if torch._C._are_functorch_transforms_active():
            return self._transform(*arguments) if self.differentiable else self.raw(*arguments)
        # True in every thread of the process while one of them exports without dynamo: asked last.
        if torch.compiler.is_compiling():
            return self.raw(*arguments)
        if self.differentiable and _must_record(arguments):
            return self._record(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return self.raw(*arguments)


def backward_operator(name: str, fake: Callable[..., Any], vmap: Vmap | None = None) -> Operator:
    """``<name>_backward``. Differentiating what it gives raises and names the operator; torch alone would only warn."""

    def refuse(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(f"{name}: a second backward (create_graph=True) is not supported")

    return Operator(f"{name}_backward", fake, backward=refuse, vmap=vmap)


def transforms_are_active() -> bool:
    """Inside ``torch.func.grad``, ``vmap`` and the like, where ``requires_grad`` does not tell of every level."""
    return bool(torch._C._are_functorch_transforms_active())


def wants_gradient(tensor: Tensor) -> bool:
    """Whether a backward through ``tensor`` may come, also one through a program that is exported now."""
    if torch.compiler.is_exporting() or transforms_are_active():
        return True
    return tensor.requires_grad and torch.is_grad_enabled()


def constant(tensor: Tensor) -> Tensor:
    """An argument without a gradient, even where it requires one."""
    return tensor.detach() if tensor.requires_grad else tensor


def dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides of ``torch.empty_like(tensor)``: a gradient keeps the layout without the tensor being saved."""
    if transforms_are_active():  # a tensor inside vmap cannot be asked for channels_last
        return _dense_in_the_order_of(tensor)
    if tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.stride()
    return torch.empty_like(tensor, device="meta").stride()


def _dense_in_the_order_of(tensor: Tensor) -> tuple[int, ...]:
    """Strides without gaps, the dimensions in the order that they have in memory."""
    actual = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda dim: (-actual[dim], dim))
    strides, elements = [0] * tensor.dim(), 1
    for dim in reversed(order):
        strides[dim] = elements
        elements *= max(tensor.shape[dim], 1)
    return tuple(strides)


def fake_loss_gradient(gradients: Tensor, dtype: torch.dtype) -> Tensor:
    """Of the backward of losses that saved their gradients [losses, *size]: csrc/common/loss_gradient.h."""
    return gradients.new_empty(gradients.shape[1:], dtype=dtype)


def _must_record(arguments: tuple[Any, ...]) -> bool:
    # The Function refuses forward-mode derivatives; below autograd they would vanish.
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _fast_function(raw: Any, setup: SetupContext, backward: Backward) -> type[torch.autograd.Function]:
    class Fast(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = raw(*arguments)
            setup(ctx, arguments, output)
            return output

    Fast.backward = staticmethod(backward)  # type: ignore[method-assign]
    return Fast


def _transformable_function(raw: Any, setup: SetupContext, backward: Backward) -> type[torch.autograd.Function]:
    class Transformable(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*arguments: Any) -> Any:
            return raw(*arguments)

    Transformable.setup_context = staticmethod(setup)  # type: ignore[method-assign, assignment]
    Transformable.backward = staticmethod(backward)  # type: ignore[method-assign]
    return Transformable


def _one_by_one(raw: Any) -> Vmap:
    """The rule that always serves: a call for each element of the batch."""

    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        results = []
        for number in range(info.batch_size):
            results.append(raw(*[_element(x, dim, number) for x, dim in zip(arguments, in_dims, strict=True)]))
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(each) for each in zip(*results, strict=True)), (0,) * len(results[0])

    return vmap


def fold_samples(name: str, tensors: tuple[int, ...], folds: Callable[..., bool] = lambda *arguments: True) -> Vmap:
    """The rule of an operator whose results, like its arguments number ``tensors``, begin with the samples N.

    A batch of B calls is one call on B·N samples.

    Where another argument is batched (a weight), or ``folds(*arguments)`` is false, the operator is called one by one.
    The size and strides of a gradient, which backward operators take as lists, become those of B·N contiguous samples.
    """

    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        raw = getattr(torch.ops.fgvc_ext, name).default
        batched = {number for number, dim in enumerate(in_dims) if isinstance(dim, int)}
        if not batched <= set(tensors) or not folds(*arguments):
            return _one_by_one(raw)(info, in_dims, *arguments)
        folded = list(arguments)
        for number in tensors:
            if arguments[number] is not None:
                folded[number] = _folded(arguments[number], in_dims[number], info.batch_size)
        lists = [number for number, argument in enumerate(arguments) if isinstance(argument, (list, tuple))]
        if lists:
            size, stride = lists
            samples, *rest = arguments[size]
            folded[size] = [info.batch_size * samples, *rest]
            folded[stride] = torch.empty(folded[size], device="meta").stride()
        results = raw(*folded)
        if isinstance(results, Tensor):
            return _unfolded(results, info.batch_size), 0
        return tuple(_unfolded(result, info.batch_size) for result in results), (0,) * len(results)

    return vmap


def _element(argument: Any, dim: Any, number: int) -> Any:
    if isinstance(argument, (list, tuple)):
        return [_element(one, one_dim, number) for one, one_dim in zip(argument, dim, strict=True)]
    return argument.select(dim, number) if isinstance(dim, int) else argument


def _folded(tensor: Tensor, dim: int | None, batch: int) -> Tensor:
    tensor = tensor.expand(batch, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.flatten(0, 1)


def _unfolded(tensor: Tensor, batch: int) -> Tensor:
    if tensor.numel() == 0 and tensor.dim() == 1:  # what was not asked for
        return tensor.expand(batch, 0)
    return tensor.unflatten(0, (batch, tensor.shape[0] // batch))
