"""First order in forward mode: what phi changes is carried beside W, from first step to last.

For W <- W - s g + rho (W_0 - W) with g_t held constant, D = W - W_0 and keep = 1 - rho, for each
coordinate of each row, from where the row began at W_0:

    dW_t/d log s = D_t                                     D is linear in s
    T_t = dW_t/d rho         T_{t+1} = keep T_t - D_t      T = 0 at the start
    dJ/ds   = (1/s) sum_t w_t g_t D_t         dJ/drho = sum_t w_t g_t T_t
    dJ/dW_0 = sum_t w_t g_t                                D moves along with W_0

So W itself and one trace T are all that is carried. Memory does not depend on the number of
updates, nothing is truncated, and the traces go on from unroll to unroll. Where s and rho change on
the way, as in training, these are the derivatives to changing log s and rho by the same amount at
every step of the past.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metalm.meta.attach import attach
from metalm.meta.elementwise_step import as_tensor, kernels_for, memory_like
from metalm.meta.inner_problem import InnerProblem, Unrolled, inner_step, weighted_sum
from metalm.meta.kernels.step_gradients import TraceSums
from metalm.meta.parameters import Parameters
from metalm.meta.step_rule import AbstractStepRule
from metalm.meta.update_rule import AbstractUpdateRule


def initial_traces(rule: AbstractUpdateRule, fast: Parameters) -> Parameters:
    """The traces T of rows that begin at W_0: zeros, for each tensor whose decay is learned.

    Args:
        rule: Whose decays are traced.
        fast: Fast weights, equal to W_0 in every row.

    Raises:
        ValueError: A rule without forward mode.
    """
    with torch.enable_grad():
        decays = with_forward_mode(rule).coefficients().decays
    return {
        name: memory_like(weight).zero_() for name, weight in fast.items() if _leads(decays[name])
    }


def with_forward_mode(rule: AbstractUpdateRule) -> AbstractStepRule:
    """The rule itself.

    Raises:
        ValueError: It does not have the form that forward mode rests on.
    """
    if not isinstance(rule, AbstractStepRule):
        raise ValueError(
            "no forward mode of this rule; expected W <- W - s g + rho (W_0 - W), a rule under "
            f"AbstractStepRule, found {type(rule).__name__}; do use mode='reverse'"
        )
    return rule


def traced_steps(problem: InnerProblem) -> Unrolled:
    """Forward mode for a rule that is an `AbstractStepRule`."""
    tensors = _traced_tensors(problem)
    fast = {name: tensor.weight for name, tensor in tensors.items()}
    shared, state = problem.shared(), problem.state
    gradients = {name: torch.zeros_like(tensor) for name, tensor in shared.items()}
    losses, aux = [], []
    for batch, weight in zip(problem.batches, problem.weights, strict=True):
        taken = inner_step(problem, fast, shared, batch, state)
        losses.append(taken.losses)
        aux.append(taken.aux)
        state = taken.state
        for name, total in gradients.items():
            total.add_(taken.counted[name], alpha=weight)
        for name, tensor in tensors.items():
            tensor.step(taken.gradients[name], weight)
    copies = dict(shared)
    for name, tensor in tensors.items():
        for kind, (copy, gradient) in tensor.found().items():
            copies[f"{kind} of {name}"], gradients[f"{kind} of {name}"] = copy, gradient
    stacked = torch.stack(losses)
    return Unrolled(
        attach(weighted_sum(stacked, problem.weights), gradients, copies),
        stacked,
        aux,
        fast,
        problem.rule_state,
        state,
        {name: tensor.trace for name, tensor in tensors.items() if tensor.trace is not None},
    )


def _traced_tensors(problem: InnerProblem) -> dict[str, _TracedTensor]:
    """Each fast tensor with memory of its own for W and T, or the caller's where it may be."""
    rates, decays = problem.coefficients
    traced = {}
    for name, weight in problem.fast.items():
        slow = problem.slow[name]
        rate = as_tensor(rates[name], slow)
        decay = None if (share := decays[name]) is None else as_tensor(share, slow)
        _check_rate(name, rate)
        trace = _trace_of(problem, name) if _leads(decay) else None
        if not problem.overwrite:
            weight = memory_like(weight).copy_(weight.detach())
            trace = None if trace is None else memory_like(trace).copy_(trace)
        traced[name] = _TracedTensor(weight, trace, slow, rate, decay)
    return traced


class _TracedTensor:
    """One fast tensor, its trace, and the sums that become its gradients."""

    def __init__(
        self, weight: Tensor, trace: Tensor | None, slow: Tensor, rate: Tensor, decay: Tensor | None
    ) -> None:
        self.weight, self.trace = weight, trace
        self.slow, self.rate, self.decay = slow, rate, decay
        self.sums = TraceSums(
            *(memory_like(slow).zero_() if _leads(leaf) else None for leaf in (rate, decay, slow))
        )

    @torch.no_grad()
    def step(self, gradient: Tensor, share: float) -> None:
        """Count w_t g_t, then move T and W on."""
        kernels = kernels_for(self.weight if self.trace is None else self.trace)
        kernels.write_traced_step(
            self.weight, gradient, self.slow, self.rate, self.decay, self.trace, self.sums, share
        )

    @torch.no_grad()
    def found(self) -> dict[str, tuple[Tensor, Tensor]]:
        """What dJ leads to, each with its gradient."""
        to_rate, to_decay, to_slow = self.sums
        pairs = {}
        if to_rate is not None:
            pairs["rate"] = self.rate, to_rate.sum_to_size(self.rate.shape) / self.rate
        if to_decay is not None and self.decay is not None:
            pairs["decay"] = self.decay, to_decay.sum_to_size(self.decay.shape)
        if to_slow is not None:
            pairs["slow weights"] = self.slow, to_slow
        return pairs


def _leads(tensor: object) -> bool:
    """Whether a gradient goes on from here."""
    return isinstance(tensor, Tensor) and tensor.requires_grad


def _trace_of(problem: InnerProblem, name: str) -> Tensor:
    if problem.traces is None:
        return memory_like(problem.fast[name]).zero_()
    if name not in problem.traces:
        raise ValueError(
            f"no trace of {name!r}, whose decay is learned; expected one for each learned decay, "
            f"found {', '.join(problem.traces) or 'none'}; do make them with initial_traces()"
        )
    return problem.traces[name]


def _check_rate(name: str, rate: Tensor) -> None:
    if rate.is_cuda and torch.cuda.is_current_stream_capturing():
        return  # nothing can be asked there; the same was done before, as it stands
    if _leads(rate) and not bool(rate.all()):
        raise ValueError(
            f"a learned rate of {name!r} is zero; expected every rate of a rule in forward mode to "
            "differ from 0, since dW/ds = (W - W_0)/s; do learn its logarithm, or use "
            "mode='reverse'"
        )
