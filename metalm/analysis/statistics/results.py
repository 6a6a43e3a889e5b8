"""All that is computed from the scores of one reading mode, and its form in results.json."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from metalm.analysis.statistics.bootstrap import (
    FEWEST_ARTICLES,
    LEVEL,
    NUM_RESAMPLES,
    SEED,
    Interval,
)
from metalm.analysis.statistics.positions import ByPosition, by_position, choose_cohort_length
from metalm.analysis.statistics.scores import Scores
from metalm.analysis.statistics.seen import ByGroup, by_last_use, by_seen
from metalm.analysis.statistics.succession import Succession, along_articles
from metalm.analysis.statistics.summary import (
    Row,
    best_rival,
    compare_with_rivals,
    matched_rival,
    summarise,
)

Json: TypeAlias = Any

SCHEMA = {
    "format": "metalm results 1",
    "units": "perplexity is per word (non-space runs, plus one end of line a line); gain is nats "
    "per word saved against the method's baseline on the same words; lengths are in words; "
    "tokens_per_second and peak_memory_bytes as their names say; null means undefined",
    "interval": f"an object with estimate, low, high: {LEVEL:.0%} interval, expanded percentiles "
    f"of {NUM_RESAMPLES} bootstrap resamples of the articles, seed {SEED}; low and high are null "
    f"where fewer than {FEWEST_ARTICLES} articles contribute",
    "modes.*.summary": "one object a method: figures of the whole split",
    "modes.*.ratio_to_rivals": "method of ours -> rival -> interval of the ratio of perplexities",
    "modes.*.by_position": "bins of word position in the article: bin b holds edges[b] <= position "
    "< edges[b+1]; growth is the gain in the last bin minus the gain in the first",
    "modes.*.by_position_cohort": "the same for articles of at least cohort_length words, up to "
    "there, so that all bins hold the same articles; null if too few are long enough",
    "modes.*.by_position_rivals": "bins as by_position, where gain is against the best rival with "
    "the same means (field against); null if there are no rivals",
    "modes.*.by_seen": "words new to their article, used before in it, or neither",
    "modes.*.by_last_use": "words used before, by how many words ago they were last used",
    "modes.*.succession": "which consecutive articles the plot of the gain follows; boundaries in "
    "words read; window of the running mean in words",
    "modes.*.articles": "one object an article, in reading order: length and perplexities",
    "cost": "reading mode -> method -> measured cost",
}

# What is said besides where methods were scored under temperatures of their own.
TEMPERED_SCHEMA = {
    "tempered.*": "reading mode -> one object a method: the temperature of the softmax that is "
    "best on validation text, perplexity under it and at temperature 1, and gain against the "
    "baseline under its own temperature; updates are taken at temperature 1",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """Everything reported about one reading mode."""

    scores: Scores
    """The scores that all of it was computed from."""
    summary: list[Row]
    """One row a method."""
    ratio_to_rivals: dict[str, dict[str, Interval]]
    """Ours -> rival -> ratio of perplexities."""
    by_position: ByPosition
    """All words of all articles."""
    by_position_cohort: ByPosition | None
    """The cohort of long articles; None if too few are long."""
    by_position_rivals: ByPosition | None
    """Ours against the best rival of the same means; None without ours or rivals."""
    by_seen: ByGroup
    """New words and words seen before."""
    by_last_use: ByGroup
    """Words seen before, by the distance to their last use."""
    succession: Succession
    """The first eight articles in a row."""


def compute(scores: Scores) -> Results:
    """Compute everything that the report shows about one reading mode."""
    cohort_length = choose_cohort_length(scores.num_words)
    ratio_to_rivals = compare_with_rivals(scores)
    against = {m: matched_rival(scores, m) for m in ratio_to_rivals if scores.rivals}
    return Results(
        scores=scores,
        summary=summarise(scores),
        ratio_to_rivals=ratio_to_rivals,
        by_position=by_position(scores),
        by_position_cohort=(
            None if cohort_length is None else by_position(scores, cohort_length=cohort_length)
        ),
        by_position_rivals=by_position(scores, against=against) if against else None,
        by_seen=by_seen(scores),
        by_last_use=by_last_use(scores),
        succession=along_articles(scores),
    )


def mode_as_json(results: Results) -> Json:
    """One reading mode as plain JSON values."""
    scores = results.scores
    perplexities = {m: np.exp(scores.nats(m) / scores.num_words) for m in scores.methods}
    fields = {f.name: getattr(results, f.name) for f in dataclasses.fields(results)}
    fields.pop("scores")
    succession = results.succession
    fields["succession"] = {
        "titles": succession.titles,
        "boundaries": succession.boundaries,
        "window": succession.window,
    }
    return as_json(
        {
            "methods": scores.methods,
            "baselines": scores.baselines,
            "ours": scores.ours,
            "best_rival": best_rival(scores),
            "num_articles": len(scores.articles),
            "num_words": scores.num_words.sum(),
            "num_unknown": scores.num_unknown,
            **fields,
            "articles": [
                {
                    "title": article.title,
                    "num_words": article.num_words,
                    "perplexity": {m: perplexities[m][i] for m in scores.methods},
                }
                for i, article in enumerate(scores.articles)
            ],
        }
    )


def as_json(value: object) -> Json:
    """Plain JSON values of nested mappings, sequences, dataclasses, named tuples and arrays.

    Numbers that JSON lacks (nan, infinity) become null; other objects become their text.
    """
    if isinstance(value, np.generic | np.ndarray):
        return as_json(value.tolist())
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Interval):
        return as_json(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [as_json(item) for item in value]
    return str(value)
