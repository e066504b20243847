"""The `train` command: a validated configuration, TRL's SFTTrainer, and a run record.

`config` and `options` need no more than rankwise does; `train`, `data` and `fit` need the extra.
"""
