"""The linear recurrence y_t = a_t + l_t y_{t-1}, elementwise, forth or back in time.

It is all that a quasi-recurrent layer computes in sequence. The gradient of a scan is a scan the
other way, so the one operation here is as often differentiable as one likes:

    y_{t+1} = a_{t+1} + l_t y_t  (forth)      u_t = dy_t + l_t u_{t+1}        dl_t = u_{t+1} y_t
    y_t = a_t + l_t y_{t+1}      (back)       u_{t+1} = dy_{t+1} + l_t u_t    dl_t = u_t y_{t+1}

and da = u in both. On a CPU it is a loop over time; elsewhere, where each step would be a kernel of
its own, log2(time) steps of doubled reach (Hillis and Steele 1986).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def scan(links: Tensor, values: Tensor) -> Tensor:
    """y_0 = a_0 and y_{t+1} = a_{t+1} + l_t y_t.

    Args:
        links: l, [time - 1, ...].
        values: a, [time, ...].

    Returns:
        y, [time, ...]; differentiable any number of times.
    """
    found: Tensor = _Scan.apply(links, values, False)
    return found


class _Scan(torch.autograd.Function):
    """(l, a, whether back in time) -> y."""

    @staticmethod
    def forward(ctx: Any, links: Tensor, values: Tensor, back: bool) -> Tensor:
        walk = by_steps if values.device.type == "cpu" else by_doubling
        found = walk(links.flip(0), values.flip(0)).flip(0) if back else walk(links, values)
        ctx.back = back
        ctx.save_for_backward(links, found)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        links, found = ctx.saved_tensors
        to_values = _Scan.apply(links, gradient, not ctx.back)
        if ctx.back:
            return to_values[:-1] * found[1:], to_values, None
        return to_values[1:] * found[:-1], to_values, None


def by_steps(links: Tensor, values: Tensor) -> Tensor:
    """The scan as a loop over time."""
    found = values.clone(memory_format=torch.contiguous_format)
    for step, link in enumerate(links):
        found[step + 1].addcmul_(link, found[step])
    return found


def by_doubling(links: Tensor, values: Tensor) -> Tensor:
    """The scan in log2(time) steps: after each, y_t holds twice as many terms."""
    found = values.clone(memory_format=torch.contiguous_format)
    reach = links.clone(memory_format=torch.contiguous_format)  # reach[t] ties y_t to y_{t + 1}
    shift = 1
    while shift < len(values):
        # reach[t] is the product of the links from t to t + shift.
        found = torch.cat((found[:shift], torch.addcmul(found[shift:], reach, found[:-shift])))
        reach = reach[shift:] * reach[:-shift]
        shift *= 2
    return found
