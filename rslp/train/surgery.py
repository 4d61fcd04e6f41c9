"""An alias: class paths of run configs name ``rslp.train.surgery``; the class is in ``rslp.train.callbacks``."""

from rslp.train.callbacks import MiniPCGrad

__all__ = ["MiniPCGrad"]
