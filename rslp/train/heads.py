"""An alias: class paths of run configs name ``rslp.train.heads``; the classes are in ``rslp.models``."""

from rslp.models.heads import WeightedClassificationHead
from rslp.models.segmentation_head import SegmentationHead

__all__ = ["SegmentationHead", "WeightedClassificationHead"]
