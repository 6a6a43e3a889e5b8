"""The README.md of a saved model: what it is, what made it, how it is used."""

from __future__ import annotations

from collections.abc import Mapping

from metalm.language.pretrained_config import PretrainedConfig, ReadingSettings
from metalm.meta.rules.kinds import RuleKind

_CARD = """\
---
library_name: metalm
license: apache-2.0
pipeline_tag: text-generation
tags:
- metalm
- language-model
- meta-learning
- fast-weights
---

# A language model that learns while it reads

{kind} language model of {parameters} parameters, with the meta-learned update rule that rewrites
its weights while it reads, segment by segment: `metalm`. The rule: {rule}.

    from metalm.language.pretrained import Pretrained

    model = Pretrained.from_pretrained("{name}")
    nats, state = model.reader().read(model.encode(text))    # scored, then learnt from
    nats, state = model.reader().read(model.encode(more), state)

## What made it

{origin}
## How it reads

Chosen on validation articles, and kept in the configuration:

{settings}
## Limits

It is small, knows little beyond the kind of text that it was trained on, and repeats what that text
says, its prejudices included. It scores text; it was not trained to follow instructions.
{form}"""

_WIKITEXT_FORM = """
Its text has punctuation apart and marks such as `@-@` inside words; ordinary text is foreign to it.
`evaluate.py --text` brings text into that form; for `encode`, `data_prep.wikitext_form` does.
"""

_RULES: Mapping[RuleKind, str] = {
    "rates": "learned rates and decays",
    "gated": "learned rates and decays, under gates that see each weight and its article",
    "lstm": "learned rates and decays, and an LSTM that adds to each step",
    "momentum": "learned rates and decays, along each gradient and the mean of earlier ones",
}


def model_card(config: PretrainedConfig, num_parameters: int, name: str) -> str:
    """The card as Markdown with the metadata that the hub reads.

    Args:
        config: of the model.
        num_parameters: of the language model.
        name: what `from_pretrained` is given to find it.
    """
    return _CARD.format(
        kind={"lstm": "An LSTM", "qrnn": "A QRNN"}[config.model.cell],
        parameters=f"{num_parameters:,}".replace(",", " "),
        rule=_RULES[config.rule.kind],
        name=name,
        origin=_origin(config),
        settings=_settings("Articles one by one", config.reset)
        + _settings("A stream of articles", config.carry),
        form=_WIKITEXT_FORM if config.origin.corpus.startswith("wikitext") else "",
    )


def _origin(config: PretrainedConfig) -> str:
    origin = config.origin
    if not origin.command:
        return "The command is not recorded.\n"
    lines = [f"    {origin.command}\n"]
    if origin.corpus.startswith("wikitext"):
        lines.append(
            f"Trained on {origin.corpus} (Merity et al. 2016: articles of Wikipedia, CC BY-SA 3.0)."
        )
    elif origin.corpus:
        lines.append(f"Trained on {origin.corpus}.")
    if origin.seed is not None:
        lines.append(f"Seed {origin.seed}.")
    if origin.version:
        lines.append(f"Saved with metalm {origin.version}.")
    return "\n".join(lines) + "\n"


def _settings(title: str, reading: ReadingSettings) -> str:
    numbers = ", ".join(f"{key} {value:.4g}" for key, value in sorted(reading.settings.items()))
    cache = reading.cache
    text = (
        f"- {title}: segments of {reading.segment} tokens, {numbers}; cache theta "
        f"{cache.theta:.4g}, lambda {cache.share:.4g}, window {cache.window}."
    )
    if reading.flush:
        text += " Fast weights go back where the text shows that an article begins."
    if reading.perplexity is not None and reading.cached_perplexity is not None:
        text += (
            f" Perplexity per word of the validation text: {reading.perplexity:.2f}, with the "
            f"cache {reading.cached_perplexity:.2f}."
        )
    if reading.test_perplexity is not None and reading.test_static_perplexity is not None:
        text += (
            f" Of the test articles, scored before the weights were rounded and without the cache: "
            f"{reading.test_perplexity:.2f}; a model of this size that was trained ordinarily, on "
            "as many tokens, and does not learn while it reads: "
            f"{reading.test_static_perplexity:.2f}."
        )
    return text + "\n"
