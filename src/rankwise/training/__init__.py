"""The `train` command: a validated configuration, TRL's SFTTrainer, and a run record."""

from rankwise.training.config import RunConfig, load_config
from rankwise.training.run_folder import TrainingRun
from rankwise.training.train import train

__all__ = ["RunConfig", "TrainingRun", "load_config", "train"]
