"""Reading with a language model of your own: any module `(tokens, state) -> (logits, state)`."""

from metalm.adapt.causal_model import CausalModel
from metalm.adapt.reader import AdaptiveReader, Reading
from metalm.adapt.reading_state import ReadingState
from metalm.adapt.rules import count_gradients, krause_rule, learn_rule

__all__ = [
    "AdaptiveReader",
    "CausalModel",
    "Reading",
    "ReadingState",
    "count_gradients",
    "krause_rule",
    "learn_rule",
]
