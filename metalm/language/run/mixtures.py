"""The mixture networks of a run: trained on the text that chose the settings, and kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from metalm.language.reading.copies import network_of_copies
from metalm.language.reading.copy_readings import Begin
from metalm.language.reading.method_readings import described, read_methods
from metalm.language.reading.methods import Method, TrainedModels
from metalm.language.reading.mixture_network import MixtureNetwork
from metalm.language.run.run_folder import LanguageRunFolder
from metalm.language.run.trial_files import Weights, weights_of
from metalm.language.text.articles import ArticleSet
from metalm.language.tuning.tuning_text import TuningConfig, tuning_text
from metalm.training.state import pack, unpack

Mixtures = Mapping[str, MixtureNetwork]
"""Name of a method -> the network that mixes its copies."""


def run_mixtures(
    models: TrainedModels,
    methods: Sequence[Method],
    articles: ArticleSet,
    config: TuningConfig,
    mode: str,
    folder: LanguageRunFolder,
    report: Callable[[str], None] | None = None,
    progress: Begin | None = None,
) -> Mixtures:
    """The networks of the methods that have one, from the run's folder as far as they are there.

    Args:
        models: the trained weights.
        methods: what is compared.
        articles: the validation articles.
        config: which of their text is read.
        mode: "reset" or "carry".
        folder: where they are kept, with the weights of the models and the settings of the copies
            that they mix.
        report: told the name of every method for which text is read.
        progress: told of every reading as it begins.
    """
    wanted = {method.name: described(method) for method in methods if method.learned_mixture}
    if not wanted:
        return {}
    weights = weights_of(models)
    networks, mixed_before = kept_mixtures(folder, mode, weights) or ({}, {})
    known = {name for name, copies in wanted.items() if mixed_before.get(name) == copies}
    networks = {name: networks[name] for name in wanted if name in known}
    missing = [method for method in methods if method.name in wanted.keys() - known]
    if not missing:
        return networks
    if report is not None:
        for method in missing:
            report(method.name)
    text = tuning_text(articles, config, mode)
    read = read_methods(
        models, missing, text.texts, config.rows, confidence=True, progress=progress
    )
    for method, of_method in zip(missing, read, strict=True):
        networks[method.name] = network_of_copies(*of_method)
    tensors, meta = pack({name: network.state_dict() for name, network in networks.items()})
    folder.save(_file(mode), tensors, meta | {"methods": wanted, "weights": weights})
    return {name: networks[name] for name in wanted}


def kept_mixtures(
    folder: LanguageRunFolder, mode: str, weights: Weights
) -> tuple[dict[str, MixtureNetwork], dict[str, Any]] | None:
    """The networks that lie in a run's folder, and the copies that each of them mixes.

    None that were trained with other weights.

    Raises:
        ValueError: the file is damaged.
    """
    if not folder.has(_file(mode)):
        return None
    tensors, meta = folder.load(_file(mode))
    if meta.get("weights", weights) != weights:  # older files do not say it
        return None
    networks = {}
    for name, state in unpack(tensors, meta).items():
        hidden, features = state["inner.weight"].shape
        networks[name] = MixtureNetwork(features, len(state["outer.bias"]), hidden)
        networks[name].load_state_dict(state)
        networks[name].requires_grad_(False)
    return networks, meta["methods"]


def _file(mode: str) -> str:
    return f"mixtures-{mode}"
