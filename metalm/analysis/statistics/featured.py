"""Which methods are drawn where there are many: those at rest, and the best of ours and of others.

A family is a method with and without the cache. Plots can hold a handful of them; tables hold all.
"""

from collections.abc import Mapping, Sequence
from math import inf

from metalm.analysis.statistics.scores import Scores

Members = tuple[str, ...]
"""A family's methods."""

WITH_CACHE, WITH_LEARNED_CACHE = " + cache", " + learned cache"
# Families that adapt: so many are drawn without a choice, and otherwise so many of each side.
MOST_FAMILIES = 5
OF_EACH_SIDE = 2


def featured(scores: Sequence[Scores], of_each_side: int = OF_EACH_SIDE) -> tuple[str, ...]:
    """The methods that plots draw and that the page shows at first, in the order of the methods.

    All, if at most five families adapt. Else the methods at rest, and those families of ours and of
    the rivals in which a member has the lowest perplexity: the best of each reading mode before the
    second of any, and among equals those that are better in the first mode.

    Args:
        scores: the scores of each reading mode, the first mode first.
        of_each_side: how many families are chosen of ours, and of the rivals.
    """
    families = adaptive_families(scores)
    if len(families) <= MOST_FAMILIES:
        return all_methods(scores)
    ours = {method for of_mode in scores for method in of_mode.ours}
    left_out: set[str] = set()
    for of_ours in (True, False):
        side = [m for m in families.values() if ours.isdisjoint(m) != of_ours]
        best = {
            members: [_best_perplexity(of_mode, members) for of_mode in scores] for members in side
        }
        side.sort(key=lambda members: (_place(members, best), best[members]))
        left_out.update(method for members in side[of_each_side:] for method in members)
    return tuple(method for method in all_methods(scores) if method not in left_out)


def all_methods(scores: Sequence[Scores]) -> tuple[str, ...]:
    """Every method of every reading mode, once."""
    return tuple(dict.fromkeys(method for of_mode in scores for method in of_mode.methods))


def methods_at_rest(scores: Sequence[Scores]) -> tuple[str, ...]:
    """The methods that do not adapt: their gain would be measured against themselves."""
    return tuple(m for m in all_methods(scores) if any(s.baselines.get(m) == m for s in scores))


def adaptive_families(scores: Sequence[Scores]) -> dict[str, tuple[str, ...]]:
    """Name of a family, which is its method without the cache -> its members that adapt."""
    methods, at_rest = all_methods(scores), methods_at_rest(scores)
    families: dict[str, tuple[str, ...]] = {}
    for method in (m for m in methods if m not in at_rest):
        name = family(method, methods)
        families[name] = (*families.get(name, ()), method)
    return families


def family(method: str, methods: Sequence[str]) -> str:
    """The method without the cache, if there is one.

    Example:
        >>> family("a + cache", ["a", "a + cache"]), family("b + cache", ["a", "b + cache"])
        ('a', 'b + cache')
    """
    for suffix in (WITH_CACHE, WITH_LEARNED_CACHE):
        base = method.removesuffix(suffix)
        if base != method and base in methods:
            return base
    return method


def _place(members: Members, best: Mapping[Members, Sequence[float]]) -> int:
    """How many families are better, in the mode where these are the fewest."""
    modes = range(len(best[members]))
    return min(sum(other[mode] < best[members][mode] for other in best.values()) for mode in modes)


def _best_perplexity(scores: Scores, members: Sequence[str]) -> float:
    return min((scores.perplexity(m) for m in members if m in scores.methods), default=inf)
