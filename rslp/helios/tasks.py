"""Tasks that dataset configs name and that rslearn does not have."""

from __future__ import annotations

from typing import Any

from rslearn.train.model_context import RasterImage, SampleMetadata
from rslearn.train.tasks.detection import DetectionTask
from rslearn.utils.feature import Feature

# Categories of the annotators that the task does not distinguish: category -> class.
_SAME_AS = {"power": "platform"}


class MarineInfraTask(DetectionTask):
    """Detection of platforms and turbines at sea; ``power``, a platform for electricity, counts as ``platform``."""

    def process_inputs(
        self,
        raw_inputs: dict[str, RasterImage | list[Feature]],
        metadata: SampleMetadata,
        load_targets: bool = True,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Rename categories, then read the boxes as rslearn's detection task does.

        Args:
            raw_inputs: ``targets`` are the labelled features; they are not changed.
            metadata: where the sample lies.
            load_targets: whether to read the labels.

        Returns:
            (inputs, targets) of rslearn's detection task: ``boxes`` ``N 4`` in pixels, ``labels`` ``N``.
        """
        labelled = raw_inputs.get("targets")
        if isinstance(labelled, list):
            raw_inputs = {**raw_inputs, "targets": [self._renamed(feature) for feature in labelled]}
        result: tuple[dict[str, Any], dict[str, Any]] = super().process_inputs(raw_inputs, metadata, load_targets)
        return result

    def _renamed(self, feature: Feature) -> Feature:
        properties = feature.properties or {}
        category = properties.get(self.property_name)
        if category not in _SAME_AS:
            return feature
        return Feature(feature.geometry, {**properties, self.property_name: _SAME_AS[category]})
