"""An alias: class paths of run configs name ``rslp.train.heads``; the classes are in ``rslp.models.heads``."""

from rslp.models.heads import WeightedClassificationHead

__all__ = ["WeightedClassificationHead"]
