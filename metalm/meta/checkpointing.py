"""Checkpoints: keep W and the states here and there, and take the steps between once more.

Forward, steps are passed over without a graph, which leaves parts that wait with a checkpoint each,
until the graph of the steps that are left is taken. The backward pass goes through that graph,
frees it, and does the same with the part that waits last. `checkpoint_schedule.py` says how much is
passed over. Steps that are taken again repeat the same numbers, random ones included, under the
same autocast. The gradient reaches what the steps share, phi, the first W and states; not what the
loss has besides, such as tensors that it closes over or those of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from metalm.meta import tree
from metalm.meta.inner_problem import InnerProblem, Unrolled
from metalm.meta.segment_length import Segment, check_segment, schedule_of, scored_alone

Method = Callable[[InnerProblem], Unrolled]
Gradients = list[Tensor | None]


def run_segments(problem: InnerProblem, method: Method, segment: Segment) -> Unrolled:
    """Run the steps with checkpoints; all but the last ones are taken again for the gradient.

    The graph of a last batch that is only scored is gone before another one comes, unless the
    segment is "auto".

    Raises:
        ValueError: A segment that there cannot be, or a budget that is too small.
    """
    check_segment(segment)
    if not torch.is_grad_enabled():
        return method(problem)
    run = _Run(problem, method, segment)
    outputs = _Checkpointed.apply(run, *_shared(problem), *run.phi, *_moving(problem))
    meta_loss, *moving = outputs
    notes, run.notes = run.notes, []
    return _moved(
        notes[-1]._replace(
            meta_loss=meta_loss,
            losses=torch.cat([note.losses for note in notes]),
            aux=[aux for note in notes for aux in note.aux],
        ),
        moving,
    )


class _Checkpointed(torch.autograd.Function):
    """(what all steps share, phi, first W and states) -> (meta-loss, last W and states)."""

    @staticmethod
    def forward(ctx: Any, run: _Run, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        # Autograd keeps, and frees, what the unroll begins with; the run has what lies between.
        ctx.save_for_backward(*tensors)
        ctx.run = run
        return tuple(run.forth(tensors))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *ctx.run.back(ctx.saved_tensors, list(incoming))


class _Part(NamedTuple):
    """Steps whose gradient has not been taken yet."""

    problem: InnerProblem
    """Without history; its W and states are the checkpoint."""
    flags: list[bool]
    """Which of these a gradient is asked for."""
    random: list[Tensor]
    """Where the random numbers of these steps begin."""


class _Graph(NamedTuple):
    """Steps that were taken with their graph."""

    leaves: list[Tensor]
    """What they were taken from, in the order of `_Checkpointed`."""
    outputs: list[Tensor]
    """The meta-loss, last W and states."""

    def total(self, to_loss: Tensor | None, known: Gradients) -> Tensor | None:
        """A number with these gradients, see `_Run._through`; the outputs and `known` go."""
        meta_loss, *last = self.outputs
        tensors = [meta_loss, *self.leaves[: len(known) - len(last)], *last]
        pairs = [
            (gradient, tensor)
            for gradient, tensor in zip([to_loss, *known], tensors, strict=True)
            if gradient is not None and tensor.requires_grad
        ]
        self.outputs.clear()
        known.clear()
        with torch.enable_grad():
            given = [gradient for gradient, _ in pairs]
            return _Given.apply(given, *(tensor for _, tensor in pairs)) if pairs else None


class _Run:
    """An unroll on its way, forth and back."""

    def __init__(self, problem: InnerProblem, method: Method, segment: Segment) -> None:
        shared, moving = _shared(problem), _moving(problem)
        self.method = method
        self.phi = list(problem.rule.parameters())
        self.flags, flags = ([t.requires_grad for t in tensors] for tensors in (shared, moving))
        self.learns = any((*self.flags, *flags, *(tensor.requires_grad for tensor in self.phi)))
        self.generators = _Generators([*shared, *moving])
        self.autocast = _Autocast([*shared, *moving])
        with self.generators.forked():
            self.schedule = schedule_of(segment, _moved(problem, _copies(moving, flags)), method)
        self.scored_alone = scored_alone(segment, problem)
        empty = [[tensor.new_empty(0) for tensor in tensors] for tensors in (shared, moving)]
        problem = _sharing(_moved(problem, empty[1]), empty[0])
        self.whole = _Part(problem, flags, self.generators.states())
        self.waiting: list[_Part] = []
        self.graph: _Graph | None = None
        self.notes: list[Unrolled] = []

    def forth(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Take every step, the last ones with their graph.

        Args:
            tensors: those of `_Checkpointed`.

        Returns:
            The meta-loss, last W and states, without history.
        """
        shared, moving = tensors[: len(self.flags)], tensors[len(self.flags) + len(self.phi) :]
        problem = _sharing(
            _moved(self.whole.problem, [tensor.detach() for tensor in moving]),
            [tensor.detach() for tensor in shared],
        )
        part = self.whole._replace(problem=problem)
        if self.scored_alone and self.schedule.passed(problem.updates, 0, False):
            self.graph = self._take(self._pass_over_all(part))
        else:
            self.graph = self._descend(part, first=True)
        meta_loss = torch.stack([note.meta_loss for note in self.notes]).sum()
        return [meta_loss, *_moving(self.notes[-1])]

    def back(self, tensors: Sequence[Tensor], incoming: Gradients) -> Gradients:
        """Go back through every step.

        Args:
            tensors: what `forth` began with.
            incoming: gradients of what it gave.

        Returns:
            Gradients of the tensors.
        """
        to_loss, *moving = incoming
        found: Gradients = [*[None] * (len(tensors) - len(moving)), *moving]
        incoming.clear()
        moving.clear()
        with self.generators.forked(), self.autocast.as_it_was():
            if self.graph is None:  # this is not the first backward pass
                self.generators.set(self.whole.random)
                self.forth(tensors)
            while True:
                self.notes = []
                found = self._through(to_loss, found)
                if not self.waiting:
                    return found
                self.graph = self._descend(self.waiting.pop())

    def _descend(self, part: _Part, first: bool = False) -> _Graph:
        """Pass over what the schedule says, and take the graph of the rest."""
        while length := self.schedule.passed(part.problem.updates, len(self.waiting), first):
            part = self._pass_over(part, length)
        return self._take(part)

    def _pass_over_all(self, part: _Part) -> _Part:
        """Leave every update waiting, cut as in `_descend`; the batch that is only scored."""
        left = part.problem.updates
        while length := self.schedule.passed(left, len(self.waiting), False):
            part, left = self._pass_over(part, length), left - length
        return self._pass_over(part, left)

    def _pass_over(self, part: _Part, length: int) -> _Part:
        """Leave so many steps waiting; what comes after them."""
        passed = part.problem.part(0, length)
        self.waiting.append(part._replace(problem=passed))
        self.generators.set(part.random)
        taken = self.method(passed)
        self.notes.append(taken)
        after = replace(
            part.problem.part(length, len(part.problem.batches)),
            fast=taken.fast,
            rule_state=taken.rule_state,
            state=taken.state,
            truncated=False,
        )
        flags = [self.learns and tensor.is_floating_point() for tensor in _moving(taken)]
        return _Part(after, flags, self.generators.states())

    def _take(self, part: _Part) -> _Graph:
        """The graph of a part."""
        shared = _copies(_shared(part.problem), self.flags)
        moving = _copies(_moving(part.problem), part.flags)
        self.generators.set(part.random)
        with torch.enable_grad():
            result = self.method(_sharing(_moved(part.problem, moving), shared))
        outputs = [result.meta_loss, *_moving(result)]
        without = [output.detach() for output in outputs]
        self.notes.append(_moved(result._replace(meta_loss=without[0]), without[1:]))
        return _Graph([*shared, *self.phi, *moving], outputs)

    def _through(self, to_loss: Tensor | None, known: Gradients) -> Gradients:
        """Go back through the graph at hand. It goes meanwhile, and so does what is known.

        Args:
            to_loss: the gradient of the meta-loss.
            known: from later steps, in the order of the leaves: gradients of what all steps share,
                to be added to, and of the last W and states. Emptied.

        Returns:
            Gradients of the leaves.
        """
        assert self.graph is not None
        graph, self.graph = self.graph, None
        total = graph.total(to_loss, known)
        wanted = [leaf for leaf in graph.leaves if leaf.requires_grad]
        if total is None:
            return [None] * len(graph.leaves)
        found = iter(torch.autograd.grad(total, wanted, allow_unused=True))
        return [next(found) if leaf.requires_grad else None for leaf in graph.leaves]


class _Given(torch.autograd.Function):
    """A number whose gradients are given; they are handed on, so that nobody else holds them."""

    @staticmethod
    def forward(ctx: Any, gradients: Gradients, *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return tensors[0].new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients = tuple(ctx.gradients)
        ctx.gradients.clear()
        return None, *gradients


class _Generators:
    """Torch's random numbers on the CPU and on the CUDA devices of some tensors."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.devices = sorted({t.device.index for t in tensors if t.device.type == "cuda"})

    def states(self) -> list[Tensor]:
        """Where they stand."""
        on_devices = [torch.cuda.get_rng_state(device) for device in self.devices]
        return [torch.get_rng_state(), *on_devices]

    def set(self, states: list[Tensor]) -> None:
        """Go on from there."""
        torch.set_rng_state(states[0])
        for device, state in zip(self.devices, states[1:], strict=True):
            torch.cuda.set_rng_state(state, device)

    def forked(self) -> Any:
        """Inside, what is drawn does not count."""
        return torch.random.fork_rng(self.devices)


class _Autocast:
    """Which products are in which type, on the devices of some tensors, where it is made."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        kinds = {tensor.device.type for tensor in tensors}
        self.cached = torch.is_autocast_cache_enabled()
        self.found = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in sorted(kinds)
            if torch.amp.is_autocast_available(kind)
        ]

    @contextmanager
    def as_it_was(self) -> Iterator[None]:
        """Inside, products are as they were there."""
        with ExitStack() as stack:
            for kind, dtype, enabled in self.found:
                stack.enter_context(torch.autocast(kind, dtype, enabled, self.cached))
            yield


def _copies(tensors: Sequence[Tensor], flags: list[bool]) -> list[Tensor]:
    return [
        tensor.detach().requires_grad_(flag) for tensor, flag in zip(tensors, flags, strict=True)
    ]


def _shared(problem: InnerProblem) -> list[Tensor]:
    """What all steps share, phi left out."""
    return tree.tensors((problem.slow, problem.rest, problem.coefficients))


def _sharing(problem: InnerProblem, tensors: list[Tensor]) -> InnerProblem:
    """The problem with these as its `_shared`."""
    found = tree.replace((problem.slow, problem.rest, problem.coefficients), tensors)
    slow, rest, coefficients = found
    return replace(problem, slow=slow, rest=rest, coefficients=coefficients)


def _moving(steps: InnerProblem | Unrolled) -> list[Tensor]:
    """W and the states, of the first step or after the last one."""
    return tree.tensors((steps.fast, steps.rule_state, steps.state))


def _moved(steps: Any, tensors: list[Tensor]) -> Any:
    """The same with these as its `_moving`."""
    fast, rule_state, state = tree.replace((steps.fast, steps.rule_state, steps.state), tensors)
    if isinstance(steps, Unrolled):
        return steps._replace(fast=fast, rule_state=rule_state, state=state)
    return replace(steps, fast=fast, rule_state=rule_state, state=state)
