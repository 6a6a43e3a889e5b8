"""Normalised, rectified and pooled maps on a CPU, forth, back and twice back.

One channel after the other: its maps of all items fit into the L2 cache, so that the means, and
what they are used for, read main memory once. With x a channel's numbers, M of them, mu their mean
and r = (variance + eps)^(-1/2):

    n = (x - mu) r        y = max(0, largest of gamma n + beta in a window)

*Places* say which number of its window each y is (0 to 3, row by row; the first of equal ones), or
that it is zero (4). G is y's gradient brought back to these places, u the gradient of the gradient
of x, and v and w those of the gradients of gamma and beta; sums run over the channel:

    dx = gamma r (G - sum G / M - n sum Gn / M)      dgamma = sum Gn      dbeta = sum G

    back to G:      k u + n (v - k sum un / M) + w - k sum u / M,   k = gamma r
    back to gamma:  r A,   A = sum uG - (sum G sum u + sum Gn sum un) / M
    back to x:      r (E - sum E / M - n sum En / M) - k A r n / M
                    with E = v G - k (G sum un + u sum Gn) / M

Where mean and variance are given and not taken from x, 1 / M is 0 in all of them. Compiled by numba
when first called, and kept on disk.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

# The place of a maximum that was not above zero.
DEAD = 4


def _compiled(*relaxed: str) -> Any:
    """A decorator; "reassoc" lets sums be vectorised."""
    options: dict[str, Any] = {
        "nogil": True,
        "fastmath": {"contract", *relaxed},
        "error_model": "numpy",
    }

    def compiled(function: Any) -> Any:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # there is no folder that the cache may be written to
            return njit(**options)(function)

    return compiled


# ---- one map ----


@_compiled("reassoc")
def _sum(x: Any) -> Any:
    total = x.dtype.type(0)
    for i in range(x.size):
        total += x[i]
    return total


@_compiled("reassoc")
def _squares(x: Any, mean: Any) -> Any:
    total = x.dtype.type(0)
    for i in range(x.size):
        away = x[i] - mean
        total += away * away
    return total


@_compiled("reassoc")
def _products(x: Any, mean: Any, g: Any) -> Any:
    """Sums of g and of g (x - mean)."""
    total, product = x.dtype.type(0), x.dtype.type(0)
    for i in range(x.size):
        total += g[i]
        product += g[i] * (x[i] - mean)
    return total, product


@_compiled("reassoc")
def _inner(g: Any, u: Any) -> Any:
    total = g.dtype.type(0)
    for i in range(g.size):
        total += g[i] * u[i]
    return total


@_compiled()
def _write_maxima(x: Any, width: Any, window: Any, a: Any, b: Any, y: Any, places: Any) -> None:
    """Y of a x + b, and the places."""
    zero = y.dtype.type(0)
    if window == 1:
        for i in range(y.size):
            value = a * x[i] + b
            dead = value <= 0
            y[i] = zero if dead else value
            places[i] = np.uint8(DEAD) if dead else np.uint8(0)
        return
    columns = width // 2
    for row in range(y.size // columns):
        upper, out = 2 * row * width, row * columns
        lower = upper + width
        for i in range(columns):
            best, place = a * x[upper + 2 * i] + b, np.uint8(0)
            value = a * x[upper + 2 * i + 1] + b
            if value > best:
                best, place = value, np.uint8(1)
            value = a * x[lower + 2 * i] + b
            if value > best:
                best, place = value, np.uint8(2)
            value = a * x[lower + 2 * i + 1] + b
            if value > best:
                best, place = value, np.uint8(3)
            if best <= 0:
                best, place = zero, np.uint8(DEAD)
            y[out + i], places[out + i] = best, place


@_compiled()
def _write_at_places(values: Any, places: Any, width: Any, window: Any, out: Any) -> None:
    """Each value at its place, zeros elsewhere."""
    zero = out.dtype.type(0)
    if window == 1:
        for i in range(out.size):
            out[i] = values[i] if places[i] < DEAD else zero
        return
    out[:] = zero
    columns = width // 2
    for row in range(values.size // columns):
        first, at = 2 * row * width, row * columns
        for i in range(columns):
            place = places[at + i]
            corner = first + 2 * i + (place & 1) + width * ((place >> 1) & 1)
            out[corner] = values[at + i] if place < DEAD else zero


@_compiled()
def _write_from_places(
    x: Any, u: Any, places: Any, width: Any, window: Any, a: Any, b: Any, k: Any, out: Any
) -> None:
    """A x + b + k u at each place; zero where there is none."""
    zero = out.dtype.type(0)
    columns = width // window
    for row in range(out.size // columns):
        first, at = window * row * width, row * columns
        for i in range(columns):
            place = places[at + i]
            corner = first + window * i + (place & 1) + width * ((place >> 1) & 1)
            value = a * x[corner] + b + k * u[corner]
            out[at + i] = value if place < DEAD else zero


@_compiled()
def _combine(out: Any, x: Any, a: Any, b: Any, k: Any) -> None:
    for i in range(out.size):
        out[i] = a * x[i] + b + k * out[i]


@_compiled()
def _combine_with(out: Any, x: Any, u: Any, a: Any, b: Any, k: Any, share: Any) -> None:
    for i in range(out.size):
        out[i] = a * x[i] + b + k * out[i] + share * u[i]


# ---- channels, from the start-th to before the stop-th of all tasks ----
#
# x, dx and u are [tasks, items, channels, numbers of a map]; y, its gradient and the places
# likewise; what belongs to a channel is [tasks, channels], in float64 where it is passed on.


@_compiled()
def write_moments(x: Any, mean: Any, variance: Any, start: Any, stop: Any) -> None:
    """Mean and variance (divided by M) of the channels; those of the maps are put together."""
    _, items, channels, size = x.shape
    for channel in range(start, stop):
        task, c = channel // channels, channel % channels
        middle, squares = 0.0, 0.0
        for item in range(items):
            own = np.float64(_sum(x[task, item, c])) / size
            away = own - middle
            squares += _squares(x[task, item, c], x.dtype.type(own))
            squares += away * away * size * item / (item + 1)
            middle += away / (item + 1)
        mean[task, c], variance[task, c] = middle, squares / (items * size)


@_compiled()
def write_maps(
    x: Any,
    width: Any,
    window: Any,
    gamma: Any,
    beta: Any,
    mean: Any,
    variance: Any,
    given: Any,
    eps: Any,
    root: Any,
    y: Any,
    places: Any,
    start: Any,
    stop: Any,
) -> None:
    """Y, its places and r (into ``root``); mean and variance, too, unless they are given."""
    _, items, channels, _ = x.shape
    for channel in range(start, stop):
        task, c = channel // channels, channel % channels
        if not given:
            write_moments(x, mean, variance, channel, channel + 1)
        r = 1 / np.sqrt(variance[task, c] + eps)
        root[task, c] = r
        a = gamma[task, c] * r
        b = beta[task, c] - a * mean[task, c]
        a, b = x.dtype.type(a), x.dtype.type(b)
        for item in range(items):
            _write_maxima(
                x[task, item, c], width, window, a, b, y[task, item, c], places[task, item, c]
            )


@_compiled()
def write_gradients(
    x: Any,
    width: Any,
    window: Any,
    incoming: Any,
    places: Any,
    gamma: Any,
    mean: Any,
    root: Any,
    share: Any,
    to_x: Any,
    to_gamma: Any,
    to_beta: Any,
    start: Any,
    stop: Any,
) -> None:
    """Dx, dgamma and dbeta; share is 1 / M or 0."""
    _, items, channels, _ = x.shape
    number = x.dtype.type
    for channel in range(start, stop):
        task, c = channel // channels, channel % channels
        mu, r = mean[task, c], root[task, c]
        sum_g, sum_gn = 0.0, 0.0
        for item in range(items):
            back = to_x[task, item, c]
            _write_at_places(incoming[task, item, c], places[task, item, c], width, window, back)
            total, product = _products(x[task, item, c], number(mu), back)
            sum_g += total
            sum_gn += product * r
        to_gamma[task, c], to_beta[task, c] = sum_gn, sum_g
        k = gamma[task, c] * r
        a = -k * share * r * sum_gn
        b = -k * share * sum_g - a * mu
        for item in range(items):
            _combine(to_x[task, item, c], x[task, item, c], number(a), number(b), number(k))


@_compiled()
def write_second(
    x: Any,
    width: Any,
    window: Any,
    incoming: Any,
    places: Any,
    gamma: Any,
    mean: Any,
    root: Any,
    share: Any,
    u: Any,
    of_gamma: Any,
    of_beta: Any,
    to_x: Any,
    to_incoming: Any,
    to_gamma: Any,
    start: Any,
    stop: Any,
) -> None:
    """Back from u, v (``of_gamma``) and w (``of_beta``) to x, y's gradient and gamma."""
    _, items, channels, _ = x.shape
    number = x.dtype.type
    for channel in range(start, stop):
        task, c = channel // channels, channel % channels
        mu, r = mean[task, c], root[task, c]
        k, v, w = gamma[task, c] * r, of_gamma[task, c], of_beta[task, c]
        sum_g, sum_gn, sum_u, sum_un, sum_ug = 0.0, 0.0, 0.0, 0.0, 0.0
        for item in range(items):
            back = to_x[task, item, c]
            _write_at_places(incoming[task, item, c], places[task, item, c], width, window, back)
            total, product = _products(x[task, item, c], number(mu), back)
            sum_g += total
            sum_gn += product * r
            total, product = _products(x[task, item, c], number(mu), u[task, item, c])
            sum_u += total
            sum_un += product * r
            sum_ug += _inner(back, u[task, item, c])
        whole = sum_ug - share * (sum_g * sum_u + sum_gn * sum_un)
        to_gamma[task, c] = r * whole
        # E = of_g G + of_u u; what is subtracted from it is linear in n.
        of_g, of_u = v - k * share * sum_un, -k * share * sum_gn
        sum_e = of_g * sum_g + of_u * sum_u
        sum_en = of_g * sum_gn + of_u * sum_un
        a = -share * r * r * (sum_en + k * whole)
        b = -share * r * sum_e - a * mu
        slope = r * (v - k * share * sum_un)
        level = w - k * share * sum_u - slope * mu
        for item in range(items):
            own, other = x[task, item, c], u[task, item, c]
            _write_from_places(
                own,
                other,
                places[task, item, c],
                width,
                window,
                number(slope),
                number(level),
                number(k),
                to_incoming[task, item, c],
            )
            _combine_with(
                to_x[task, item, c],
                own,
                other,
                number(a),
                number(b),
                number(r * of_g),
                number(r * of_u),
            )
