"""Which text an experiment is about, and how it is cut into tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from metalm.training.checked_settings import refuse_below, refuse_outside


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text, and how it is cut into tokens."""

    source: str = "python-docs"
    """Name of a corpus, or path of a folder or file (see the README)."""
    tokenizer: Literal["bpe", "word"] = "bpe"
    """Byte pairs learnt on the training split, or whole words."""
    vocabulary_size: int = 6000
    """Byte pairs asked for, the end of line included; a small text may have fewer."""
    root: str = "data"
    """Folder for prepared corpora."""
    held_out: float = 0.1
    """Share of the training articles that the base never reads; the rule is trained on them. 0: the
    base reads all of them, and the rule is trained on text that the base knows."""

    def __post_init__(self) -> None:
        """Checks the size and the share."""
        refuse_below(self, "data", "vocabulary_size")
        refuse_outside(self, "data", "held_out")
