"""A trained language model with its learned rule and vocabulary, saved and loaded as one thing."""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metalm.adapt import AdaptiveReader
from metalm.language import compact, pretrained_files
from metalm.language.model_card import model_card
from metalm.language.network.model import LanguageModel
from metalm.language.pretrained_config import PretrainedConfig, ReadingSettings
from metalm.language.reading.article_starts import ArticleStarts
from metalm.language.reading.flushing import Flushing
from metalm.language.reading.methods import (
    NAMES,
    SURPRISE,
    Learning,
    Method,
    TrainedModels,
    set_scales,
)
from metalm.language.text.vocabulary import END_OF_LINE, Vocabulary
from metalm.language.training.meta_training_config import empty_rule
from metalm.meta.parameters import choose
from metalm.meta.rules.kinds import LearnedRule

SHIPPED = Path(__file__).resolve().parents[1] / "shipped"
"""Where the package keeps the model that comes with it."""

ReadingMode = Literal["reset", "carry"]

_STARTS = "starts."  # before the names of its tensors in the file


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """What a text needs to be read."""

    model: LanguageModel
    """W_0 and the rest, float32."""
    rule: LearnedRule
    """How the fast weights learn."""
    vocabulary: Vocabulary
    """Text to tokens."""
    config: PretrainedConfig
    """Sizes, tuned settings, origin."""
    starts: ArticleStarts | None = None
    """Tells where articles begin, for reading with a flush."""

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        device: torch.device | str = "cpu",
    ) -> Pretrained:
        """Loads what `save_pretrained` saved; no code is executed.

        Args:
            source: a folder; ``"shipped"`` for the model that comes with the package; or the name
                ``owner/name`` of a repository on the hub, which is downloaded once.
            revision: branch, tag or commit on the hub.
            token: for private repositories; by default the one that the hub's login keeps.
            cache_dir: where downloads are kept.
            local_files_only: never ask the hub.
            device: where the tensors go.

        Raises:
            ValueError: nothing is there, it is something else, or a file is damaged.
        """
        folder = _local_folder(source)
        if folder is None:
            folder = _download(str(source), revision, token, cache_dir, local_files_only)
        config, tensors, vocabulary = pretrained_files.read(folder)
        model = LanguageModel(config.model)
        try:
            rule = empty_rule(model, config.rule)
            starts = _taken_starts(tensors, config)
            compact.restore(model, rule, tensors)
            if vocabulary.size != config.model.vocabulary_size:
                raise ValueError(
                    f"expected a vocabulary of {config.model.vocabulary_size} tokens, found "
                    f"{vocabulary.size}"
                )
        except ValueError as error:
            raise ValueError(
                f"the files in {folder} do not fit each other; {error}; save or download the model "
                "again"
            ) from error
        return cls(
            model=model.to(device).eval().requires_grad_(False),
            rule=rule.to(device).requires_grad_(False),
            vocabulary=vocabulary,
            config=config,
            starts=None if starts is None else starts.to(device),
        )

    def save_pretrained(
        self,
        folder: str | Path,
        dtype: torch.dtype = torch.float32,
        *,
        name: str | None = None,
    ) -> None:
        """Writes config.json, model.safetensors, the tokenizer's files and a model card.

        Args:
            folder: made if missing; files of an earlier model in it are replaced.
            dtype: float32 keeps every bit; bfloat16 rounds, to a quarter of the size or less.
            name: what the card says `from_pretrained` is to be given; by default the folder.

        Raises:
            ValueError: another dtype, or a folder that cannot be written.
        """
        forms = {torch.float32: compact.exact, torch.bfloat16: compact.compact}
        if dtype not in forms:
            raise ValueError(
                f"unknown precision; expected torch.float32 or torch.bfloat16, found {dtype}; "
                "choose one of them"
            )
        folder = Path(folder)
        num_parameters = sum(weight.numel() for weight in self.model.parameters())
        card = model_card(self.config, num_parameters, name or folder.name)
        tensors = forms[dtype](self.model, self.rule)
        if self.starts is not None:
            tensors |= {_STARTS + key: value for key, value in self.starts.state_dict().items()}
        pretrained_files.write(folder, self.config, tensors, self.vocabulary, card)

    def push_to_hub(
        self,
        repo_id: str,
        dtype: torch.dtype = torch.float32,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        message: str = "Upload a model of metalm",
    ) -> str:
        """Saves the model to a repository of the hub, made if it is not there.

        Args:
            repo_id: ``owner/name``; a name alone is a repository of one's own.
            dtype: see `save_pretrained`.
            private: whether a new repository is; None leaves it to the owner's settings.
            token: by default the one that the hub's login keeps.
            message: of the commit.

        Returns:
            The address of the commit.

        Raises:
            ValueError: the hub refuses; the message has its reason.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with _uploading(repo_id):
            whole_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as temporary:
            self.save_pretrained(temporary, dtype, name=whole_id)
            with _uploading(whole_id):
                return str(
                    api.upload_folder(
                        repo_id=whole_id, folder_path=temporary, commit_message=message
                    )
                )

    def reading_settings(self, mode: ReadingMode = "reset") -> ReadingSettings:
        """What validation chose for a reading mode.

        Raises:
            ValueError: another mode than "reset" and "carry".
        """
        if mode not in ("reset", "carry"):
            raise ValueError(
                f"unknown reading mode; expected 'reset' or 'carry', found {mode!r}; choose one"
            )
        return self.config.reset if mode == "reset" else self.config.carry

    def encode(self, text: str) -> NDArray[np.int32]:
        """Token ids of a text, [tokens]."""
        return self.vocabulary.encode(text).tokens

    def reader(self, mode: ReadingMode = "reset") -> AdaptiveReader:
        """A reader with the tuned settings of a mode.

        Args:
            mode: "reset" for texts each for itself, "carry" for a stream of them, whose state is
                handed on from text to text.

        Raises:
            ValueError: another mode, or settings that flush without what tells where articles
                begin.
        """
        reading = self.reading_settings(mode)
        rule = copy.deepcopy(self.rule)
        set_scales(rule, reading.settings)
        return AdaptiveReader(
            self.model,
            Flushing(rule, self._starts(), rows=False) if reading.flush else rule,
            choose(self.model, self.config.rule.adapt),
            segment=reading.segment,
            start_token=END_OF_LINE,
            initial_state=self.model.initial_state,
            batch_first=False,
            surprise=reading.settings.get(SURPRISE, 0.0),
        )

    def trained_models(self) -> TrainedModels:
        """The same weights as the evaluation takes them: the joint model and its rule alone."""
        return TrainedModels(
            models={"joint": self.model},
            rules={"joint": self.rule},
            rival_names=(),
            statistics={},
            starts=self.starts,
        )

    def methods(self, mode: ReadingMode = "reset") -> list[Method]:
        """What the evaluation compares: the model static, learning, and learning with the cache."""
        reading = self.reading_settings(mode)
        way: Learning = "joint-flush" if reading.flush else "joint"
        learning = Method(
            name=NAMES[way],
            model="joint",
            learning=way,
            segment=reading.segment,
            settings=dict(reading.settings),
        )
        static = Method(name=NAMES["none"], model="joint", learning="none", segment=64)
        cached = learning.with_(name=f"{learning.name} + cache", cache=reading.cache)
        return [static, learning, cached]

    def _starts(self) -> ArticleStarts:
        if self.starts is None:
            raise ValueError(
                "nothing tells where articles begin; expected starts, since the settings flush, "
                "found none; give them, or change the settings"
            )
        return self.starts


def _taken_starts(tensors: dict[str, Tensor], config: PretrainedConfig) -> ArticleStarts | None:
    """What tells where articles begin, its tensors taken out of the others.

    Raises:
        ValueError: tensors of another form, or none where the settings flush.
    """
    found = {name: tensors.pop(name) for name in list(tensors) if name.startswith(_STARTS)}
    if not found:
        if config.reset.flush or config.carry.flush:
            raise ValueError("expected what tells where articles begin, found no such tensors")
        return None
    network = ArticleStarts(config.model.vocabulary_size)
    try:
        network.load_state_dict({key.removeprefix(_STARTS): t for key, t in found.items()})
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"expected what tells where articles begin, found '{reason}'") from error
    return network.eval().requires_grad_(False)


def _local_folder(source: str | Path) -> Path | None:
    """The folder that a source means; None if only the hub can have it."""
    if source == "shipped":
        if not (SHIPPED / pretrained_files.CONFIG).is_file():
            raise ValueError(
                f"this copy of metalm carries no model; expected one in {SHIPPED}, found none; "
                "make it with python -m metalm.language.ship RUN, or name a folder"
            )
        return SHIPPED
    if Path(source).is_dir():
        return Path(source)
    if isinstance(source, str) and re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        return None
    raise ValueError(
        f"there is no model {str(source)!r}; expected a folder, 'shipped', or owner/name on the "
        "hub, found no such folder; check the path"
    )


@contextmanager
def _uploading(repo_id: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{repo_id!r} cannot be uploaded; expected a repository of yours and a login that may "
            f"write, found '{error}'; log in with `hf auth login`, or pass a token"
        ) from error


def _download(
    repo_id: str,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | Path | None,
    local_files_only: bool,
) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=list(pretrained_files.FILES),
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"there is no model {repo_id!r}; expected a folder of that name or a repository on the "
            f"hub, found '{error}'; check the name, the network and the login"
        ) from error
    return Path(folder)
