"""Whatever follows a token changes no bit of the scores before it."""

import numpy as np
import pytest
import torch

from metalm.language.network import adaptive_softmax
from metalm.language.reading.copies import nats_of_copies
from metalm.language.reading.mixture_network import MixtureNetwork
from metalm.language.reading.reader import CacheGrid, Reader
from metalm.meta.rules import GradientDescent
from metalm.training import precision

pytestmark = pytest.mark.parametrize(
    ("cell", "cutoffs"), [("lstm", ()), ("qrnn", ()), ("lstm", (4, 7))], ids=str
)

WEIGHED, LOW = ", by surprise", ", in bfloat16"
KINDS = (
    *("static", "gradient descent", "rms decay", "learned rates", "rms decay" + WEIGHED),
    *("static" + LOW, "learned rates" + LOW),
)
SEGMENT = 4
GRID = CacheGrid(thetas=(0.3, 1.0), window=5)
# Of article 2, 13 tokens: its first, within and at both ends of a segment, its last.
PLACES = (0, 1, 3, 4, 6, 11, 12)


def perturbed(text, place):
    """Every token from this place on is another one."""
    future = text.copy()
    future[place:] = (future[place:] + 1 + np.arange(len(text) - place) % 9) % 11
    assert (future[place:] != text[place:]).all()
    return future


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch):
    """A segment of one tail's tokens is scored in two products, of three places and of one."""
    monkeypatch.setattr(adaptive_softmax, "_CHUNK", 3)


@pytest.fixture
def reader(tiny_model, learning, monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16", lambda kind: True)

    def build(kind):
        low = kind.endswith(LOW)
        model = tiny_model(dtype=torch.float32 if low else torch.float64)
        rule, _ = learning(kind.removesuffix(LOW).removesuffix(WEIGHED), model)
        names = [name for name, _ in model.named_parameters()]
        surprise = 0.5 if kind.endswith(WEIGHED) else 0.0
        return Reader(model, rule, names, SEGMENT, GRID, surprise=surprise, bfloat16=low)

    return build


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_reset_with_several_rows(reader, texts, kind, place):
    changed = [perturbed(text, place) if n == 2 else text for n, text in enumerate(texts)]
    found = reader(kind)
    before, after = found.read(texts, 3), found.read(changed, 3)
    for number in range(len(texts)):
        end = place if number == 2 else None
        np.testing.assert_array_equal(before.nats[number][:end], after.nats[number][:end])
        np.testing.assert_array_equal(before.cache[number][:, :end], after.cache[number][:, :end])
    assert (before.nats[2][place:] != after.nats[2][place:]).all()


@pytest.mark.parametrize("place", [0, 5, 8, 17, 19, 30, 35])
@pytest.mark.parametrize("kind", KINDS)
def test_carry_across_articles(reader, texts, kind, place):
    whole = np.concatenate(texts)
    found = reader(kind)
    before, after = found.read([whole]), found.read([perturbed(whole, place)])
    np.testing.assert_array_equal(before.nats[0][:place], after.nats[0][:place])
    np.testing.assert_array_equal(before.cache[0][:, :place], after.cache[0][:, :place])
    assert (before.nats[0][place:] != after.nats[0][place:]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_shorter_text_is_the_beginning_of_a_longer_one(reader, texts, kind):
    """Up to the last full segment the end of the text is not felt either."""
    found = reader(kind)
    whole, cut = found.read([texts[2]]), found.read([texts[2][:10]])
    np.testing.assert_array_equal(whole.nats[0][:8], cut.nats[0][:8])
    within = 0.1 if kind.endswith(LOW) else 1e-12
    np.testing.assert_allclose(whole.nats[0][8:10], cut.nats[0][8:10], rtol=within)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("static")])
def test_what_was_read_is_felt_later(reader, texts, kind):
    """The tests above have power: the same later segment costs something else."""
    changed = texts[2].copy()
    changed[:4] = (changed[:4] + 3) % 11
    model_only = reader("static" + LOW if kind.endswith(LOW) else "static")
    static = [model_only.read([text]).nats[0] for text in (texts[2], changed)]
    learnt = [reader(kind).read([text]).nats[0] for text in (texts[2], changed)]
    late = slice(9, None)
    gap = abs((learnt[0] - learnt[1]) - (static[0] - static[1]))[late]
    assert gap.max() > 1e-3


@pytest.fixture
def network():
    """Of two copies and a cache; any numbers will do."""
    generator = torch.Generator().manual_seed(8)
    found = MixtureNetwork(8, 3, 5)
    for parameter in found.requires_grad_(False).parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return found


@pytest.mark.parametrize("place", [1, 6, 11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mixtures_of_copies_and_cache(tiny_model, texts, network, dtype, place):
    """In float32 too, and where many tokens are new, which moves the sums over the cache."""
    model = tiny_model().to(dtype)
    names = [name for name, _ in model.named_parameters()]
    grid = CacheGrid(thetas=(0.3, 1.0), window=40)
    copies = [
        Reader(model, GradientDescent(rate, 0.01), names, SEGMENT, grid, confidence=True)
        for rate in (0.4, 0.05)
    ]
    whole = np.concatenate([*texts[:2], *texts[3:], texts[2]])
    place += len(whole) - len(texts[2])
    changed = perturbed(whole, place)
    read = [[copy.read([text]) for copy in copies] for text in (whole, changed)]
    for one, other in zip(*read, strict=True):
        np.testing.assert_array_equal(one.confidence[0][:, :place], other.confidence[0][:, :place])
    for mixed_by in (None, network):
        before, after = (nats_of_copies(found, 1, 0.1, mixed_by)[0] for found in read)
        np.testing.assert_array_equal(before[:place], after[:place])
        assert (before[place:] != after[place:]).all()
