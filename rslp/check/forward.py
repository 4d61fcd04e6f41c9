"""Send two samples of a dataset through the model, to find layers and data that do not fit together."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Sequence

import torch
from rslearn.dataset import Window
from rslearn.train.dataset import SplitConfig
from rslearn.train.model_context import ModelContext

from rslp.check.encoder import ENCODER_PATH
from rslp.check.findings import Finding
from rslp.check.view import DatasetView
from rslp.data.batches import Batch, collate
from rslp.data.samples import SampleSource
from rslp.errors import KeyPath, UserError
from rslp.models.joint import JointModel
from rslp.runtime.seeds import seeded
from rslp.train.instantiate import CONSTRUCTOR_ERRORS

_DECODERS: KeyPath = (*ENCODER_PATH[:-1], "decoders")


def check_forward(view: DatasetView, windows: Sequence[Window], model: JointModel) -> list[Finding]:
    """Read, transform, encode and decode the first two training samples, with their losses, without gradients.

    Args:
        view: the dataset.
        windows: its training windows.
        model: the model, its datasets set; left in training mode.

    Returns:
        An error if an exception is raised, or one for each loss that is not finite.
    """
    try:
        with seeded(0):
            batch = _batch(view, windows[:2])
            model.train()
            with torch.no_grad():
                output = model(ModelContext(inputs=batch.inputs, metadatas=batch.metadatas), batch.targets)
    except UserError as error:
        return [Finding(f"dataset {view.name!r}: {' '.join(str(error).split())}", (*view.at, "path"), id="forward")]
    except (*CONSTRUCTOR_ERRORS, IndexError) as error:
        reason = " ".join(str(error).split())[:300] or "without a message"
        message = f"dataset {view.name!r}: two samples don't go through the model: {type(error).__name__}: {reason}"
        return [Finding(message, _failing_part(view, error), id="forward")]
    bad = [name for name, loss in output.loss_dict.items() if not torch.isfinite(loss).all()]
    return [Finding(f"dataset {view.name!r}: the loss {name} is not finite", view.at, id="forward") for name in bad]


def _batch(view: DatasetView, windows: Sequence[Window]) -> Batch:
    # With the names given, only these windows are listed, whatever the size of the dataset.
    narrowed = SplitConfig.merge_and_validate([view.split("train"), SplitConfig(names=[w.name for w in windows])])
    module = copy.copy(view.module)
    module.split_configs = {**module.split_configs, "train": narrowed}
    source = SampleSource(view.name, data_module=module, split="train", seed=0)
    return collate([(source.sample(index % len(source)), ()) for index in range(2)], dataset=view.name)


def _failing_part(view: DatasetView, error: BaseException) -> KeyPath:
    """Key path of the decoder, the encoder or the data, by the functions in the exception's traceback."""
    names = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    if "_decode" in names:
        return (*_DECODERS, next(iter(view.tasks)))
    return ENCODER_PATH if "encode" in names else view.at
