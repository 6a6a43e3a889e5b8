"""Labelled pictures: what episodes of vision are drawn from.

The pictures stay where they are, in memory or in a mapped file, as 8-bit numbers; subsets of
classes and rotations are lists of rows. 255 is ink: a network sees it as 1, and paper as 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metalm.fewshot.tasks.episodes import Episode, EpisodePlan, EpisodeSampler

QUARTER_TURNS = 4


class LabelledImages:
    """Pictures with a class each.

    Args:
        pictures: uint8 [rows, channels, height, width]; may be mapped from a file.
        labels: class of every item, in [0, classes), [items]; of every row, if `rows` is not given.
        names: of the classes.
        groups: group of every class, say its alphabet.
        parts: part of the data set that every class belongs to, say "background".
        rows: row of `pictures` of every item, [items].
        turns: quarter turns, counterclockwise, that every item is seen under, [items].

    Raises:
        ValueError: the arrays do not fit each other, or pictures that are not square are turned.
    """

    def __init__(
        self,
        pictures: NDArray[np.uint8],
        labels: NDArray[np.int64],
        names: Sequence[str],
        *,
        groups: Sequence[str] | None = None,
        parts: Sequence[str] | None = None,
        rows: NDArray[np.int64] | None = None,
        turns: NDArray[np.int64] | None = None,
    ) -> None:
        self.pictures = pictures
        self.labels = np.asarray(labels, dtype=np.int64)
        self.names = tuple(names)
        self.groups = None if groups is None else tuple(groups)
        self.parts = None if parts is None else tuple(parts)
        self._rows = np.arange(len(pictures)) if rows is None else rows
        self._turns = np.zeros(len(self._rows), np.int64) if turns is None else turns
        self._check()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Classes, those of the rotations included."""
        return len(self.names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a picture."""
        channels, height, width = self.pictures.shape[1:]
        return channels, height, width

    def inputs(self, items: Tensor, device: torch.device | str | None = None) -> Tensor:
        """The pictures of `items` [...] as float32 [..., channels, height, width], ink = 1."""
        flat = items.flatten().numpy()
        pictures = torch.from_numpy(self.pictures[self._rows[flat]])
        turns = torch.from_numpy(self._turns[flat])
        for quarter in range(1, QUARTER_TURNS):
            turned = turns == quarter
            if turned.any():
                pictures[turned] = torch.rot90(pictures[turned], quarter, (-2, -1))
        return (pictures.to(device).float() / 255).unflatten(0, items.shape)

    def of_classes(self, classes: Sequence[int]) -> LabelledImages:
        """These classes alone, numbered anew in the order given.

        Raises:
            ValueError: a class is named twice, or there is no such class.
        """
        chosen = np.asarray(classes, dtype=np.int64)
        if len(np.unique(chosen)) < len(chosen) or not len(chosen):
            raise ValueError(
                f"the classes cannot be chosen; expected each at most once and at least one, found "
                f"{len(chosen)} numbers for {len(np.unique(chosen))} classes; correct the split"
            )
        if chosen.min() < 0 or chosen.max() >= self.num_classes:
            raise ValueError(
                f"there is no such class; expected numbers in [0, {self.num_classes}), found "
                f"{int(chosen.min())} to {int(chosen.max())}; correct the split"
            )
        new_label = np.full(self.num_classes, -1)
        new_label[chosen] = np.arange(len(chosen))
        kept = np.flatnonzero(new_label[self.labels] >= 0)
        return LabelledImages(
            self.pictures,
            new_label[self.labels[kept]],
            [self.names[number] for number in chosen],
            groups=None if self.groups is None else [self.groups[number] for number in chosen],
            parts=None if self.parts is None else [self.parts[number] for number in chosen],
            rows=self._rows[kept],
            turns=self._turns[kept],
        )

    def with_rotations(self) -> LabelledImages:
        """Four times the classes: each under rotations by 0, 90, 180 and 270 degrees.

        Rotate after splitting, so that no character is on both sides. A rotated group is a group of
        its own: episodes within a group see all their classes under one rotation.
        """
        quarters = range(QUARTER_TURNS)

        def fourfold(names: Sequence[str]) -> list[str]:
            return [f"{name} rot{90 * q:03}" for q in quarters for name in names]

        return LabelledImages(
            self.pictures,
            np.concatenate([self.labels + q * self.num_classes for q in quarters]),
            fourfold(self.names),
            groups=None if self.groups is None else fourfold(self.groups),
            parts=None if self.parts is None else self.parts * QUARTER_TURNS,
            rows=np.tile(self._rows, QUARTER_TURNS),
            turns=np.concatenate([(self._turns + q) % QUARTER_TURNS for q in quarters]),
        )

    def _check(self) -> None:
        if self.pictures.dtype != np.uint8 or self.pictures.ndim != 4:
            raise ValueError(
                "these are no pictures; expected uint8 [rows, channels, height, width], found "
                f"{self.pictures.dtype} {list(self.pictures.shape)}; convert them"
            )
        if not len(self.labels) == len(self._rows) == len(self._turns):
            raise ValueError(
                f"the labels do not fit the pictures; expected {len(self._rows)}, found "
                f"{len(self.labels)}; give one label a picture"
            )
        found = np.unique(self.labels)
        if not np.array_equal(found, np.arange(self.num_classes)):
            raise ValueError(
                f"the labels do not fit the names; expected every class from 0 to "
                f"{self.num_classes - 1} to have pictures, found {len(found)} classes; give one "
                "name a class, and leave out classes without pictures"
            )
        for what, values in (("groups", self.groups), ("parts", self.parts)):
            if values is not None and len(values) != self.num_classes:
                raise ValueError(
                    f"the {what} do not fit the classes; expected {self.num_classes}, found "
                    f"{len(values)}; give one a class"
                )
        if self._turns.any() and self.shape[1] != self.shape[2]:
            raise ValueError(
                "the pictures cannot be turned; expected squares, found "
                f"{self.shape[1]} x {self.shape[2]} pixels; prepare them as squares"
            )


class ImageEpisodes:
    """Episodes of pictures: a sampler draws from the labels, and the chosen pictures are read.

    Args:
        images: the pictures; their labels are those of the sampler.
        sampler: draws the tasks.
    """

    def __init__(self, images: LabelledImages, sampler: EpisodeSampler) -> None:
        self.images, self.sampler = images, sampler

    def sample(self, count: int) -> Episode:
        """The next `count` tasks."""
        return self.read(self.sampler.sample(count))

    def read(self, plan: EpisodePlan) -> Episode:
        """The pictures of tasks that were drawn already."""
        return Episode(
            self.images.inputs(plan.support_items),
            plan.support_targets,
            self.images.inputs(plan.query_items),
            plan.query_targets,
        )

    def state_dict(self) -> dict[str, Any]:
        """The sampler's state."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the sampler with this state stood."""
        self.sampler.load_state_dict(state)
