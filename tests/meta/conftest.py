"""A small non-linear problem with fast weights of every number of dimensions, in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class Tiny(NamedTuple):
    """Fast and other weights, batches, and the loss over rows of fast weights."""

    slow: dict[str, Tensor]
    rest: dict[str, Tensor]
    rms: dict[str, Tensor]
    batches: list[tuple[Tensor, Tensor]]
    rows: int

    def start(self) -> dict[str, Tensor]:
        """Fast weights of every row, away from W_0."""
        generator = torch.Generator().manual_seed(5)
        return {
            name: weight.detach() + 0.1 * _normal((self.rows, *weight.shape), generator)
            for name, weight in self.slow.items()
        }

    @staticmethod
    def loss(parameters: dict[str, Tensor], batch: Any, state: Tensor) -> Any:
        """Squared errors [rows] of a tanh network; the state is the mean of its features."""
        inputs, targets = batch
        into, out = (parameters[name] for name in ("in.weight", "out.weight"))
        hidden = torch.tanh(inputs @ into.reshape(-1, *into.shape[-2:]).mT) + state[:, None, :]
        output = hidden @ out.reshape(-1, *out.shape[-2:]).mT * parameters["out.gain"]
        output = output + parameters["out.bias"].reshape(-1, 1, out.shape[-2])
        output = output * parameters["scale"].reshape(-1, 1, 1)
        errors = (output - targets).square().mean((1, 2))
        return errors, errors + 0, 0.5 * hidden.mean(1)


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def tiny() -> Tiny:
    generator = torch.Generator().manual_seed(3)
    rows, length, num_in, num_hidden, num_out = 3, 6, 4, 5, 2
    slow = {
        "in.weight": _normal((num_hidden, num_in), generator) / 2,
        "out.weight": _normal((num_out, num_hidden), generator) / 2,
        "out.bias": _normal((num_out,), generator),
        "scale": torch.tensor(1.1, dtype=torch.float64),
    }
    rest = {"out.gain": 1 + _normal((num_out,), generator) / 5}
    rms = {name: _normal(weight.shape, generator).abs() + 0.05 for name, weight in slow.items()}
    batches = [
        (
            _normal((rows, length, num_in), generator),
            _normal((rows, length, num_out), generator),
        )
        for _ in range(5)
    ]
    for weight in (*slow.values(), *rest.values()):
        weight.requires_grad_()
    return Tiny(slow, rest, rms, batches, rows)


@pytest.fixture
def state(tiny: Tiny) -> Tensor:
    """The loss's first state, [rows, hidden]."""
    return torch.zeros(tiny.rows, 5, dtype=torch.float64)


class LiveBytes:
    """Bytes of weights and inner gradients that are alive, however autograd holds them."""

    def __init__(self) -> None:
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def note(self, tensor) -> None:
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        self.storages[reference.cdata] = (reference, storage.nbytes())

    def count(self) -> int:
        self.storages = {k: v for k, v in self.storages.items() if not v[0].expired()}
        live = sum(size for _, size in self.storages.values())
        self.peak = max(self.peak, live)
        return live

    def watch(self, loss):
        """The loss, with its weights and their gradients noted."""

        def watched(parameters, batch, state):
            for leaf in parameters.values():
                self.note(leaf)
                if leaf.requires_grad:
                    leaf.register_hook(self.note)
            self.count()
            return loss(parameters, batch, state)

        return watched


@pytest.fixture
def live_bytes() -> type[LiveBytes]:
    return LiveBytes
