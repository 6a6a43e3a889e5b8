"""The training loop, its checkpoints and its record: takes callables, knows no domain.

Import from the modules: `metalm.training.loop`, `metalm.training.checkpoint`,
`metalm.training.state`, `metalm.training.record`, `metalm.training.stop`.
"""
