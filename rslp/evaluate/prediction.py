"""Predict with a run's checkpoint: files for the windows of each dataset that are to be predicted."""

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
from rslp.errors import INTERRUPTED, RunError
from rslp.evaluate.crops import WindowAssembler
from rslp.evaluate.destinations import PredictionDestination, RunFolder, find_layers, skipped_layer
from rslp.evaluate.evaluation import checkpoint_of, git_commit, name_in, samples_fingerprint
from rslp.evaluate.table import print_predictions
from rslp.io import append, read_yaml, write_atomic
from rslp.io.terminal import print_message
from rslp.rundir import RunDir, sha256
from rslp.train.baselines import tasks_by_name
from rslp.train.build import InstantiatedRun, build, config_for
from rslp.train.checkpoints import load_weights, read_with_digest


class PredictionProgress:
    """The windows that are written, noted one by one in ``predictions/progress.jsonl``.

    Args:
        path: the file.
        header: what the prediction is made of; another one does not go on from it.
        written: the windows so far: dataset, group, name.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], written: list[tuple[str, str, str]]) -> None:
        self._written = written
        self._path = path
        # Anew, since the last line may be torn.
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in (header, *written)))

    @classmethod
    def begin(cls, run: RunDir, header: Mapping[str, Any]) -> PredictionProgress:
        """Go on from what an interrupted prediction has written, if it was the same; else begin anew.

        What a former prediction has left in ``predictions/`` is removed then: windows of two would lie side by side.
        Where it can't be removed, that is a ``RunError``.
        """
        written = [] if run.prediction_marker.exists() else _read(run.prediction_progress, header)
        run.prediction_marker.unlink(missing_ok=True)
        if not written:
            shutil.rmtree(run.predictions, ignore_errors=True)
            if os.path.lexists(run.predictions):
                raise RunError(f"{run.predictions} can't be removed (a link, or no permission): move it away")
        return cls(run.prediction_progress, header, written)

    def note(self, dataset: str, identity: tuple[str, str]) -> None:
        """Note a window: it is written as a whole by now."""
        self._written.append((dataset, *identity))
        append(self._path, json.dumps(self._written[-1]).encode() + b"\n")

    def written(self, dataset: str) -> set[tuple[str, str]]:
        """Group and name of the windows of a dataset that are written."""
        return {(group, name) for of, group, name in self._written if of == dataset}


def _read(path: Path, header: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What a prediction with this header has noted; nothing of another one's."""
    if not path.is_file():
        return []
    lines: list[Any] = []
    for line in path.read_bytes().splitlines():
        try:
            lines.append(json.loads(line.decode()))
        except ValueError:
            # Torn: the process was killed while it wrote.
            break
    if not lines or lines[0] != header:
        return []
    return [tuple(line) for line in lines[1:] if isinstance(line, list) and list(map(type, line)) == [str] * 3]


SCHEMA = 1


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
    upstream.write_whole_files()
    with run.locked("predict"):
        content, digest = read_with_digest(run, path)
        cli = build(run, training=False, predicting=True)
        load_weights(cli.model, content, path=path)
        splits = _choose_splits(run, cli.datamodule)
        targets = _targets(run, cli)
        data = samples_fingerprint(cli.datamodule.sources("predict"))
        config = sha256(config_for(run, predicting=True))
        progress = PredictionProgress.begin(
            run, {"checkpoint_sha256": digest, "config_sha256": config, "data_fingerprint": data}
        )
        through = _write_all(cli, targets, progress)
        if not through:
            print_message("interrupted: the same command goes on from the last window that was written")
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


class PredictionWriter(Callback):
    """Writes each window as soon as all of its crops are predicted.

    Args:
        targets: where each dataset's predictions go.
        progress: where written windows are noted.
    """

    def __init__(self, targets: Mapping[str, PredictionDestination], progress: PredictionProgress) -> None:
        self._targets = targets
        self._progress = progress
        self._gatherings = {name: WindowAssembler(target.tasks) for name, target in targets.items()}

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


def _targets(run: RunDir, cli: InstantiatedRun) -> dict[str, PredictionDestination]:
    """Where the predictions of each dataset go."""
    modules, sources = cli.datamodule.data_modules, cli.datamodule.sources("predict")
    callbacks: list[Callback] = cli.trainer.callbacks  # type: ignore[attr-defined]
    listed = [callback for callback in callbacks if isinstance(callback, RslearnWriter)]
    # They are asked directly: by themselves they know of one dataset alone, and of batches in rslearn's form.
    cli.trainer.callbacks = [callback for callback in callbacks if callback not in listed]  # type: ignore[attr-defined]
    layers = find_layers(modules, listed)
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
    cli: InstantiatedRun, targets: Mapping[str, PredictionDestination], progress: PredictionProgress
) -> bool:
    """Predict all windows that are not written yet; False when the user interrupted it."""
    data, done = (
        cli.datamodule,
        {name: _not_again(cli.datamodule, target, progress, name) for name, target in targets.items()},
    )
    data.leave_out(done)
    if all(windows_of(data, name) <= set(done[name]) for name in targets):
        return True
    cli.trainer.callbacks.append(PredictionWriter(targets, progress))  # type: ignore[attr-defined]
    upstream.keep_signal_handlers(cli.trainer)
    try:
        with explain_worker_death():
            cli.trainer.predict(cli.model, datamodule=data, return_predictions=False)
    except SystemExit as leaving:
        # Lightning ends the process itself after a Ctrl-C.
        if isinstance(leaving.__context__, KeyboardInterrupt):
            return False
        raise
    return True


def _not_again(
    data: MultiDatasetDataModule, target: PredictionDestination, progress: PredictionProgress, name: str
) -> Collection[tuple[str, str]]:
    """The windows of a dataset that are not predicted (again)."""
    done = {identity for identity in progress.written(name) if target.has(identity)}
    if (layer := skipped_layer(data.data_modules[name])) is not None:
        done |= data.sources("predict")[name].windows_with(layer)
    return done
