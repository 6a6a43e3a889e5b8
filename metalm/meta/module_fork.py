"""A fork of a module: it shares the module's tensors, and owns its buffers and what it learns.

    def loss(model, batch):
        inputs, targets = batch
        return cross_entropy(model(inputs), targets)

    task = fork(module).unroll(GradientDescent(0.4), [support] * 5, loss, order=2)
    loss(task.fork, query).backward()

The gradient goes on to the module's own parameters and to the rule's, through the five updates.
Nothing of the module is written: fast weights are new tensors, and running statistics belong to the
fork. Modes (training or evaluation) are the module's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metalm.meta import tree
from metalm.meta.inner_problem import Batch
from metalm.meta.module_loss import ModuleLoss, vectorised_attention
from metalm.meta.parameters import Parameters, aliases, call_with, choose, split
from metalm.meta.segment_length import Segment
from metalm.meta.unroll import unroll
from metalm.meta.update_rule import AbstractUpdateRule, RuleState

TaskLoss = Callable[[Any, Batch], Any]
"""loss(model, batch) -> a scalar, or (a scalar, a tree of tensors to keep). Where something else is
learnt from than what counts, `TwoLosses` of scalars take the place of the scalar."""


class Fork:
    """A module called with numbers of its own; made by `fork`.

    Attributes:
        module: whose code runs.
        slow: W_0, the module's own parameters that learn.
        rest: its other parameters.
        fast: W_t; ``slow`` itself before the first update. ``[tasks, *shape]`` with tasks.
        buffers: the fork's own.
        tasks: how many tasks are learnt side by side, each with fast weights and buffers of its
            own; None for one without a dimension for it.
        aliases: further names of tied tensors, and the name that each has above.
    """

    __slots__ = ("aliases", "buffers", "fast", "module", "rest", "slow", "tasks")

    def __init__(
        self,
        module: nn.Module,
        slow: Parameters,
        rest: Parameters,
        fast: Parameters,
        buffers: Parameters,
        tasks: int | None,
        aliases: Mapping[str, str],
    ) -> None:
        self.module, self.slow, self.rest, self.fast = module, slow, rest, fast
        self.buffers, self.tasks, self.aliases = buffers, tasks, aliases

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's answer under W_t; running statistics are written into the fork's buffers.

        With tasks, tensors among the arguments are ``[tasks, ...]`` and so is the answer.
        """
        if self.tasks is not None:
            return self._call_tasks(args, kwargs)
        numbers = {**self.rest, **self.fast, **self.buffers}
        for alias, name in self.aliases.items():
            numbers[alias] = numbers[name]
        answer = call_with(self.module, numbers, args, kwargs)
        # A buffer that the module has put another tensor in place of is found in the numbers.
        self.buffers = {name: numbers[name].detach() for name in self.buffers}
        return answer

    def unroll(
        self,
        rule: AbstractUpdateRule,
        batches: Sequence[Batch],
        loss: TaskLoss,
        *,
        weights: Sequence[float] | None = None,
        order: int = 2,
        segment: Segment | None = None,
        update_last: bool = True,
        rule_state: RuleState = None,
        apart: bool = False,
    ) -> ForkUnrolled:
        """Learn from the batches one after the other; `metalm.meta.unroll.unroll` for a fork.

        Args:
            rule: the update rule.
            batches: one a step; with tasks, their tensors are ``[tasks, ...]``.
            loss: called with a fork that has one task, and one batch of it.
            weights: share of each loss in the meta-loss, 1 by default.
            order: of the meta-gradient; 0 for none, 1 with inner gradients held constant, 2 exact.
            segment: for less memory; see `metalm.meta.unroll.unroll`, also for what it does not
                reach.
            update_last: whether the last loss is learnt from.
            rule_state: the rule's state at the first step; its initial state by default.
            apart: whether the loss gives `TwoLosses`; see `metalm.meta.unroll.unroll`.

        Returns:
            A new fork that goes on from there, the meta-loss, and the losses.

        Raises:
            ValueError: what cannot be run this way; the message says what and why.
        """
        first = all(self.fast[name] is self.slow[name] for name in self.slow)
        done = unroll(
            ModuleLoss(self, loss, order),
            rule,
            self.slow,
            self.rest,
            batches,
            self.buffers,
            fast=None if first else self.fast,
            rows=self.tasks,
            rule_state=rule_state,
            weights=weights,
            order=order,
            segment=segment,
            update_last=update_last,
            apart=apart,
        )
        after = self._with(self.rest, done.fast, done.state, self.tasks)
        return ForkUnrolled(after, done.meta_loss, done.losses, done.aux, done.rule_state)

    def with_numbers(self, parameters: Parameters, buffers: Parameters) -> Fork:
        """One task's fork with these parameters, and with copies of these buffers."""
        fast = {name: parameters[name] for name in self.fast}
        rest = {name: parameters[name] for name in self.rest}
        own = {name: buffer.detach().clone() for name, buffer in buffers.items()}
        return self._with(rest, fast, own, None)

    def _with(
        self, rest: Parameters, fast: Parameters, buffers: Parameters, tasks: int | None
    ) -> Fork:
        return Fork(self.module, self.slow, rest, fast, buffers, tasks, self.aliases)

    def _call_tasks(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's answers for every task."""

        def answer(fast: Parameters, buffers: Parameters, tensors: list[Tensor]) -> Any:
            model = self.with_numbers({**self.rest, **fast}, buffers)
            own_args, own_kwargs = tree.replace((args, kwargs), tensors)
            return model(*own_args, **own_kwargs), model.buffers

        fast = {name: _stacked(t, self.slow[name], self.tasks) for name, t in self.fast.items()}
        with vectorised_attention():
            output, self.buffers = torch.func.vmap(answer, randomness="different")(
                fast, self.buffers, tree.tensors((args, kwargs))
            )
        return output


class ForkUnrolled(NamedTuple):
    """What an unroll of a fork leaves behind."""

    fork: Fork
    """With the fast weights after the last update, on the path from the module and the rule."""
    meta_loss: Tensor
    """Sum over steps of weight times the loss, summed over tasks; differentiable from order 1."""
    losses: Tensor
    """``[steps]``, or ``[steps, tasks]``, without history."""
    aux: list[Any]
    """What the loss gave to keep, by step, without history."""
    rule_state: RuleState
    """The rule's state after the last update."""


def fork(module: nn.Module, fast: Sequence[str] | None = None, *, tasks: int | None = None) -> Fork:
    """A fork that shares every tensor of the module and owns its buffers.

    Args:
        module: any module; a tensor that it holds under several names stays one.
        fast: name patterns of the parameters that learn, such as ``["head.*"]``; by default all
            that require a gradient. The others are meta-learned where they require one. With none,
            the fork can be called, for buffers of its own, but learns nothing.
        tasks: to learn so many tasks side by side.

    Raises:
        ValueError: nothing would learn, or the module cannot run several tasks side by side.
    """
    if tasks is not None:
        check_tasks(module)
    names = tuple(name for name, tensor in module.named_parameters() if tensor.requires_grad)
    if fast is not None:
        names = choose(module, fast) if fast else ()
    elif not names:
        raise ValueError(
            "nothing would learn; expected a parameter that requires a gradient, found none; do "
            "name the fast ones, or call requires_grad_() on them"
        )
    slow, rest = split(module, names)
    buffers = tree.detach(dict(module.named_buffers()))
    own = {name: _stacked(b, b, tasks).clone() for name, b in buffers.items()}
    return Fork(module, slow, rest, slow, own, tasks, aliases(module))


def check_tasks(module: nn.Module) -> None:
    """Refuse modules that ``torch.func.vmap`` cannot run with weights of their own.

    Raises:
        ValueError: A recurrence of torch's own, in fused kernels; or batch normalisation whose
            running statistics are plain means of all batches, which takes a number out of a tensor.
    """
    for name, part in module.named_modules():
        counted = getattr(part, "track_running_stats", False) and part.training
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and counted and part.momentum is None:
            raise ValueError(
                "tasks cannot be learnt side by side here; expected batch normalisation with a "
                f"momentum, found none in {name or 'the top'!r}; do learn one task at a time "
                "(together=1), or give it one"
            )
        if isinstance(part, nn.RNNBase | nn.RNNCellBase):
            raise ValueError(
                "tasks cannot be learnt side by side here; expected modules in operations that "
                f"torch can vectorise, found {type(part).__name__} at {name or 'the top'!r}, whose "
                "fused kernels take one set of weights; do learn one task at a time (together=1), "
                "or write the recurrence with linear, sigmoid and tanh"
            )


def _stacked(tensor: Tensor, like: Tensor, tasks: int | None) -> Tensor:
    """A view with a dimension for tasks, where it has none."""
    if tasks is None or tensor.dim() > like.dim():
        return tensor
    return tensor.expand(tasks, *tensor.shape)
