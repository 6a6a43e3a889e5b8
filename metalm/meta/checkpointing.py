"""Checkpointed segments: keep every k-th W and state, recompute the steps between in the backward.

Of T steps, T/k checkpoints and what one segment of k keeps are held; `segment_length.py` has the k
that makes this least. The last segment is not recomputed: the backward pass begins with it, so its
graph may as well stay. The recomputation repeats the same numbers, random ones included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from metalm.meta import tree
from metalm.meta.inner_problem import InnerProblem, Unrolled
from metalm.meta.segment_length import Scales, Segment, check_segment

Method = Callable[[InnerProblem], Unrolled]


def run_segments(problem: InnerProblem, method: Method, segment: Segment) -> Unrolled:
    """Run the steps in segments, each but the last recomputed when its gradient is asked for.

    A last batch that is only scored is a segment of its own: its graph goes before another comes.

    Raises:
        ValueError: A segment that there cannot be, or a budget that is too small.
    """
    check_segment(segment)
    scales = None if isinstance(segment, int) else Scales()
    length = segment if isinstance(segment, int) else 1
    steps = len(problem.batches)
    updates = steps if problem.update_last else steps - 1
    parts: list[Unrolled] = []
    start = 0
    while start < steps:
        if scales is not None and start == 1 and updates > 1:
            length = scales.length(segment, updates - 1)
        stop = steps if start >= updates else min(start + length, updates)
        if stop == updates and (start == 0 or (scales is not None and start == 1)):
            stop = steps  # one segment holds everything
        part = problem.part(start, stop)
        if stop == steps:
            taken = method(part)
        else:
            taken = _run(part, method, scales if start == 0 else None)
        parts.append(taken)
        problem = replace(
            problem,
            fast=taken.fast,
            rule_state=taken.rule_state,
            state=taken.state,
            truncated=False,
        )
        start = stop
    return parts[-1]._replace(
        meta_loss=torch.stack([part.meta_loss for part in parts]).sum(),
        losses=torch.cat([part.losses for part in parts]),
        aux=[aux for part in parts for aux in part.aux],
    )


def _run(problem: InnerProblem, method: Method, scales: Scales | None) -> Unrolled:
    """One segment; scales weigh what it would keep."""
    kept = _Kept(problem, method, scales)
    outputs = _Segment.apply(kept, *kept.inputs, *problem.rule.parameters())
    assert kept.result is not None
    return _with_outputs(kept.result, list(outputs))


class _Kept:
    """What a segment is recomputed from, beside the tensors that autograd sees."""

    def __init__(self, problem: InnerProblem, method: Method, scales: Scales | None) -> None:
        self.problem, self.method, self.scales = problem, method, scales
        self.inputs = tree.tensors(_differentiable(problem))
        self.result: Unrolled | None = None


class _Segment(torch.autograd.Function):
    """(all differentiable fields of the problem, phi) -> (meta-loss, last W, last states)."""

    @staticmethod
    def forward(ctx: Any, kept: _Kept, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        # The tensors are kept by autograd, which frees them; the rest of the problem is small.
        num = len(kept.inputs)
        ctx.num, ctx.method = num, kept.method
        ctx.flags = [tensor.requires_grad for tensor in kept.inputs]
        ctx.save_for_backward(*tensors)
        ctx.problem = _with_inputs(kept.problem, [tensor.new_empty(0) for tensor in kept.inputs])
        ctx.random = _random_states(tensors)
        if kept.scales is None:
            detached = [tensor.detach() for tensor in kept.inputs]
            kept.result = kept.method(_with_inputs(kept.problem, detached))
        else:
            copies = _copies(kept.inputs, ctx.flags)
            kept.result = kept.scales.weigh(_with_inputs(kept.problem, copies), kept.method)
        return tuple(tree.tensors(_outputs(kept.result)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        inputs = _copies(saved[: ctx.num], ctx.flags)
        devices = [device for device, _ in ctx.random if device is not None]
        with torch.random.fork_rng(devices), torch.enable_grad():
            _set_random_states(ctx.random)
            result = ctx.method(_with_inputs(ctx.problem, inputs))
            outputs = tree.tensors(_outputs(result))
        wanted = [*inputs, *saved[ctx.num :]]
        asked = [
            (output, gradient)
            for output, gradient in zip(outputs, incoming, strict=True)
            if gradient is not None and output.requires_grad
        ]
        reached = iter(
            torch.autograd.grad(
                [output for output, _ in asked],
                [tensor for tensor in wanted if tensor.requires_grad],
                [gradient for _, gradient in asked],
                allow_unused=True,
            )
            if asked
            else [None] * sum(tensor.requires_grad for tensor in wanted)
        )
        return None, *(next(reached) if tensor.requires_grad else None for tensor in wanted)


def _copies(tensors: Sequence[Tensor], flags: list[bool]) -> list[Tensor]:
    return [
        tensor.detach().requires_grad_(flag) for tensor, flag in zip(tensors, flags, strict=True)
    ]


def _differentiable(problem: InnerProblem) -> tuple[Any, ...]:
    return (
        problem.slow,
        problem.rest,
        problem.fast,
        problem.rule_state,
        problem.coefficients,
        problem.state,
    )


def _with_inputs(problem: InnerProblem, tensors: list[Tensor]) -> InnerProblem:
    fields = ("slow", "rest", "fast", "rule_state", "coefficients", "state")
    values = tree.replace(_differentiable(problem), tensors)
    return replace(problem, **dict(zip(fields, values, strict=True)))


def _outputs(result: Unrolled) -> tuple[Any, ...]:
    return result.meta_loss, result.fast, result.rule_state, result.state


def _with_outputs(result: Unrolled, tensors: list[Tensor]) -> Unrolled:
    fields = ("meta_loss", "fast", "rule_state", "state")
    values = tree.replace(_outputs(result), tensors)
    return result._replace(**dict(zip(fields, values, strict=True)))


RandomStates = list[tuple[int | None, Tensor]]


def _random_states(tensors: tuple[Tensor, ...]) -> RandomStates:
    """The state of torch's generators on the CPU (None) and on each CUDA device of the tensors."""
    cuda = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
    states: RandomStates = [(None, torch.get_rng_state())]
    return states + [(index, torch.cuda.get_rng_state(index)) for index in cuda]


def _set_random_states(states: RandomStates) -> None:
    for device, state in states:
        if device is None:
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)
