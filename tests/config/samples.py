"""A small, sound set of configs that tests take apart, and ways to compose it."""

import re
from pathlib import Path
from typing import Any

import yaml

from rslp.cli.main import main

BASE = """\
model:
  class_path: rslp.train.JointModule
  init_args:
    model:
      class_path: rslp.train.JointModel
      init_args:
        encoder:
          - class_path: rslp.helios.model.Helios
            init_args:
              checkpoint_path: "{CHECKPOINT_PATH}"
              forward_kwargs:
                patch_size: {PATCH_SIZE}
              embedding_size: {ENCODER_EMBEDDING_SIZE}
        decoders:
    optimizer:
      class_path: rslearn.train.optimizer.AdamW
      init_args:
        lr: 1e-4
data:
  class_path: rslp.train.MultiDatasetDataModule
  init_args:
    data_modules:
trainer:
  max_epochs: 10
  callbacks:
    - class_path: lightning.pytorch.callbacks.LearningRateMonitor
rslp_project: placeholder
rslp_experiment: placeholder
"""

CROPS = """\
model:
  init_args:
    model:
      init_args:
        encoder:
          - class_path: some.other.Encoder
        decoders:
          crops:
            - class_path: rslearn.models.pooling_decoder.PoolingDecoder
              init_args:
                in_channels: {ENCODER_EMBEDDING_SIZE}
                out_channels: 3
            - class_path: rslearn.train.tasks.classification.ClassificationHead
    lr: 5
data:
  class_path: rslearn.train.data_module.RslearnDataModule
  init_args:
    path: /data/crops
    inputs:
      s2:
        data_type: raster
        layers: ["sentinel2"]
        bands: ["B02"]
    task:
      class_path: rslearn.train.tasks.multi_task.MultiTask
      init_args:
        tasks:
          crops:
            class_path: rslearn.train.tasks.classification.ClassificationTask
            init_args:
              property_name: category
              classes: ["a", "b", "c"]
        input_mapping:
          crops:
            label: targets
    batch_size: 4
    num_workers: 2
    train_config:
      groups: ["one"]
      transforms:
        - class_path: rslearn.train.transforms.flip.Flip
          init_args:
            image_selectors: ["s2", "target/crops/classes"]
    val_config:
      groups: ["two"]
trainer:
  max_epochs: 99
"""

FIELDS = """\
model:
  init_args:
    model:
      init_args:
        decoders:
          fields:
            - class_path: rslearn.models.unet.UNetDecoder
              init_args:
                in_channels: [[{PATCH_SIZE}, {ENCODER_EMBEDDING_SIZE}]]
                out_channels: 5
                num_channels: {4: 64, 2: 32, 1: 16}
            - class_path: rslearn.train.tasks.segmentation.SegmentationHead
        loss_weights:
          fields: 0.5
data:
  class_path: rslearn.train.data_module.RslearnDataModule
  init_args:
    path: /data/fields
    inputs: {}
    task:
      class_path: rslearn.train.tasks.multi_task.MultiTask
      init_args:
        tasks:
          fields:
            class_path: rslearn.train.tasks.segmentation.SegmentationTask
            init_args:
              num_classes: 5
        input_mapping:
          fields:
            mask: targets
    batch_size: 2
    train_config:
      crop_size: 64
      tags:
        split: train
"""

# A second file for `fields`, laid over the first one.
FIELDS_MORE = """\
data:
  init_args:
    batch_size: 8
    train_config:
      tags:
        cloud: low
"""

TWO = """\
model:
  init_args:
    model:
      init_args:
        decoders:
          height:
            - class_path: rslearn.models.pooling_decoder.PoolingDecoder
              init_args: {in_channels: 16, out_channels: 1}
            - class_path: rslearn.train.tasks.regression.RegressionHead
          kind:
            - class_path: rslearn.models.pooling_decoder.PoolingDecoder
              init_args: {in_channels: 16, out_channels: 2}
            - class_path: rslearn.train.tasks.classification.ClassificationHead
data:
  class_path: rslearn.train.data_module.RslearnDataModule
  init_args:
    path: /data/two
    inputs: {}
    task:
      class_path: rslearn.train.tasks.multi_task.MultiTask
      init_args:
        tasks:
          height:
            class_path: rslearn.train.tasks.regression.RegressionTask
            init_args: {property_name: h}
          kind:
            class_path: rslearn.train.tasks.classification.ClassificationTask
            init_args: {property_name: k, classes: [x, y]}
        input_mapping:
          height: {label: targets}
          kind: {label: targets}
    batch_size: 4
"""

CHECKPOINT = "/models/helios # v0.2: 'base'"

MULTI = f"""\
base_cfg: base.yaml
dataset_cfgs:
  - crops.yaml
  - - fields.yaml
    - fields_more.yaml
patch_size: 4
encoder_embedding_size: 16
helios_checkpoint_path: "{CHECKPOINT}"
output_path: OUT.yaml
"""

FILES = {
    "base.yaml": BASE,
    "crops.yaml": CROPS,
    "fields.yaml": FIELDS,
    "fields_more.yaml": FIELDS_MORE,
    "two.yaml": TWO,
    "multi.yaml": MULTI,
}


def write(folder: Path, **changed: str) -> Path:
    """Write the configs into a folder; ``crops=…`` replaces crops.yaml. Gives the multi-dataset config's path."""
    for name, text in {**FILES, **{f"{key}.yaml": text for key, text in changed.items()}}.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder / "multi.yaml"


def composed(folder: Path, *options: str, **changed: str) -> dict[str, Any]:
    """Write, compose through the real command line, and load what came out."""
    path = write(folder, **changed)
    assert main(["helios", "make_multidataset_config", "--cfg", str(path), *options]) == 0
    with (folder / "OUT.yaml").open(encoding="utf-8") as stream:
        return yaml.safe_load(stream)


def replaced(text: str, old: str, new: str) -> str:
    """Replace exactly one occurrence, so that a test cannot silently test nothing."""
    assert len(re.findall(re.escape(old), text)) == 1, old
    return text.replace(old, new)


def line(text: str, needle: str, nth: int = 1) -> int:
    """Give the 1-based line of the nth occurrence of a text."""
    return [number for number, row in enumerate(text.splitlines(), 1) if needle in row][nth - 1]
