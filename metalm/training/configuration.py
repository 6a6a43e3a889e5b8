"""From stored JSON back to configuration dataclasses."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

Configuration = TypeVar("Configuration")


def from_json(kind: type[Configuration], value: Mapping[str, Any], path: str = "") -> Configuration:
    """Builds a (nested) dataclass from the JSON that `dataclasses.asdict` gave.

    Raises:
        ValueError: a setting that the dataclass does not have, and the message lists those it has;
            or something that is no settings, or of a type that a setting cannot have.
    """
    if not isinstance(value, Mapping):
        raise ValueError(
            f"{path.rstrip('.') or 'the configuration'} is damaged; expected settings by name, "
            f"found {value!r}; restore the file"
        )
    hints = typing.get_type_hints(kind)
    fields = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(value.keys() - fields)
    if unknown:
        raise ValueError(
            f"unknown setting {path}{unknown[0]}; expected {', '.join(sorted(fields))}; the run "
            "was made by another version of metalm"
        )
    built: dict[str, Any] = {}
    for name, item in value.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            built[name] = from_json(hint, item, f"{path}{name}.")
        elif isinstance(item, list):
            built[name] = tuple(item)
        else:
            built[name] = item
    try:
        return kind(**built)
    except TypeError as error:
        raise ValueError(
            f"{path.rstrip('.') or 'the configuration'} is damaged; expected "
            f"{', '.join(sorted(fields))}, found '{error}'; restore the file"
        ) from error
