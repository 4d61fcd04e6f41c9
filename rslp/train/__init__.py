"""What runs inside a job: data, mixture, model, module, checkpoints, entry point."""

from rslp.train.data import MultiDatasetDataModule
from rslp.train.model import JointModel
from rslp.train.module import JointModule

__all__ = ["JointModel", "JointModule", "MultiDatasetDataModule"]
