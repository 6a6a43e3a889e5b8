"""metalm: language models and meta-learners whose fast weights are rewritten while they read.

The rooms: `meta` (the core: one unroll, update rules, meta-gradients), `adapt` (reading with any
model of your own), `language` (metalm's language model, its rivals, trainings and saved models),
`fewshot` (learning from few examples), `analysis` (what the reading bought), `training` (the loop
that survives a kill).
"""

__version__ = "0.1.0"
