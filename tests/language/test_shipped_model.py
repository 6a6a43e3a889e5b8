"""The model that the package really carries."""

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from data_prep.wikitext_form import in_wikitext_form
from metalm.language.pretrained import SHIPPED, Pretrained
from metalm.language.ship import LIMIT

LICENSE = (Path(__file__).resolve().parents[2] / "LICENSE").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def shipped():
    return Pretrained.from_pretrained("shipped")


def test_its_files_are_small_and_its_weights_are_rounded(shipped):
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= LIMIT == 12_000_000
    with safe_open(SHIPPED / "model.safetensors", framework="pt") as file:
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert {kind for name, kind in kinds.items() if name.startswith("model.")} == {"BF16"}
    card = (SHIPPED / "README.md").read_text(encoding="utf-8")
    assert shipped.config.origin.command in card
    assert f"--seed {shipped.config.origin.seed}" in shipped.config.origin.command


@pytest.mark.parametrize("mode", ["reset", "carry"])
def test_it_knows_english_and_learns_what_it_reads(shipped, mode):
    """A legal text, of which WikiText has none, gets easier as it is read."""
    tokens = shipped.encode(" ".join(in_wikitext_form(LICENSE).split()[:300]))
    reader = shipped.reader(mode)
    learning = reader.read(tokens).nats
    static = reader.with_rule(None).read(tokens).nats
    assert static.mean() < 0.7 * np.log(shipped.config.model.vocabulary_size)
    half = len(tokens) // 2
    assert learning[half:].mean() < static[half:].mean() - 0.2
    assert abs(learning[: reader.segment] - static[: reader.segment]).max() < 1e-4
