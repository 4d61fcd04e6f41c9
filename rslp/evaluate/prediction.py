"""Predict with a run's checkpoint: write files or dataset layers for the windows of each dataset."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rslearn.train.prediction_writer import RslearnWriter

from rslp import upstream
from rslp.data.batches import Batch, explain_worker_death
from rslp.data.datamodule import MultiDatasetDataModule
from rslp.errors import RunError
from rslp.evaluate.crops import WindowAssembler
from rslp.evaluate.destinations import PredictionDestination, RunFolder, find_layers, skipped_layer
from rslp.evaluate.evaluation import git_commit, name_in, samples_fingerprint
from rslp.io import append, read_yaml, write_atomic
from rslp.rundir import RunDir, sha256
from rslp.train.build import InstantiatedRun, build, config_for
from rslp.train.checkpoints import load_weights, read_with_digest
from rslp.upstream.task_kinds import tasks_by_name

SCHEMA = 1


def predict(run: RunDir, *, checkpoint: str | None = None) -> dict[str, Any] | None:
    """Predict the windows of each dataset.

    After an interruption the next call continues where this one stopped.

    Args:
        run: the run directory.
        checkpoint: path of the checkpoint; the run's best one when None.

    Returns:
        The summary that ``predictions.json`` holds; None when the user interrupted the prediction.

    Raises:
        RunError: the run has no checkpoint yet, another process predicts in it, or a layer can't take the predictions.
        CheckpointError: the checkpoint can't be read or does not fit the model of the config.
        ConfigError: the config can't be used.
        DataError: a dataset can't be used, or a sample can't be read and the config's ``on_fault`` is stop.
    """
    path = run.find_checkpoint(checkpoint)
    upstream.write_whole_files()
    with run.locked("predict"):
        content, digest = read_with_digest(run, path)
        cli = build(run, training=False, predicting=True)
        load_weights(cli.model, content, path=path)
        splits = _choose_splits(run, cli.datamodule)
        destinations = _destinations(run, cli)
        header = {
            "checkpoint_sha256": digest,
            "config_sha256": sha256(config_for(run, predicting=True)),
            "data_fingerprint": samples_fingerprint(cli.datamodule.sources("predict")),
        }
        progress = PredictionProgress.begin(run, header)
        if not _write_all(cli, destinations, progress):
            return None
        summary = {
            "schema": SCHEMA,
            "run": f"{run.project}/{run.experiment}",
            "checkpoint": name_in(run, path),
            "checkpoint_sha256": digest,
            "step": content["global_step"],
            "commit": git_commit(),
            "data_fingerprint": header["data_fingerprint"],
            "faults": cli.datamodule.bad_sample_record.messages("predict"),
            "datasets": {
                name: {
                    "split": splits[name],
                    "windows": len(windows_of(cli.datamodule, name) & progress.written(name)),
                    "left_out": len(windows_of(cli.datamodule, name) - progress.written(name)),
                    "tasks": destination.described(),
                }
                for name, destination in destinations.items()
            },
        }
        write_atomic(run.prediction_marker, json.dumps(summary, indent=1) + "\n")
        run.prediction_progress.unlink(missing_ok=True)
    return summary


class PredictionProgress:
    """The windows that are written so far, recorded one by one in ``predictions/progress.jsonl``.

    Args:
        path: the file.
        header: identifies checkpoint, config and data; a prediction of others starts anew.
        written: the windows so far: dataset, group, name.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], written: list[tuple[str, str, str]]) -> None:
        self._written = written
        self._path = path
        # Rewritten, since the last line may be incomplete.
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in (header, *written)))

    @classmethod
    def begin(cls, run: RunDir, header: Mapping[str, Any]) -> PredictionProgress:
        """Continue an interrupted prediction with the same header, or start anew and remove ``predictions/``.

        Raises:
            RunError: files of an earlier prediction can't be removed.
        """
        written = [] if run.prediction_marker.exists() else _read_progress(run.prediction_progress, header)
        run.prediction_marker.unlink(missing_ok=True)
        if not written:
            shutil.rmtree(run.predictions, ignore_errors=True)
            if os.path.lexists(run.predictions):
                raise RunError(f"{run.predictions} can't be removed (a link, or no permission): move it away")
        return cls(run.prediction_progress, header, written)

    def note(self, dataset: str, identity: tuple[str, str]) -> None:
        """Record a window (group and name) whose files are complete."""
        self._written.append((dataset, *identity))
        append(self._path, json.dumps(self._written[-1]).encode() + b"\n")

    def written(self, dataset: str) -> set[tuple[str, str]]:
        """Group and name of the windows of a dataset that are written."""
        return {(group, name) for owner, group, name in self._written if owner == dataset}


def _read_progress(path: Path, header: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The windows in a progress file with this header; none if the header is another one."""
    if not path.is_file():
        return []
    lines: list[Any] = []
    for line in path.read_bytes().splitlines():
        try:
            lines.append(json.loads(line.decode()))
        except ValueError:
            # Incomplete: the process was killed while it wrote.
            break
    if not lines or lines[0] != header:
        return []
    return [tuple(line) for line in lines[1:] if isinstance(line, list) and list(map(type, line)) == [str] * 3]


class PredictionWriter(Callback):
    """Writes each window as soon as all of its crops are predicted.

    Args:
        destinations: where each dataset's predictions go.
        progress: record of the written windows.
    """

    def __init__(self, destinations: Mapping[str, PredictionDestination], progress: PredictionProgress) -> None:
        self._destinations = destinations
        self._progress = progress
        self._assemblers = {name: WindowAssembler(target.tasks) for name, target in destinations.items()}

    def on_predict_batch_end(
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: LightningModule,  # noqa: ARG002
        outputs: Any,
        batch: list[Batch],
        batch_idx: int,  # noqa: ARG002
        dataloader_idx: int = 0,  # noqa: ARG002
    ) -> None:
        """Write the windows whose last crop is in this batch."""
        for part, part_outputs in zip(batch, outputs, strict=True):
            for window in self._assemblers[part.dataset].take(part, part_outputs):
                self._destinations[part.dataset].write(window)
                self._progress.note(part.dataset, window.identity)


def windows_of(data: MultiDatasetDataModule, dataset: str) -> set[tuple[str, str]]:
    """Group and name of the windows of a dataset that are to be predicted."""
    source = data.sources("predict")[dataset]
    return {source.window(i) for i in range(len(source))}


def _choose_splits(run: RunDir, data: MultiDatasetDataModule) -> dict[str, str]:
    """Choose the split to predict of each dataset: ``predict`` if its config has one, otherwise ``test``."""
    config = read_yaml(config_for(run, predicting=True)).data["data"]["init_args"]["data_modules"]
    splits = {
        name: "predict" if "predict_config" in config[name].get("init_args", {}) else "test"
        for name in data.data_modules
    }
    data.predict_test_split(name for name, split in splits.items() if split == "test")
    return splits


def _destinations(run: RunDir, cli: InstantiatedRun) -> dict[str, PredictionDestination]:
    """Find out where the predictions of each dataset go, and take rslearn's writers out of the trainer's callbacks."""
    modules, sources = cli.datamodule.data_modules, cli.datamodule.sources("predict")
    callbacks: list[Callback] = cli.trainer.callbacks  # type: ignore[attr-defined]
    writers = [callback for callback in callbacks if isinstance(callback, RslearnWriter)]
    # As callbacks they would expect rslearn's batches, of one dataset; PredictionWriter calls them instead.
    cli.trainer.callbacks = [callback for callback in callbacks if callback not in writers]  # type: ignore[attr-defined]
    layers = find_layers(modules, writers)
    return {
        name: PredictionDestination(
            tasks=tasks_by_name(module.task, name),
            layers=layers[name],
            folder=RunFolder(run.predictions / name, begun=run.predictions / ".begun"),
            overlap=sources[name].overlap,
        )
        for name, module in modules.items()
    }


def _write_all(
    cli: InstantiatedRun, destinations: Mapping[str, PredictionDestination], progress: PredictionProgress
) -> bool:
    """Predict all windows that are not written yet; False when the user interrupted it."""
    data = cli.datamodule
    done = {name: _done(data, destination, progress, name) for name, destination in destinations.items()}
    data.leave_out(done)
    if all(windows_of(data, name) <= set(done[name]) for name in destinations):
        return True
    cli.trainer.callbacks.append(PredictionWriter(destinations, progress))  # type: ignore[attr-defined]
    upstream.keep_signal_handlers(cli.trainer)
    try:
        with explain_worker_death():
            cli.trainer.predict(cli.model, datamodule=data, return_predictions=False)
    except SystemExit as error:
        # Lightning ends the process itself after a Ctrl-C.
        if isinstance(error.__context__, KeyboardInterrupt):
            return False
        raise
    return True


def _done(
    data: MultiDatasetDataModule, destination: PredictionDestination, progress: PredictionProgress, name: str
) -> Collection[tuple[str, str]]:
    """The windows of a dataset that are written already, or have the layer that marks windows to be skipped."""
    done = {identity for identity in progress.written(name) if destination.has(identity)}
    if (layer := skipped_layer(data.data_modules[name])) is not None:
        done |= data.sources("predict")[name].windows_with(layer)
    return done
