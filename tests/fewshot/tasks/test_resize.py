import numpy as np
import pytest
from PIL import Image

from metalm.fewshot.tasks import resize
from metalm.fewshot.tasks.resize import resized

# Away from black and white: Pillow cuts at 0 and 255 after the rows and after the columns, and we
# once, at the end.
PICTURES = np.random.default_rng(0).integers(64, 192, (3, 2, 21, 17), dtype=np.uint8)


@pytest.mark.parametrize("size", [6, 17, 30])
def test_equal_to_pillow_within_a_shade(size):
    found = resized(PICTURES, size)
    assert found.shape == (3, 2, size, size)
    flat = PICTURES.reshape(6, 21, 17)
    for picture, small in zip(flat, found.reshape(6, size, size), strict=True):
        image = Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC)
        assert np.abs(np.asarray(image).astype(int) - small.astype(int)).max() <= 1


def test_pieces_do_not_show(monkeypatch):
    whole = resized(PICTURES, 8)
    monkeypatch.setattr(resize, "CHUNK", 2)
    np.testing.assert_array_equal(resized(PICTURES, 8), whole)


def test_what_overshoots_is_cut_and_not_wrapped():
    edge = np.zeros((1, 1, 20, 20), np.uint8)
    edge[..., 10:] = 255
    small = resized(edge, 13)
    assert (small[..., :5] < 20).all()
    assert (small[..., 8:] > 235).all()
