"""Predict with a run's checkpoint: files for the windows of each dataset that are to be predicted."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rslearn.train.prediction_writer import RslearnWriter

from rslp.evaluate.crops import Gathering
from rslp.evaluate.evaluation import checkpoint_of, fingerprint, git_commit, name_in
from rslp.evaluate.layers import find_layers, skipped_layer
from rslp.evaluate.places import Folder, Target
from rslp.evaluate.progress import Progress
from rslp.evaluate.table import print_predictions
from rslp.files import read_yaml, write_atomic
from rslp.run import RunDir, sha256
from rslp.train import adapters
from rslp.train.batches import Batch
from rslp.train.checkpoints import load_weights, read_with_digest
from rslp.train.cli import build, config_for
from rslp.train.data import MultiDatasetDataModule
from rslp.train.direct import Made
from rslp.train.floors import tasks_by_name
from rslp.train.reading import workers_watched

SCHEMA = 1
INTERRUPTED = 130


def predict(run: RunDir, *, checkpoint: str | None = None) -> int:
    """Predict, write files, say where they are; started again after an interruption, it goes on.

    Args:
        run: the run directory.
        checkpoint: path of the checkpoint; the run's best one when None.

    Returns:
        the exit code: 0 when all is written, 130 when the user interrupted it.

    Raises:
        RunError: the run has no checkpoint yet, another process predicts in it, or a layer can't take the predictions.
        CheckpointError: the checkpoint can't be read or does not fit the model of the config.
        ConfigError: the config can't be used.
        DataError: a dataset can't be used, or a sample can't be read and the config's ``on_fault`` is stop.
    """
    path = checkpoint_of(run, checkpoint)
    adapters.write_whole_files()
    with run.locked("predict"):
        content, digest = read_with_digest(run, path)
        cli = build(run, training=False, predicting=True)
        load_weights(cli.model, content, path=path)
        splits = _choose_splits(run, cli.datamodule)
        targets = _targets(run, cli)
        data = fingerprint(cli.datamodule.sources("predict"))
        config = sha256(config_for(run, predicting=True))
        progress = Progress.begin(run, {"checkpoint_sha256": digest, "config_sha256": config, "data_fingerprint": data})
        through = _write_all(cli, targets, progress)
        if not through:
            _say("interrupted: the same command goes on from the last window that was written")
            return INTERRUPTED
        summary = {
            "schema": SCHEMA,
            "run": f"{run.project}/{run.experiment}",
            "checkpoint": name_in(run, path),
            "checkpoint_sha256": digest,
            "step": content["global_step"],
            "commit": git_commit(),
            "data_fingerprint": data,
            "faults": cli.datamodule.faults.messages("predict"),
            "datasets": {
                name: {
                    "split": splits[name],
                    "windows": len(windows_of(cli.datamodule, name) & progress.written(name)),
                    "left_out": len(windows_of(cli.datamodule, name) - progress.written(name)),
                    "tasks": target.described(),
                }
                for name, target in targets.items()
            },
        }
        write_atomic(run.prediction_marker, json.dumps(summary, indent=1) + "\n")
        run.prediction_progress.unlink(missing_ok=True)
    print_predictions(summary)
    return 0


class Writer(Callback):
    """Writes each window as soon as all of its crops are predicted.

    Args:
        targets: where each dataset's predictions go.
        progress: where written windows are noted.
    """

    def __init__(self, targets: Mapping[str, Target], progress: Progress) -> None:
        self._targets = targets
        self._progress = progress
        self._gatherings = {name: Gathering(target.tasks) for name, target in targets.items()}

    def on_predict_batch_end(
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: LightningModule,  # noqa: ARG002
        outputs: Any,
        batch: list[Batch],
        batch_idx: int,  # noqa: ARG002
        dataloader_idx: int = 0,  # noqa: ARG002
    ) -> None:
        """Write what a batch has made whole."""
        for part, predicted in zip(batch, outputs, strict=True):
            for window in self._gatherings[part.dataset].take(part, predicted):
                self._targets[part.dataset].write(window)
                self._progress.note(part.dataset, window.identity)


def windows_of(data: MultiDatasetDataModule, dataset: str) -> set[tuple[str, str]]:
    """Group and name of the windows of a dataset that a prediction is of."""
    source = data.sources("predict")[dataset]
    return {source.window(i) for i in range(len(source))}


def _choose_splits(run: RunDir, data: MultiDatasetDataModule) -> dict[str, str]:
    """By dataset the split that is predicted: its own for that, if its config has one, or else the test split."""
    config = read_yaml(config_for(run, predicting=True)).data["data"]["init_args"]["data_modules"]
    splits = {
        name: "predict" if "predict_config" in config[name].get("init_args", {}) else "test"
        for name in data.data_modules
    }
    data.predict_test_split(name for name, split in splits.items() if split == "test")
    return splits


def _targets(run: RunDir, cli: Made) -> dict[str, Target]:
    """Where the predictions of each dataset go."""
    modules, sources = cli.datamodule.data_modules, cli.datamodule.sources("predict")
    callbacks: list[Callback] = cli.trainer.callbacks  # type: ignore[attr-defined]
    listed = [callback for callback in callbacks if isinstance(callback, RslearnWriter)]
    # They are asked directly: by themselves they know of one dataset alone, and of batches in rslearn's form.
    cli.trainer.callbacks = [callback for callback in callbacks if callback not in listed]  # type: ignore[attr-defined]
    layers = find_layers(modules, listed)
    return {
        name: Target(
            tasks=tasks_by_name(module.task, name),
            layers=layers[name],
            folder=Folder(run.predictions / name, begun=run.predictions / ".begun"),
            overlap=sources[name].overlap,
        )
        for name, module in modules.items()
    }


def _write_all(cli: Made, targets: Mapping[str, Target], progress: Progress) -> bool:
    """Predict all windows that are not written yet; False when the user interrupted it."""
    data, done = (
        cli.datamodule,
        {name: _not_again(cli.datamodule, target, progress, name) for name, target in targets.items()},
    )
    data.leave_out(done)
    if all(windows_of(data, name) <= set(done[name]) for name in targets):
        return True
    cli.trainer.callbacks.append(Writer(targets, progress))  # type: ignore[attr-defined]
    adapters.keep_signal_handlers(cli.trainer)
    try:
        with workers_watched():
            cli.trainer.predict(cli.model, datamodule=data, return_predictions=False)
    except SystemExit as leaving:
        # Lightning ends the process itself after a Ctrl-C.
        if isinstance(leaving.__context__, KeyboardInterrupt):
            return False
        raise
    return True


def _not_again(
    data: MultiDatasetDataModule, target: Target, progress: Progress, name: str
) -> Collection[tuple[str, str]]:
    """The windows of a dataset that are not predicted (again)."""
    done = {identity for identity in progress.written(name) if target.has(identity)}
    if (layer := skipped_layer(data.data_modules[name])) is not None:
        done |= data.sources("predict")[name].windows_with(layer)
    return done


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
