"""Two tiny trainables whose next step depends on all that a real one has to save."""

import math
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch

from metalm.training import loop
from metalm.training.record import Record
from metalm.training.state import pack, unpack

TINY = Path(__file__)


class Base:
    """AdamW with a schedule, dropout, noise, a carried hidden state and a place in the data."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        self.cell = torch.nn.LSTMCell(3, 5)
        self.optimizer = torch.optim.AdamW(self.cell.parameters(), lr=0.1)
        self.hidden = (torch.zeros(2, 5), torch.zeros(2, 5))
        self.position = 0
        self.data = torch.sin(torch.arange(7 * 2 * 3.0)).reshape(7, 2, 3)

    def step(self, index: int) -> dict[str, float]:
        self.optimizer.param_groups[0]["lr"] = 0.1 * (1 + math.cos(index / 5))
        inputs = torch.nn.functional.dropout(self.data[self.position % 7], 0.3)
        inputs = inputs + random.gauss(0, 0.1) + np.random.normal(0, 0.1)  # noqa: NPY002
        self.position += 1
        hidden, cell = self.cell(inputs, self.hidden)
        loss = (hidden - inputs.sum()).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.hidden = (hidden.detach(), cell.detach())
        return {"loss": loss.item(), "tokens": 2.0}

    def state_dict(self):
        return pack(
            {
                "cell": self.cell.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "hidden": self.hidden,
                "position": self.position,
            }
        )

    def load_state_dict(self, tensors, meta) -> None:
        tree = unpack(tensors, meta)
        self.cell.load_state_dict(tree["cell"])
        self.optimizer.load_state_dict(tree["optimizer"])
        self.hidden, self.position = tree["hidden"], tree["position"]


class Meta:
    """Rows of articles that enter and leave, each with fast weights; learns rate and W_0."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.slow = torch.full((3,), 0.5 + seed, requires_grad=True)
        self.log_rate = torch.tensor(-2.0 - seed, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.slow, self.log_rate], lr=0.05)
        self.rows: list[dict] = []
        self.next_article = 0

    def step(self, index: int) -> dict[str, float]:
        while len(self.rows) < 2:
            left = int(torch.randint(1, 5, (), generator=self.generator))
            fast = self.slow.detach().clone()
            self.rows.append({"article": self.next_article, "left": left, "fast": fast})
            self.next_article += 1
        total = torch.zeros(())
        for row in self.rows:
            fast = row["fast"] + (self.slow - self.slow.detach())
            target = torch.randn(3, generator=self.generator) + row["article"]
            gradient = (fast - target).detach()
            adapted = fast - self.log_rate.exp() * gradient
            total = total + (adapted - target).square().sum()
            row["fast"], row["left"] = adapted.detach(), row["left"] - 1
        self.rows = [row for row in self.rows if row["left"]]
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        return {"loss": total.item(), "rows": len(self.rows)}

    def state_dict(self):
        return pack(
            {
                "slow": self.slow,
                "log_rate": self.log_rate,
                "optimizer": self.optimizer.state_dict(),
                "rows": self.rows,
                "next_article": self.next_article,
                "generator": self.generator.get_state(),
            }
        )

    def load_state_dict(self, tensors, meta) -> None:
        tree = unpack(tensors, meta)
        with torch.no_grad():
            self.slow.copy_(tree["slow"])
            self.log_rate.copy_(tree["log_rate"])
        self.optimizer.load_state_dict(tree["optimizer"])
        self.rows, self.next_article = tree["rows"], tree["next_article"]
        self.generator.set_state(tree["generator"])


class Slow(Base):
    """Slow enough that a kill falls inside; hangs in one step, so that a late kill still does."""

    def __init__(self, seed: int, hang_in: int) -> None:
        super().__init__(seed)
        self.hang_in = hang_in

    def step(self, index: int) -> dict[str, float]:
        time.sleep(3600 if index == self.hang_in else 0.01)
        return super().step(index)


def main(folder: Path, num_steps: int, hang_in: int = -1) -> None:
    """What the killed process runs; another seed at each start shows that all is restored."""
    torch.set_num_threads(1)
    with Record(folder, tensorboard=False) as record:
        loop.run(
            Slow(len(list(folder.glob("checkpoint-*"))), hang_in),
            num_steps=num_steps,
            folder=folder,
            record=record,
            save_every_steps=4,
            evaluate=lambda step: {"noise": torch.rand(()).item() + step},
            evaluate_every=5,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
