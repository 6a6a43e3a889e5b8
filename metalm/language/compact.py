"""A model and its rule as tensors for one file: exact, or in half the memory and less.

The compact form keeps the model in bfloat16, and what the rule has learned in float32 unless it is
as large as a weight. The gradient statistics, as large as the fast weights, take 4 bits a
coordinate: sixteen steps of the logarithm between the lowest and the highest of each row. They set
rates, and are damped by an eps of the order of their mean, so that a few per cent do not matter.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

_LEVELS = 16
# Below this share of the mean RMS no rule feels a difference.
_LOWEST = 1e-3
# What is larger is no list of rates by row any more.
_LARGE = 65536
_STEPS, _RANGE = ":steps", ":range"


def exact(model: nn.Module, rule: nn.Module) -> dict[str, Tensor]:
    """Every number as it is; tied weights once."""
    return _named("model", _without_ties(model)) | _named("rule", dict(rule.state_dict()))


def compact(model: nn.Module, rule: nn.Module) -> dict[str, Tensor]:
    """The same numbers, rounded; `restore` understands both."""
    tensors = {
        name: tensor.to(torch.bfloat16)
        for name, tensor in _named("model", _without_ties(model)).items()
    }
    for name, tensor in _named("rule", dict(rule.state_dict())).items():
        if _is_relative(name):
            continue  # follows from the statistics
        if _is_statistic(name) and tensor.dim() > 1:
            tensors |= _in_steps(name, tensor)
        else:
            tensors[name] = tensor.to(torch.bfloat16) if tensor.numel() > _LARGE else tensor
    return tensors


def restore(model: nn.Module, rule: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts saved tensors into a model and a rule of the same form, in their own precision.

    Raises:
        ValueError: a tensor is missing, is of another shape, or belongs nowhere; named.
    """
    found = dict(tensors)
    for name in [name for name in found if name.endswith(_STEPS)]:
        name = name.removesuffix(_STEPS)
        statistic = rule.state_dict().get(name.removeprefix("rule."))
        if statistic is not None and name + _RANGE in found:
            steps, limits = found.pop(name + _STEPS), found.pop(name + _RANGE)
            found[name] = _from_steps(name, steps, limits, statistic.shape)
    relative = {name for name in _named("rule", dict(rule.state_dict())) if _is_relative(name)}
    if relative and not relative & found.keys():
        found |= _relative(found, relative)
    expected = _named("model", _without_ties(model)) | _named("rule", dict(rule.state_dict()))
    for name in sorted(expected.keys() | found.keys()):
        wanted = tuple(expected[name].shape) if name in expected else "nothing"
        given = tuple(found[name].shape) if name in found else "nothing"
        if wanted != given:
            raise ValueError(f"expected {name} of shape {wanted}, found {given}")
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(found[name])


def _without_ties(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _named(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{part}.{name}": tensor.detach() for name, tensor in tensors.items()}


def _is_statistic(name: str) -> bool:
    return name.rpartition(".")[2].startswith("rms/")


def _is_relative(name: str) -> bool:
    return name.rpartition(".")[2].startswith("relative_rms/")


def _relative(found: Mapping[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    """RMS over the mean over tensors of each one's mean, as rules work it out."""
    statistics = {name: tensor for name, tensor in found.items() if _is_statistic(name)}
    mean = torch.stack([tensor.mean() for tensor in statistics.values()]).mean()
    sources = {name: name.replace("relative_rms/", "rms/") for name in names}
    return {
        name: statistics[source] / mean for name, source in sources.items() if source in statistics
    }


def _in_steps(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Two steps a byte, [rows, columns / 2], and for each row the lowest logarithm and the step."""
    flat = tensor.float().flatten(1)
    logarithms = flat.clamp(min=max(_LOWEST * float(flat.mean()), 1e-30)).log()
    lowest, highest = logarithms.amin(1), logarithms.amax(1)
    step = (highest - lowest) / (_LEVELS - 1)
    places = (logarithms - lowest[:, None]) / step.clamp(min=1e-30)[:, None]
    levels = places.round().clamp(0, _LEVELS - 1).to(torch.uint8)
    if levels.shape[1] % 2:
        levels = nn.functional.pad(levels, (0, 1))
    packed = levels[:, ::2] * _LEVELS + levels[:, 1::2]
    return {name + _STEPS: packed, name + _RANGE: torch.stack((lowest, step), 1)}


def _from_steps(name: str, steps: Tensor, limits: Tensor, shape: torch.Size) -> Tensor:
    rows, columns = shape[0], shape[1:].numel()
    if steps.shape != (rows, (columns + 1) // 2) or limits.shape != (rows, 2):
        raise ValueError(
            f"expected {name} for the shape {tuple(shape)}, found steps of shape "
            f"{tuple(steps.shape)} and ranges of shape {tuple(limits.shape)}"
        )
    levels = torch.stack((steps // _LEVELS, steps % _LEVELS), 2).flatten(1)[:, :columns]
    lowest, step = limits.float().unbind(1)
    return (lowest[:, None] + levels * step[:, None]).exp().view(shape)
