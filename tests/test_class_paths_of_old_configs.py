"""Class paths of run configs stay: what an earlier commit's configs name is still there, or has an alias."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch import Callback, LightningDataModule
from rslearn.train.optimizer import OptimizerFactory
from rslearn.train.scheduler import SchedulerFactory
from rslearn.train.tasks.task import Task
from torch.nn import Module

from rslp.rundir import RunDir
from rslp.runtime import class_paths
from rslp.train.build import build
from tests.tiny import run_config, write_dataset, write_run
from tests.train.directly import assert_alike, both

# What commit 6cf81e1 names in its configs, its docs and its table of classes, and as what; names were listed by
#   git grep -hoP 'class_path: *\K[\w.]+\.[A-Z]\w+' 6cf81e1 -- data docs examples rslp README.md
#   git show 6cf81e1:rslp/compose/vocabulary.json | grep -oP '^"\Krslp[^"]*'
NAMED: dict[str, type] = {
    "lightning.pytorch.callbacks.LearningRateMonitor": Callback,
    "rslearn.models.conv.Conv": Module,
    "rslearn.models.faster_rcnn.FasterRCNN": Module,
    "rslearn.models.galileo.GalileoModel": Module,
    "rslearn.models.pooling_decoder.PoolingDecoder": Module,
    "rslearn.models.unet.UNetDecoder": Module,
    "rslearn.train.callbacks.freeze_unfreeze.FreezeUnfreeze": Callback,
    "rslearn.train.data_module.RslearnDataModule": LightningDataModule,
    "rslearn.train.optimizer.AdamW": OptimizerFactory,
    "rslearn.train.scheduler.CosineAnnealingScheduler": SchedulerFactory,
    "rslearn.train.scheduler.MultiStepScheduler": SchedulerFactory,
    "rslearn.train.scheduler.PlateauScheduler": SchedulerFactory,
    "rslearn.train.tasks.classification.ClassificationHead": Module,
    "rslearn.train.tasks.classification.ClassificationTask": Task,
    "rslearn.train.tasks.detection.DetectionTask": Task,
    "rslearn.train.tasks.multi_task.MultiTask": Task,
    "rslearn.train.tasks.regression.RegressionHead": Module,
    "rslearn.train.tasks.regression.RegressionTask": Task,
    "rslearn.train.tasks.segmentation.SegmentationHead": Module,
    "rslearn.train.tasks.segmentation.SegmentationTask": Task,
    "rslearn.train.transforms.concatenate.Concatenate": Module,
    "rslearn.train.transforms.crop.Crop": Module,
    "rslearn.train.transforms.flip.Flip": Module,
    "rslearn.train.transforms.mask.Mask": Module,
    "rslp.helios.galileo.Galileo": Module,
    "rslp.helios.model.Helios": Module,
    "rslp.helios.norm.HeliosNormalize": Module,
    "rslp.helios.pad.Pad": Module,
    "rslp.helios.tasks.MarineInfraTask": Task,
    "rslp.train.Freeze": Callback,
    "rslp.train.JointModel": Module,
    "rslp.train.JointModule": Module,
    "rslp.train.LayerwiseAdamW": OptimizerFactory,
    "rslp.train.MultiDatasetDataModule": LightningDataModule,
    "rslp.train.checkpoints.RunCheckpoints": Callback,
    "rslp.train.heads.WeightedClassificationHead": Module,
    "rslp.train.surgery.MiniPCGrad": Callback,
}

# The modules that these classes lie in: a person who reads the code may name a class there.
DEEP = {
    "rslp.models.joint.JointModel": "rslp.train.JointModel",
    "rslp.train.module.JointModule": "rslp.train.JointModule",
    "rslp.data.datamodule.MultiDatasetDataModule": "rslp.train.MultiDatasetDataModule",
    "rslp.models.optim.Freeze": "rslp.train.Freeze",
    "rslp.models.optim.LayerwiseAdamW": "rslp.train.LayerwiseAdamW",
}


@pytest.mark.parametrize(("path", "kind"), NAMED.items(), ids=NAMED)
def test_a_class_path_leads_to_a_class_of_its_kind(path: str, kind: type) -> None:
    assert issubclass(class_paths.resolve(path), kind)


@pytest.mark.parametrize(("deep", "short"), DEEP.items(), ids=DEEP)
def test_a_module_leads_to_the_same_class(deep: str, short: str) -> None:
    assert class_paths.resolve(deep) is class_paths.resolve(short)


def test_a_config_that_names_modules_is_read_like_one_that_does_not(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("data")
    dataset = str(write_dataset(folder / "classify", "classify"))

    def written(*, deep: bool) -> RunDir:
        config = run_config({"classify": (dataset, "classify")})
        module: dict[str, Any] = config["model"]["init_args"]
        module["optimizer"] = {"class_path": "rslp.train.LayerwiseAdamW", "init_args": {"lr": 0.01}}
        freeze = {"class_path": "rslp.train.Freeze", "init_args": {"modules": "model.encoder"}}
        config["trainer"]["callbacks"] = [freeze]
        for part in (config["model"], module["model"], module["optimizer"], config["data"], freeze) if deep else ():
            (part["class_path"],) = [path for path, short in DEEP.items() if short == part["class_path"]]
        return write_run(tmp_path_factory.mktemp("run"), config)

    deep, short = (build(written(deep=deep), training=True) for deep in (True, False))
    for part in ("model", "datamodule"):
        assert type(getattr(deep, part)) is type(getattr(short, part))
    assert [type(callback) for callback in deep.trainer.callbacks] == [type(c) for c in short.trainer.callbacks]
    assert_alike(*both(written(deep=True)))
