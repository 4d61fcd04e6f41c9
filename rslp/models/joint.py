"""The joint model: one encoder and a decoder for each task.

A batch has samples of one dataset, which may have several tasks; it runs through the decoders of these tasks alone. A
decoder is a list of modules, the last of which, the head, predicts and computes the loss. Where tasks share a head,
each has a range of the head's classes (``LabelRange``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from rslearn.models.component import FeatureExtractor, FeatureMaps, IntermediateComponent, Predictor
from rslearn.models.trunk import DecoderTrunk
from rslearn.train.model_context import ModelContext, ModelOutput

from rslp.errors import ConfigError, Problem
from rslp.models.adapters import Adapter, EncoderAdapters
from rslp.models.denominators import loss_denominator
from rslp.models.heads import LabelRange
from rslp.upstream import fix_token_order, log_once

_MODEL_KEY = "model.init_args.model.init_args"
# rslearn's detector, by name, since importing torchvision's detectors takes half a second.
_DETECTOR = "rslearn.models.faster_rcnn.FasterRCNN"


@dataclass
class Features:
    """Output of the first modules of an encoder for a batch; from the feature cache it is given to ``JointModel``.

    Attributes:
        depth: number of these modules, at least 1.
        value: ``FeatureMaps`` of ``B C H W``, ``TokenFeatureMaps`` of ``B C H W N``, or a ``FeatureVector`` of ``B C``.
    """

    depth: int
    value: Any


@dataclass
class JointOutput(ModelOutput):
    """Outputs of a batch, and its losses by task.

    Attributes:
        losses: for each task its losses by name, times the task's entry in ``loss_weights``; ``loss_dict`` has them as
            ``<task>_<loss>``.
    """

    losses: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)


class JointModel(torch.nn.Module):
    """One encoder and a decoder per task; a batch runs through the decoders of its own dataset's tasks alone.

    The attribute paths ``encoder.0.…`` and ``decoders.<task>.…`` are part of the checkpoint format, and callbacks
    select modules by them.

    Args:
        encoder: the first module extracts features from the inputs, the others refine them.
        decoders: for each task its modules; the last one, the head, predicts and computes the loss.
        lazy_decode: without effect; accepted since old configs have it.
        loss_weights: factor on each task's loss; 1 where not given.
        trunk: modules between encoder and decoders that all tasks share, with or without a task embedding.
        decoder_to_target: for each decoder the names of its tasks; None means one task of the decoder's name.
        task_label_offsets: for each task of a shared head ``{outputs_key, offset, num_outputs}``, see
            ``rslp.models.heads``.
        adapter: freeze the encoder's first module, and train adapters in it; None trains the module itself.

    Attributes:
        adapters: the adapters, or None.

    Raises:
        ConfigError: encoder or decoders are empty, an option names an unknown decoder or task, or a weight is negative.
    """

    def __init__(
        self,
        encoder: list[FeatureExtractor | IntermediateComponent],
        decoders: dict[str, list[IntermediateComponent | Predictor]],
        lazy_decode: bool = True,  # noqa: ARG002 - old configs have it
        loss_weights: dict[str, float] | None = None,
        trunk: DecoderTrunk | None = None,
        decoder_to_target: dict[str, list[str]] | None = None,
        task_label_offsets: dict[str, dict[str, Any]] | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        super().__init__()
        if not encoder or not decoders:
            raise ConfigError(Problem("needs at least one encoder module and one decoder", key=_MODEL_KEY))
        _refuse_masks(decoders)
        self.encoder = torch.nn.ModuleList(encoder)
        fix_token_order(self.encoder)
        log_once(self.encoder)
        self.adapters = None if adapter is None else EncoderAdapters(self.encoder[0], adapter)
        # Sorted, so that the order of parameters and task embeddings does not depend on the config's.
        self.decoders = torch.nn.ModuleDict(
            {task: torch.nn.ModuleList(modules) for task, modules in sorted(decoders.items())}
        )
        tasks_of_decoder = decoder_to_target or {name: [name] for name in decoders}
        _refuse_absent("decoder_to_target", set(tasks_of_decoder), known=set(decoders), noun="decoder")
        self._decoder_of = {task: decoder for decoder, tasks in tasks_of_decoder.items() for task in tasks}
        for option, names in (
            ("loss_weights", set(loss_weights or {})),
            ("task_label_offsets", set(task_label_offsets or {})),
        ):
            _refuse_absent(option, names, known=set(self._decoder_of), noun="task")
        for task, weight in (loss_weights or {}).items():
            if not 0 <= weight < float("inf"):
                raise ConfigError(Problem(f"got {weight}; 0 or more", key=f"{_MODEL_KEY}.loss_weights.{task}"))
        self._ranges = {
            task: LabelRange.from_config(entry, key_path=f"{_MODEL_KEY}.task_label_offsets.{task}")
            for task, entry in (task_label_offsets or {}).items()
        }
        self.loss_weights = {task: float((loss_weights or {}).get(task, 1.0)) for task in sorted(self._decoder_of)}
        self.trunk = trunk
        if trunk is not None:
            trunk.register_tasks(sorted(self._decoder_of))
        self._tasks_of: dict[str, list[str]] = {}

    def set_datasets(self, tasks_of: Mapping[str, list[str]]) -> None:
        """Set the tasks of each dataset, by default one of its own name, and make datasets' adapters.

        Args:
            tasks_of: for each dataset the names of its tasks.

        Raises:
            ConfigError: a task has no decoder.
        """
        for dataset, tasks in tasks_of.items():
            if missing := [task for task in tasks if task not in self._decoder_of]:
                message = (
                    f"no decoder for task {missing[0]!r} of dataset {dataset!r}; got {', '.join(self._decoder_of)}"
                )
                raise ConfigError(Problem(message, key=f"{_MODEL_KEY}.decoders"))
        self._tasks_of = {dataset: list(tasks) for dataset, tasks in tasks_of.items()}
        if self.adapters is not None:
            self.adapters.set_datasets(tasks_of)

    @property
    def tasks(self) -> list[str]:
        """The names of all tasks, sorted."""
        return list(self.loss_weights)

    def tasks_of(self, dataset: str) -> list[str]:
        """The names of a dataset's tasks."""
        return self._tasks_of.get(dataset, [dataset])

    def parameter_count(self, datasets: Iterable[str]) -> int:
        """Number of parameters of encoder and trunk, and of the decoders of some datasets' tasks."""
        decoders = {self._decoder_of[task] for dataset in datasets for task in self.tasks_of(dataset)}
        return sum(
            parameter.numel()
            for name, parameter in self.named_parameters()
            if not name.startswith("decoders.") or name.split(".")[1] in decoders
        )

    def with_background(self) -> set[str]:
        """The tasks whose head takes their class 0 for background, as torchvision's detectors do.

        Of several tasks that share a detector, only the one whose range begins at the head's class 0.
        """
        return {
            task
            for task in self.tasks
            if _is_detector(self._modules_of(task)[-1]) and (task not in self._ranges or self._ranges[task].offset == 0)
        }

    def loss_denominators(self, dataset: str, targets: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """For each of a dataset's tasks over how many units its loss is a mean, see ``rslp.models.denominators``.

        Args:
            dataset: the key of the batch's dataset.
            targets: for each sample its targets by task.
        """
        denominators = {}
        for task in self.tasks_of(dataset):
            head = self._modules_of(task)[-1]
            denominators[task] = loss_denominator(head, self._head_targets(task, [target[task] for target in targets]))
        return denominators

    def encode(self, context: ModelContext, *, depth: int | None = None) -> Any:
        """Run the encoder, or its first modules; returns features, usually ``FeatureMaps`` of ``B C H W``.

        Args:
            context: inputs and metadata of samples of one dataset.
            depth: number of the encoder's modules to run, at least 1; None means all.
        """
        if self.adapters is not None:
            self.adapters.select(str(context.metadatas[0].dataset_source))
        return self._refine(Features(1, self.encoder[0](context)), context, depth=depth)

    def _refine(self, start: Features, context: ModelContext, *, depth: int | None = None) -> Any:
        """Run the encoder's modules after those that ``start`` comes from, up to ``depth``."""
        features = start.value
        for module in self.encoder[start.depth : depth]:
            features = module(features, context)
        return features

    def after_encoder(self, depth: int) -> list[torch.nn.Module]:
        """The modules that run after the first ``depth`` modules of the encoder."""
        trunk = [] if self.trunk is None else [self.trunk]
        return [*self.encoder[depth:], *trunk, *self.decoders.values()]

    def forward(
        self,
        context: ModelContext,
        targets: list[dict[str, Any]] | None = None,
        *,
        features: Features | None = None,
    ) -> JointOutput:
        """Predict the tasks of the batch's dataset.

        Args:
            context: inputs and metadata of samples of one dataset.
            targets: for each sample its targets by task; None for a prediction, which has no losses.
            features: output of the encoder's first modules for this batch, which then are not run.

        Returns:
            For each sample the outputs by task, and the weighted losses by task and name.
        """
        return self._predict(
            self.encode(context) if features is None else self._refine(features, context), context, targets
        )

    def _predict(self, features: Any, context: ModelContext, targets: list[dict[str, Any]] | None) -> JointOutput:
        dataset = str(context.metadatas[0].dataset_source)
        outputs: list[dict[str, Any]] = [{} for _ in context.inputs]
        losses: dict[str, dict[str, torch.Tensor]] = {}
        for task in self.tasks_of(dataset):
            task_features = self._condition(features, task=task, samples=len(outputs))
            result = self._decode(task_features, context, task=task, targets=targets)
            # torchvision's detectors have no outputs in training mode.
            for output, task_output in zip(outputs, result.outputs, strict=not self.training):
                output[task] = task_output
            losses[task] = {name: loss * self.loss_weights[task] for name, loss in result.loss_dict.items()}
        flat = {f"{task}_{name}": loss for task, named in losses.items() for name, loss in named.items()}
        return JointOutput(outputs=outputs, loss_dict=flat, losses=losses)

    def _condition(self, features: Any, *, task: str, samples: int) -> Any:
        """Run the trunk for one task, on a copy of the encoder's features, which the next task needs unchanged."""
        if self.trunk is None:
            return features
        maps = [feature_map.clone() for feature_map in features.feature_maps]
        return FeatureMaps(self.trunk(maps, [{"dataset_source": task}] * samples)["outputs"])

    def _decode(
        self, features: Any, context: ModelContext, *, task: str, targets: list[dict[str, Any]] | None
    ) -> ModelOutput:
        """Run a task's decoder; of a shared head's outputs, take those of the task's range."""
        modules = self._modules_of(task)
        for module in modules[:-1]:
            features = module(features, context)
        head_targets = None if targets is None else self._head_targets(task, [target[task] for target in targets])
        output: ModelOutput = modules[-1](features, context, head_targets)
        if (label_range := self._ranges.get(task)) is None:
            return output
        return ModelOutput([label_range.select(of_sample) for of_sample in output.outputs], output.loss_dict)

    def _modules_of(self, task: str) -> list[torch.nn.Module]:
        modules: list[torch.nn.Module] = list(self.decoders[self._decoder_of[task]])  # type: ignore[call-overload]
        return modules

    def _head_targets(self, task: str, targets: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The task's targets, with labels as classes of its head: in a shared head, the task's offset is added."""
        label_range = self._ranges.get(task)
        return targets if label_range is None else [label_range.shifted(target) for target in targets]


def _is_detector(module: torch.nn.Module) -> bool:
    """Whether a module is rslearn's FasterRCNN, or of a class derived from it."""
    return any(f"{kind.__module__}.{kind.__qualname__}" == _DETECTOR for kind in type(module).__mro__)


def _refuse_masks(decoders: Mapping[str, list[Any]]) -> None:
    """Raise a ConfigError for a detector that also predicts an outline (mask) of each object."""
    for task, modules in decoders.items():
        if any(_is_detector(module) and module.roi_heads.has_mask() for module in modules):
            message = "instance_segmentation is not supported: it needs masks of objects, which no task gives"
            raise ConfigError(Problem(message, key=f"{_MODEL_KEY}.decoders.{task}"))


def _refuse_absent(option: str, names: set[str], *, known: set[str], noun: str) -> None:
    """Raise a ConfigError if an option names something that the model does not have."""
    if absent := sorted(names - known):
        message = f"names the {noun} {absent[0]!r}, which there is not; got {', '.join(sorted(known))}"
        raise ConfigError(Problem(message, key=f"{_MODEL_KEY}.{option}"))
