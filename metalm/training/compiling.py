"""A function that is compiled once it has been called often.

`torch.compile` takes seconds to a minute for a function; a text of a few pages is read before that.
A long training or evaluation calls the function many thousand times and earns it back.
"""

from __future__ import annotations

import inspect
import logging
import warnings
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
                self.function.__name__,
                type(error).__name__,
                what,
            )
            return found

    def _quick(self, *arguments: Any) -> Found:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what torch does inside
            if self._compiled is None:
                self._compiled = torch.compile(self.function, backend=self.backend, **_limit())
            return self._compiled(*arguments)


def _limit() -> dict[str, Any]:
    """More variants of a function, where this torch has them asked for by function."""
    known = inspect.signature(torch.compile).parameters
    return {"recompile_limit": VARIANTS} if "recompile_limit" in known else {}
