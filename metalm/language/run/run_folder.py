"""The folder of a run that reads; see `metalm.training.run_folder`.

configuration.json        what the run was asked for
.lock                     held by the program that works in the folder; .lock-holder.json names it
vocabulary/               the tokenizer
base.safetensors          the language model after ordinary training
control.safetensors       the same, gone on ordinarily for as many tokens: the rivals' base
rule.safetensors          the update rule, trained with the base frozen
joint.safetensors         model and rule, trained together
statistics-N.safetensors  RMS of the training gradients at segments of N (dynamic evaluation)
article-starts.safetensors  what tells where articles begin, where a flush was asked for
stages/NAME/              checkpoints and metrics of a training
tuning-MODE.json          every trial on validation articles, and of which weights they are
tuning-MODE-begun.json    those of searches that were stopped; goes when tuning is done
mixtures-MODE.safetensors the networks that mix fast copies
temperatures-MODE.json    the temperature of the softmax that suits each method, where asked for
readings/SPLIT-MODE/      the loss of every token and the curves of the fast weights, one file a
                          finished reading, and unfinished-... one that was stopped
scores-SPLIT-MODE.npz     the loss of every word, for every method
report-SPLIT/             report.html, results.json, plots and report.md
report-text-NAME/         report.html and results.json of single files (evaluate.py --text)

What was read in bfloat16 has SPLIT-bfloat16 for SPLIT, and NAME-bfloat16 for NAME.
"""

from __future__ import annotations

from pathlib import Path

from metalm.language.text.articles import Corpus
from metalm.language.text.vocabulary import Vocabulary
from metalm.training.run_folder import RunFolder


class LanguageRunFolder(RunFolder):
    """Paths and files of one run.

    Args:
        folder: made when something is first written.
    """

    HOW_TO_TRAIN = "run train.py with the same options and --stages {name}"

    @property
    def vocabulary_path(self) -> Path:
        """Where the vocabulary lies that the models were trained with."""
        return self.folder / "vocabulary"

    def refuse_other_vocabulary(self, corpus: Corpus) -> None:
        """Checks that a corpus has the tokens that the run was trained on.

        Raises:
            ValueError: it has others, or the run's are missing or damaged.
        """
        own, found = Vocabulary.load(self.vocabulary_path).checksum, corpus.vocabulary.checksum
        if own != found:
            raise ValueError(
                f"{corpus.folder} has another vocabulary than {self.folder}; expected the one that "
                f"the run was trained with, of checksum {own[:16]}, found {found[:16]}; prepare "
                "the run's own data again, or restore it"
            )
