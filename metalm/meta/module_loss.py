"""The loss of a fork's batches, as `unroll` takes it: for one task, or for several side by side.

Several tasks run under ``vmap`` of the loss alone; gradients are taken outside, by autograd. In
torch 2.13 the other order, ``vmap(grad(...))`` and ``backward`` after it, gives a wrong second
derivative through BatchNorm and LayerNorm without a word; this one was never found to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.backends import cudnn, mha
from torch.nn.attention import SDPBackend, sdpa_kernel

from metalm.meta import tree
from metalm.meta.inner_problem import Batch, TwoLosses
from metalm.meta.parameters import Parameters

if TYPE_CHECKING:
    from metalm.meta.module_fork import Fork


@contextmanager
def vectorised_attention() -> Iterator[None]:
    """Inside, attention runs in operations that ``vmap`` knows, for all tasks at once.

    Other kernels run task by task, or, in evaluation mode, not at all.
    """
    before = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        mha.set_fastpath_enabled(before)


class ModuleLoss:
    """loss(fork, batch) as a function of parameters and buffers, for `unroll`.

    Args:
        fork: whose module runs, for one task or for several.
        loss: called with a fork of one task and its batch.
        order: of the meta-gradient.
    """

    def __init__(self, fork: Fork, loss: Callable[[Any, Batch], Any], order: int) -> None:
        self.fork, self.loss = fork, loss
        # CuDNN's recurrences have no second derivative; torch's own have.
        recurrent = any(isinstance(part, nn.RNNBase) for part in fork.module.modules())
        self.without_cudnn = order == 2 and recurrent

    def __call__(
        self, parameters: Parameters, batch: Batch, buffers: Parameters
    ) -> tuple[Tensor | TwoLosses, Any, Parameters]:
        """Losses, a scalar or ``[tasks]``, what is to be kept, and the buffers after it."""
        with cudnn.flags(enabled=False) if self.without_cudnn else nullcontext():
            if self.fork.tasks is None:
                return self._one(parameters, batch, buffers)
            with vectorised_attention():
                return self._several(parameters, batch, buffers)

    def _one(
        self, parameters: Parameters, batch: Batch, buffers: Parameters
    ) -> tuple[Tensor | TwoLosses, Any, Parameters]:
        model = self.fork.with_numbers(parameters, buffers)
        found = self.loss(model, batch)
        alone = isinstance(found, TwoLosses) or not isinstance(found, tuple)
        value, aux = (found, None) if alone else found
        for one in TwoLosses.of(value):
            if not isinstance(one, Tensor) or one.dim() != 0:
                shape = list(one.shape) if isinstance(one, Tensor) else type(one).__name__
                raise ValueError(
                    f"the loss of a task is no number; expected a scalar tensor, found {shape}; do "
                    "take the mean over the batch"
                )
        return value, aux, model.buffers

    def _several(
        self, parameters: Parameters, batch: Batch, buffers: Parameters
    ) -> tuple[Tensor | TwoLosses, Any, Parameters]:
        fast = {name: parameters[name] for name in self.fork.fast}
        rest = {name: parameters[name] for name in self.fork.rest}
        kept: list[Any] = []
        _check_batch(batch, self.fork.tasks)

        def one(
            fast: Parameters, tensors: list[Tensor], buffers: Parameters
        ) -> tuple[Tensor | TwoLosses, list[Tensor], Parameters]:
            value, aux, after = self._one({**rest, **fast}, tree.replace(batch, tensors), buffers)
            kept.append(aux)
            return value, tree.tensors(aux), after

        losses, tensors, after = torch.func.vmap(one, randomness="different")(
            fast, tree.tensors(batch), buffers
        )
        return losses, tree.replace(kept[0], tensors), after


def _check_batch(batch: Batch, tasks: int | None) -> None:
    """Refuse what would silently be one batch for all tasks."""
    found = [list(tensor.shape) for tensor in tree.tensors(batch)]
    if any(shape[:1] != [tasks] for shape in found):
        raise ValueError(
            f"a batch has other tasks than the fork; expected tensors [{tasks}, ...], found the "
            f"shapes {', '.join(map(str, found))}; do stack the batches of the tasks"
        )
    if not found and not isinstance(batch, int | float | str | tuple | list | Mapping | None):
        raise ValueError(
            "the batch of several tasks shows no tensors; expected a tree of tensors "
            f"[{tasks}, ...] (tuples, lists, mappings), found {type(batch).__name__}; do give its "
            "tensors in one of these"
        )
