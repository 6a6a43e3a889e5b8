"""Drawn glyphs: an alphabet for vision that needs no download.

An alphabet has a stock of strokes (quadratic Bezier curves); a glyph is three of them, each at a
place of its own. A drawing bends every stroke a little and turns, scales and shifts the whole. The
glyphs of an alphabet share strokes, so that they are harder to tell apart than any two glyphs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from metalm.fewshot.tasks.images import LabelledImages

# Sizes are in units of the picture's side. Chosen by eye, to look like handwriting,
# and so that the nearest picture in pixels is right about as seldom as on Omniglot (5-way 1-shot:
# 41.7 % there, Vinyals et al. 2016).
STROKES_OF_ALPHABET = 10
STROKES_OF_GLYPH = 3
POINTS_OF_STROKE = 24
PEN = 0.025
INK = 0.55
WOBBLE = 0.04
TURN, SCALE, SHEAR, SHIFT = 0.2, 0.15, 0.15, 0.07


def draw_glyphs(
    *, alphabets: int, letters: int, drawings: int, seed: int, size: int = 28
) -> LabelledImages:
    """Glyphs with their drawings, the same for the same arguments.

    Args:
        alphabets: their number.
        letters: glyphs of each.
        drawings: of each glyph.
        seed: decides everything.
        size: pixels of a side.

    Returns:
        alphabets * letters classes in that order, with the alphabets as groups.

    Raises:
        ValueError: there is nothing to draw.
    """
    if min(alphabets, letters, drawings, size) < 1:
        raise ValueError(
            "there is nothing to draw; expected at least 1 of each, found "
            f"{alphabets} alphabets, {letters} letters, {drawings} drawings, size {size}; "
            "ask for more"
        )
    # A stream for each glyph: the first drawings of the first glyphs do not depend on how many
    # there are.
    pictures = [
        _drawings(_glyph(seed, alphabet, letter), drawings, size, (seed, alphabet, letter))
        for alphabet in range(alphabets)
        for letter in range(letters)
    ]
    return LabelledImages(
        np.concatenate(pictures)[:, None],
        np.repeat(np.arange(alphabets * letters), drawings),
        [f"alphabet{a + 1:02}/glyph{g + 1:02}" for a in range(alphabets) for g in range(letters)],
        groups=[f"alphabet{a + 1:02}" for a in range(alphabets) for _ in range(letters)],
    )


def _glyph(seed: int, alphabet: int, letter: int) -> NDArray[np.float64]:
    """Control points [strokes, 3, 2] of a glyph, about the middle of the picture."""
    stock = np.random.default_rng([seed, 1, alphabet]).uniform(
        -0.36, 0.36, (STROKES_OF_ALPHABET, 3, 2)
    )
    rng = np.random.default_rng([seed, 2, alphabet, letter])
    chosen = stock[rng.choice(STROKES_OF_ALPHABET, STROKES_OF_GLYPH, replace=False)]
    return chosen + rng.uniform(-0.1, 0.1, (STROKES_OF_GLYPH, 1, 2))


def _drawings(
    glyph: NDArray[np.float64], drawings: int, size: int, stream: tuple[int, int, int]
) -> NDArray[np.uint8]:
    """Drawings uint8 [drawings, size, size] of one glyph; 255 is ink."""
    rng = np.random.default_rng([3, *stream])
    turn, shear, width, height = rng.normal(0, 1, (drawings, 4)).T * [
        [TURN],
        [SHEAR],
        [SCALE],
        [SCALE],
    ]
    frame = np.empty((drawings, 2, 2))
    frame[:, 0, 0], frame[:, 0, 1] = np.cos(turn) * (1 + width), -np.sin(turn) + shear
    frame[:, 1, 0], frame[:, 1, 1] = np.sin(turn), np.cos(turn) * (1 + height)
    shift = rng.normal(0, SHIFT, (drawings, 1, 1, 2))
    points = glyph + rng.normal(0, WOBBLE, (drawings, *glyph.shape))
    points = np.einsum("nij,nskj->nski", frame, points) + shift + 0.5
    return _inked(_along(points), size)


def _along(controls: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points [drawings, points, 2] along the strokes [drawings, strokes, 3, 2]."""
    t = np.linspace(0, 1, POINTS_OF_STROKE)
    basis = np.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2])
    points = np.einsum("kt,nskj->nstj", basis, controls)
    return points.reshape(len(points), -1, 2)


def _inked(points: NDArray[np.float64], size: int) -> NDArray[np.uint8]:
    """A round pen pressed at every point; ink [drawings, size, size] saturates at 255.

    The pen's profile is a product of a row's and a column's, so a picture is one matrix product.
    """
    pixels = (np.arange(size) + 0.5) / size
    profile = np.exp(-0.5 * ((points[..., None] - pixels) / PEN) ** 2)
    pressed = profile[:, :, 1].swapaxes(1, 2) @ profile[:, :, 0]
    return np.rint(255 * np.minimum(1, INK * pressed)).astype(np.uint8)
