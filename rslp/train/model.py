"""The joint model: one encoder, a decoder for each task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from rslearn.models.component import FeatureExtractor, FeatureMaps, IntermediateComponent, Predictor
from rslearn.models.trunk import DecoderTrunk
from rslearn.train.model_context import ModelContext, ModelOutput

from rslp.errors import ConfigError, Problem

_PLACE = "model.init_args.model.init_args"


class JointModel(torch.nn.Module):
    """One encoder under a decoder per task; a batch runs through the decoders of its own dataset's tasks alone.

    The attribute paths ``encoder.0.…`` and ``decoders.<task>.…`` are part of the checkpoint format and of callbacks
    that select modules by them.

    Args:
        encoder: the first module extracts features from the inputs, the others refine them.
        decoders: for each task its modules; the last one predicts and computes the loss.
        lazy_decode: of old configs; without effect, since decoding only what a batch has targets for is the rule here.
        loss_weights: factor on each task's loss, applied once; 1 where not given.
        trunk: modules between encoder and decoders that all tasks share, with a task embedding or without.

    Raises:
        ConfigError: an empty encoder or decoder, or a loss weight for an absent task.
    """

    def __init__(
        self,
        encoder: list[FeatureExtractor | IntermediateComponent],
        decoders: dict[str, list[IntermediateComponent | Predictor]],
        lazy_decode: bool = True,  # noqa: ARG002 - kept so that existing configs parse
        loss_weights: dict[str, float] | None = None,
        trunk: DecoderTrunk | None = None,
    ) -> None:
        super().__init__()
        if not encoder or not decoders:
            raise ConfigError(Problem("needs at least one encoder module and one decoder", key=_PLACE))
        self.encoder = torch.nn.ModuleList(encoder)
        # Sorted, so that neither parameter order nor task embeddings depend on the order of a mapping.
        self.decoders = torch.nn.ModuleDict(
            {task: torch.nn.ModuleList(modules) for task, modules in sorted(decoders.items())}
        )
        if absent := sorted(set(loss_weights or {}) - set(decoders)):
            what = f"names the task {absent[0]!r}, which has no decoder; tasks: {', '.join(sorted(decoders))}"
            raise ConfigError(Problem(what, key=f"{_PLACE}.loss_weights"))
        self.loss_weights = {task: float((loss_weights or {}).get(task, 1.0)) for task in self.decoders}
        self.trunk = trunk
        if trunk is not None:
            trunk.register_tasks(list(self.decoders))
        self._tasks_of: dict[str, list[str]] = {}

    def set_datasets(self, tasks_of: Mapping[str, list[str]]) -> None:
        """Say which tasks each dataset has; without it a dataset's one task bears its name.

        Raises:
            ConfigError: a task without a decoder.
        """
        for dataset, tasks in tasks_of.items():
            if missing := [task for task in tasks if task not in self.decoders]:
                what = f"no decoder for task {missing[0]!r} of dataset {dataset!r}; got {', '.join(self.decoders)}"
                raise ConfigError(Problem(what, key=f"{_PLACE}.decoders"))
        self._tasks_of = {dataset: list(tasks) for dataset, tasks in tasks_of.items()}

    def encode(self, context: ModelContext) -> Any:
        """Features of a batch, usually ``FeatureMaps`` of ``B C H W``."""
        features = self.encoder[0](context)
        for module in self.encoder[1:]:
            features = module(features, context)
        return features

    def forward(self, context: ModelContext, targets: list[dict[str, Any]] | None = None) -> ModelOutput:
        """Predict the tasks of the batch's dataset.

        Args:
            context: inputs and metadata of samples of one dataset.
            targets: for each sample its targets by task; None while predicting.

        Returns:
            for each sample the outputs by task, and the losses ``<task>_<loss>``, weights applied.
        """
        features = self.encode(context)
        dataset = str(context.metadatas[0].dataset_source)
        outputs: list[dict[str, Any]] = [{} for _ in context.inputs]
        losses: dict[str, torch.Tensor] = {}
        for task in self._tasks_of.get(dataset, [dataset]):
            shared = self._condition(features, task=task, samples=len(outputs))
            result = self._decode(shared, context, task=task, targets=targets)
            # torchvision's detectors predict nothing while they train.
            for output, entry in zip(outputs, result.outputs, strict=not self.training):
                output[task] = entry
            for name, loss in result.loss_dict.items():
                losses[f"{task}_{name}"] = loss * self.loss_weights[task]
        return ModelOutput(outputs=outputs, loss_dict=losses)

    def _condition(self, features: Any, *, task: str, samples: int) -> Any:
        """Run the shared trunk for one task; the encoder's features stay as they are for the next."""
        if self.trunk is None:
            return features
        maps = [feature_map.clone() for feature_map in features.feature_maps]
        return FeatureMaps(self.trunk(maps, [{"dataset_source": task}] * samples)["outputs"])

    def _decode(
        self, features: Any, context: ModelContext, *, task: str, targets: list[dict[str, Any]] | None
    ) -> ModelOutput:
        modules = list(self.decoders[task])  # type: ignore[call-overload]  # a ModuleList, which ModuleDict can't say
        for module in modules[:-1]:
            features = module(features, context)
        output: ModelOutput = modules[-1](features, context, None if targets is None else [t[task] for t in targets])
        return output
