"""The Helios (OlmoEarth) encoder as a feature extractor of rslearn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from olmoearth_pretrain_minimal.olmoearth_pretrain_v1.utils.constants import Modality
from rslearn.models.component import FeatureExtractor, FeatureMaps, TokenFeatureMaps
from rslearn.train.model_context import ModelContext
from torch.nn.attention import SDPBackend, sdpa_kernel

from rslp.errors import CheckpointError, ConfigError, DataError, Problem
from rslp.helios.checkpoint import Architecture, load_encoder, open_checkpoint
from rslp.helios.images.inputs import EncoderBatch, ModalityShape, assemble, ensure_normalized
from rslp.helios.pooling import concatenate_tokens, pool_tokens
from rslp.upstream import fix_token_order
from rslp.upstream.encoder import mask_padding

_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": None, None: None}
_SDPA_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_EXTRA_STATE = "_extra_state"


class Helios(FeatureExtractor):
    """Helios (published as OlmoEarth): encodes image series of several sensors into one feature map.

    Of a sample's inputs it uses those that are named like a modality of the model (``sentinel2_l2a``, ``sentinel1``,
    ``landsat``, …): RasterImages ``C T H W``, float32, normalised by ``HeliosNormalize``. Samples may differ in their
    number of dates and lack modalities: absent dates and modalities are masked, and a sample's features do not depend
    on the other samples of its batch. The features are float32, whatever dtype the encoder computes in.

    The attribute ``model`` is the selected part, so that in a joint model its weights are named
    ``model.encoder.0.model.*``. Checkpoints store the architecture beside the weights (``get_extra_state``).
    """

    def __init__(
        self,
        checkpoint_path: str,
        *,
        selector: list[str | int] | None = None,
        forward_kwargs: dict[str, Any] | None = None,
        random_initialization: bool = False,
        embedding_size: int | None = None,
        patch_size: int | None = None,
        autocast_dtype: str | None = "auto",
        use_legacy_timestamps: bool = False,
        timestamp_tolerance_days: float = 15,
        token_pooling: bool = True,
        strict: bool = True,
        use_location_token_output: bool = False,
        projected_location_token_dim: int | None = None,
        compile_model: bool = False,
        sdpa_backends: list[str] | None = None,
    ) -> None:
        """Build the encoder and load its weights.

        Args:
            checkpoint_path: a bundle, a distributed checkpoint, a fine-tuning run, or the id of a published model.
            selector: attribute names and list indices from the model to the part to use; default ``["encoder"]``.
            forward_kwargs: further arguments of the part's forward; ``patch_size`` may be among them.
            random_initialization: use the checkpoint's architecture alone, with random weights.
            embedding_size: channels of the features that the config expects; compared with the model's.
            patch_size: side of a patch, px.
            autocast_dtype: dtype that the encoder computes in: ``bfloat16``, ``float16``, null for float32, or
                ``auto``: bfloat16 on a GPU, float32 on a CPU.
            use_legacy_timestamps: dummy months (January, February, … in the order of the images) instead of the
                acquisition dates, as in the original project.
            timestamp_tolerance_days: images of different sensors less than this apart share a time step.
            token_pooling: one feature per patch; if false, all tokens of a patch (TokenFeatureMaps, ``B C H W N``).
            strict: raise on missing and unexpected weights.
            use_location_token_output: models since v1.3: features are the location tokens, which the model's attention
                pooler reads from all patches, dates and modalities, in place of the mean over a patch's tokens.
            projected_location_token_dim: the first N numbers of the narrow projection of the location tokens.
            compile_model: compile the encoder's blocks with torch.compile; each size of input is compiled once.
            sdpa_backends: torch's kernels for attention, by priority: ``cudnn``, ``flash``, ``efficient``, ``math``;
                None leaves the choice to torch.

        Raises:
            CheckpointError: the checkpoint is absent or unreadable, or does not fit the arguments.
            ConfigError: an argument is invalid, or two contradict each other.
        """
        super().__init__()
        self.forward_kwargs = dict(forward_kwargs or {})
        self.patch_size = _patch_size(patch_size, self.forward_kwargs.pop("patch_size", None))
        self.autocast_dtype = _autocast_name(autocast_dtype)
        self.use_legacy_timestamps = use_legacy_timestamps
        self.timestamp_tolerance = timedelta(days=timestamp_tolerance_days)
        self.token_pooling = token_pooling
        self.use_location_token_output = use_location_token_output
        self.projected_location_token_dim = projected_location_token_dim
        self.sdpa_backends = _sdpa_backends(sdpa_backends)
        self._selector = tuple(["encoder"] if selector is None else selector)
        checkpoint = open_checkpoint(checkpoint_path)
        self._architecture: Architecture = checkpoint.architecture
        self.model = mask_padding(
            load_encoder(checkpoint, self._selector, random_initialization=random_initialization, strict=strict)
        )
        fix_token_order(self.model)
        self.embedding_size = self._check(checkpoint_path, embedding_size)
        if compile_model:
            self.model.apply_compile()  # type: ignore[operator]
        self.modalities = _modalities(self.model)
        self._inputs_checked = False

    def forward(self, context: ModelContext) -> FeatureMaps | TokenFeatureMaps:
        """Encode a batch.

        Args:
            context: the samples; see the class for their inputs. H and W are multiples of the patch size p.

        Returns:
            One float32 feature map ``B C H/p W/p``, the mean over a patch's dates, band sets and modalities; or the map
            of location tokens.

        Raises:
            DataError: the inputs do not fit the encoder.
        """
        batch = assemble(
            context.inputs,
            context.metadatas,
            self.modalities,
            use_legacy_timestamps=self.use_legacy_timestamps,
            tolerance=self.timestamp_tolerance,
        )
        self._check_size(batch)
        if not self._inputs_checked:  # only once: it waits for the GPU
            ensure_normalized(batch)
            self._inputs_checked = True
        attention = sdpa_kernel(self.sdpa_backends, set_priority=True) if self.sdpa_backends else nullcontext()
        with self._autocast(batch.sample.timestamps.device), attention:
            output = self.model(
                batch.sample, fast_pass=batch.complete, patch_size=self.patch_size, **self.forward_kwargs
            )
            if self.use_location_token_output:
                return self._location_tokens(output["location_tokens"])
        tokens = output["tokens_and_masks"]
        return pool_tokens(tokens, batch.valid) if self.token_pooling else concatenate_tokens(tokens, batch.valid)

    def _location_tokens(self, tokens: torch.Tensor) -> FeatureMaps:
        """Location tokens ``B H W D``, or their narrow projection, as a feature map."""
        if self.projected_location_token_dim is not None:
            # The model's own projection is of detached tokens: with it, the encoder would not be trained.
            pooler: Any = self.model.attention_pooler
            tokens = pooler.student(tokens)[..., : self.projected_location_token_dim]
        return FeatureMaps([tokens.permute(0, 3, 1, 2).float().contiguous()])

    def get_backbone_channels(self) -> list[list[int]]:
        """``[[downsample factor, channels]]`` of the feature map, which rslearn's decoders ask for."""
        side = self.patch_size
        if self.use_location_token_output:
            side = self.forward_kwargs.get("location_query_patch_size") or side
        return [[side, self.embedding_size]]

    def get_extra_state(self) -> torch.Tensor:
        """The architecture as uint8 ``N``, for checkpoints."""
        return self._architecture.pack(self._selector)

    def set_extra_state(self, state: object) -> None:
        """Ignore the stored architecture: the model is built by now, and its weights are checked by name and shape."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # Checkpoints of the original project hold no architecture: its absence is no missing weight.
        state_dict.setdefault(prefix + _EXTRA_STATE, torch.empty(0, dtype=torch.uint8))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _check(self, checkpoint_path: str, embedding_size: int | None) -> int:
        """Compare the arguments with the model; returns the number of channels of the features."""
        if not hasattr(self.model, "patch_embeddings") or not hasattr(self.model, "embedding_size"):
            raise CheckpointError(
                f"{checkpoint_path}: selector {list(self._selector)} leads to a {type(self.model).__name__}, "
                "which is no encoder; use ['encoder']"
            )
        actual = self._location_channels(checkpoint_path) or int(self.model.embedding_size)  # type: ignore[arg-type]
        if embedding_size is not None and embedding_size != actual:
            raise CheckpointError(
                f"{checkpoint_path}: the embedding size is {actual}, the config says {embedding_size}"
            )
        low, high = self.model.min_patch_size, self.model.max_patch_size
        if not low <= self.patch_size <= high:  # type: ignore[operator]
            raise CheckpointError(
                f"{checkpoint_path}: patch_size is {self.patch_size}, the model allows {low} to {high}"
            )
        return actual

    def _location_channels(self, checkpoint_path: str) -> int:
        """The number of channels of the location tokens that the arguments ask for; 0 if they ask for none."""
        dim = self.projected_location_token_dim
        if not self.use_location_token_output:
            if dim is not None:
                key = "Helios.projected_location_token_dim"
                raise ConfigError(Problem("needs use_location_token_output: true", key=key))
            return 0
        if not self.token_pooling:
            message = "contradicts use_location_token_output, which is one token for each place"
            raise ConfigError(Problem(message, key="Helios.token_pooling"))
        pooler: Any = getattr(self.model, "attention_pooler", None)
        if pooler is None:
            raise CheckpointError(
                f"{checkpoint_path}: the model has no location tokens (models since v1.3 have), so "
                "use_location_token_output must be false"
            )
        widths = pooler.student_dims or []
        if dim is not None and not 1 <= dim <= max(widths, default=0):
            trained = ", ".join(map(str, widths)) or "no projection"
            raise CheckpointError(
                f"{checkpoint_path}: projected_location_token_dim is {dim}; the model was trained for {trained}"
            )
        return int(pooler.pooler_dim if dim is None else dim)

    def _check_size(self, batch: EncoderBatch) -> None:
        name = next(iter(batch.valid))
        height, width = getattr(batch.sample, name).shape[1:3]
        if height % self.patch_size or width % self.patch_size:
            raise DataError(
                f"images of {height}x{width} px are no multiple of patch_size {self.patch_size}; crop or pad them"
            )
        encodings = getattr(self.model, "composite_encodings", None)
        if height != width and getattr(encodings, "position_encoding", "absolute") == "absolute":
            raise DataError(f"images of {height}x{width} px: this model's position encoding needs square images")

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        name = self.autocast_dtype
        if name == "auto":
            name = "bfloat16" if device.type == "cuda" else None
        dtype = _AUTOCAST[name]
        return nullcontext() if dtype is None else torch.autocast(device_type=device.type, dtype=dtype)


def _patch_size(argument: int | None, in_kwargs: int | None) -> int:
    given = {size for size in (argument, in_kwargs) if size is not None}
    if len(given) != 1:
        twice = f"given twice, as {argument} and as forward_kwargs.patch_size {in_kwargs}"
        raise ConfigError(Problem(twice if given else "not given", key="Helios.patch_size"))
    (size,) = given
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ConfigError(
            Problem(f"got {size!r}, must be a whole number of pixels, at least 1", key="Helios.patch_size")
        )
    return size


def _autocast_name(name: str | None) -> str | None:
    if name != "auto" and name not in _AUTOCAST:
        allowed = "auto, bfloat16, float16, float32 or null"
        raise ConfigError(Problem(f"got {name!r}, allowed: {allowed}", key="Helios.autocast_dtype"))
    return name


def _sdpa_backends(names: Sequence[str] | None) -> list[SDPBackend]:
    if wrong := [name for name in names or () if name not in _SDPA_BACKENDS]:
        message = f"got {wrong[0]!r}, allowed: {', '.join(_SDPA_BACKENDS)}"
        raise ConfigError(Problem(message, key="Helios.sdpa_backends"))
    return [_SDPA_BACKENDS[name] for name in names or ()]


def _modalities(model: Any) -> Sequence[ModalityShape]:
    """The spatial modalities that an encoder supports and was trained to take."""
    tokens = model.patch_embeddings.tokenization_config
    trained = getattr(model, "encoder_input_modality_names", None)
    names: Mapping[str, Any] = {name: Modality.get(name) for name in model.supported_modality_names}
    return tuple(
        ModalityShape(name, spec.num_bands, tokens.get_num_bandsets(name), spec.is_multitemporal)
        for name, spec in names.items()
        if spec.is_spatial and spec.image_tile_size_factor == 1 and (trained is None or name in trained)
    )
