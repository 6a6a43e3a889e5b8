"""A metric method learns something: new alphabets are told apart better than by pixels."""

import torch

from metalm.fewshot.methods.method import accuracy
from metalm.fewshot.methods.networks import Conv4
from metalm.fewshot.methods.pixels import NearestPixels
from metalm.fewshot.methods.prototypical import Prototypical
from metalm.fewshot.tasks.episodes import EpisodeSampler
from metalm.fewshot.tasks.glyphs import draw_glyphs
from metalm.fewshot.tasks.images import ImageEpisodes

SIZE = 16


def test_prototypes_beat_pixels_on_new_alphabets():
    glyphs = draw_glyphs(alphabets=16, letters=10, drawings=6, seed=0, size=SIZE)
    known, new = glyphs.of_classes(range(120)), glyphs.of_classes(range(120, 160))
    torch.manual_seed(0)
    method = Prototypical(Conv4(size=SIZE, width=16, statistics="running"), "running")
    optimizer = torch.optim.Adam(method.parameters(), 1e-2)
    training = ImageEpisodes(known, EpisodeSampler(known.labels, 30, 1, 3, 1))
    for _ in range(60):
        optimizer.zero_grad()
        method.meta_gradient(training.sample(1))
        optimizer.step()
    test = ImageEpisodes(new, EpisodeSampler(new.labels, 5, 1, 3, 2)).sample(100)
    scores = [
        accuracy(each.predict(*test[:3]), test.query_targets) for each in (method, NearestPixels())
    ]
    # Chance is 0.2. 1,500 queries of 100 tasks: an interval of about 0.03 each.
    assert scores[0] > scores[1] + 0.06
    assert scores[1] > 0.3
