"""A function that is compiled once it has been called often.

`torch.compile` takes seconds to a minute for a function; a text of a few pages is read before that.
A long training or evaluation calls the function many thousand times and earns it back.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

Found = TypeVar("Found")

CALLS = 200
"""After so many calls a function counts as called often."""
VARIANTS = 64
"""Of one function, for its lengths, shapes and types; torch's own limit is 8, and then it stops."""

_log = logging.getLogger(__name__)


class OftenCalled(Generic[Found]):
    """A function that is compiled after a number of calls, and stays as it is if that fails.

    Args:
        function: a pure function of tensors.
        calls: that come before.
        backend: of `torch.compile`.
    """

    def __init__(
        self, function: Callable[..., Found], calls: int = CALLS, backend: Any = "inductor"
    ) -> None:
        self.function, self.backend = function, backend
        self._calls_left = calls
        self._compiled: Callable[..., Found] | None = None
        self._failed = False

    def __call__(self, *arguments: Any) -> Found:
        """What the function gives, compiled or not."""
        if self._failed:
            return self.function(*arguments)
        if self._calls_left > 0:
            self._calls_left -= 1
            return self.function(*arguments)
        try:
            return self._quick(*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # If the fault is not the compiler's, the function itself says so below.
            found = self.function(*arguments)
            self._failed = True
            what = " ".join(str(error).splitlines()[:2])
            _log.warning(
                "torch.compile failed for %s, which goes on uncompiled: the same results, more "
                "slowly (%s: %s)",
                getattr(self.function, "__name__", repr(self.function)),
                type(error).__name__,
                what,
            )
            return found

    def _quick(self, *arguments: Any) -> Found:
        from torch import _dynamo  # its import takes a second, which few programs need

        if _LIMIT:
            if self._compiled is None:
                self._compiled = torch.compile(self.function, backend=self.backend, **_LIMIT)
            return self._compiled(*arguments)
        # An older torch, in which the limit belongs to all functions.
        if self._compiled is None:
            self._compiled = torch.compile(self.function, backend=self.backend)
        name = next(n for n in _NAMES if hasattr(_dynamo.config, n))
        with _dynamo.config.patch({name: VARIANTS}):
            return self._compiled(*arguments)


_NAMES = ("recompile_limit", "cache_size_limit")
_LIMIT: dict[str, Any] = {
    name: VARIANTS for name in _NAMES if name in inspect.signature(torch.compile).parameters
}
