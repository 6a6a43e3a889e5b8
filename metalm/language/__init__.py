"""A language model that learns while it reads, its rivals, and everything that judges them.

The rooms: `text` (tokens and articles), `network` (the model), `reading` (score, then learn; the
cache), `training` (of models and rules), `tuning` (of settings), `memory` (what is kept for long),
`run` (from data to report). At the top is what is handed out: `pretrained`, `own_texts`, `ship`.
"""
