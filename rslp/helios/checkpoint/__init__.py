"""Read checkpoints of Helios models without running code that they name."""

from rslp.helios.checkpoint.architecture import Architecture
from rslp.helios.checkpoint.forms import Checkpoint, load_encoder, open_checkpoint

__all__ = ["Architecture", "Checkpoint", "load_encoder", "open_checkpoint"]
