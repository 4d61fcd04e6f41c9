"""What a person sees while a run trains: Lightning's bars, and a line that stays for each epoch."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from rslp.train.module import JointModule


class RunProgress(RichProgressBar):
    """Progress bars, and after each validation the scores of the run and of its datasets (0 floor … 1 best)."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave a line behind."""
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn != TrainerFn.FITTING or not trainer.is_global_zero:
            return
        if self.progress is None or not isinstance(pl_module, JointModule):
            return
        names = [None, *pl_module.datasets()]
        scores = [(name or "score", pl_module.score("val", name)) for name in names]
        shown = "  ".join(f"{name} {value:.3f}" for name, value in scores if value is not None)
        epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        self.progress.console.print(f"{epoch}  {shown}", highlight=False, soft_wrap=True)
