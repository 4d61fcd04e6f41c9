"""Collective operations of a job's processes; one process needs none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import distributed

T = TypeVar("T")

# Gradients are reduced in buckets of about this size: few calls, and little memory besides the gradients.
BUCKET_BYTES = 32 * 2**20


def is_distributed() -> bool:
    """Whether the job has several processes."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def is_rank_zero() -> bool:
    """Whether this is the process of rank 0."""
    return not is_distributed() or distributed.get_rank() == 0


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes; the argument may be overwritten."""
    if is_distributed():
        distributed.all_reduce(tensor)
    return tensor


def all_gather(value: T) -> list[T]:
    """The values of all processes, by rank; anything that can be pickled, tensors on the CPU."""
    if not is_distributed():
        return [value]
    values: list[T | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return [gathered for gathered in values if gathered is not None]


def any_rank(flag: bool, *, device: torch.device) -> bool:
    """Whether the flag is true in any process."""
    return bool(all_reduce_sum(torch.tensor(float(flag), device=device)).item()) if is_distributed() else flag


def broadcast(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrite tensors by those of rank 0."""
    if is_distributed():
        for tensor in tensors:
            distributed.broadcast(tensor.detach(), src=0)


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each gradient by its sum over all processes.

    A parameter without a gradient in all processes keeps none, so that optimisers skip it. Where only some processes
    have one (the others had no sample of the batch, or took another branch), the others contribute zeros.

    Args:
        parameters: the same ones in every process, in the same order.
    """
    if not is_distributed():
        return
    trained = [p for p in parameters if p.requires_grad]
    if not trained:
        return
    used = torch.tensor([p.grad is not None for p in trained], dtype=torch.int32, device=trained[0].device)
    distributed.all_reduce(used, op=distributed.ReduceOp.MAX)
    gradients = []
    for parameter, anywhere in zip(trained, used.tolist(), strict=True):
        if anywhere:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        distributed.all_reduce(flat)
        for gradient, total in zip(bucket, torch.split(flat, [g.numel() for g in bucket]), strict=True):
            gradient.copy_(total.view_as(gradient))


def _buckets(tensors: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Group consecutive tensors of one dtype into buckets of at most ``BUCKET_BYTES``, or of one larger tensor."""
    bucket: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        added = tensor.numel() * tensor.element_size()
        if bucket and (tensor.dtype != bucket[0].dtype or size + added > BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += added
    if bucket:
        yield bucket
