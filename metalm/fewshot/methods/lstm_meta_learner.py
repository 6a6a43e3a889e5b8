"""The LSTM meta-learner: a recurrent network that writes the weights (Ravi and Larochelle 2017)."""

from __future__ import annotations

from typing import Any

from torch import nn

from metalm.fewshot.methods.adaptation import Adaptation
from metalm.meta.rules.meta_lstm import MetaLSTM


class LstmMetaLearner(Adaptation):
    """The network's weights are the cells of an LSTM whose gates are learned, and its start too.

    "Optimization as a model for few-shot learning", sections 3.1 to 3.4: the rule is `MetaLSTM`,
    c_0 is W_0, inner gradients count as constants (order 1). The authors take 12 steps for one
    shot and 8 for five, Adam at 0.001 and gradients clipped at 0.25.

    Args:
        network: W_0; the authors' has running statistics.
        hidden: units of the rule's LSTM.
        seed: of the rule's first numbers.
        **options: see `Adaptation`; without step weights.

    Raises:
        ValueError: step weights, which would show the rule the loss of the queries.
    """

    def __init__(
        self, network: nn.Module, *, hidden: int = 20, seed: int = 0, **options: Any
    ) -> None:
        if options.get("step_weights"):
            raise ValueError(
                "the LSTM meta-learner sees the loss that counts, and must not see the queries'; "
                f"expected no step weights, found {len(options['step_weights'])}; do leave them out"
            )
        super().__init__(network, **{"order": 1, **options})
        learning = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.rule = MetaLSTM(learning, hidden, seed)
