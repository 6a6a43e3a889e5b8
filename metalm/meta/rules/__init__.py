"""Update rules, one to a file."""

from metalm.meta.rules.adam import Adam
from metalm.meta.rules.coordinate_lstm import CoordinateLSTM
from metalm.meta.rules.coordinate_rates import CoordinateRates
from metalm.meta.rules.gated import Gated
from metalm.meta.rules.gradient_descent import GradientDescent
from metalm.meta.rules.learned_rates import LearnedRates
from metalm.meta.rules.meta_lstm import MetaLSTM
from metalm.meta.rules.momentum import Momentum
from metalm.meta.rules.rms_decay import RmsDecay

__all__ = [
    "Adam",
    "CoordinateLSTM",
    "CoordinateRates",
    "Gated",
    "GradientDescent",
    "LearnedRates",
    "MetaLSTM",
    "Momentum",
    "RmsDecay",
]
