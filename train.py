"""Train a language model that learns while it reads, and compare it with its rivals.

    python train.py                                            # the embedded default, a few minutes
    python train.py --preset small --data.source wikitext-2    # WikiText-2, about two hours on two cores
    python train.py --preset small --dry-run                   # print the resolved configuration
"""
import sys
from pathlib import Path
import torch
from data_prep.corpora import prepare
from dataclasses import replace
from metalm.language.articles import open_corpus
from metalm.language.presets import PRESETS
from metalm.language.run_folder import RunFolder
from metalm.language.stages import Stages
from metalm.training.allocator import keep_freed_memory
if __name__ == "__main__":
    keep_freed_memory()
    src, stages, run = sys.argv[1:4]
    config = PRESETS["small"]()
    config = replace(config, data=replace(config.data, source=src))
    torch.set_num_threads(int(sys.argv[4]))
    corpus = open_corpus(prepare(src, tokenizer=config.data.tokenizer, vocabulary_size=config.model.vocabulary_size, root=Path(config.data.root)))
    folder = RunFolder(run)
    folder.write_configuration(config)
    s = Stages(config, corpus, folder)
    for name in stages.split(","):
        s.train(name)
