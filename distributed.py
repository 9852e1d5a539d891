"""The processes that torchrun starts, one a GPU: who is who, and sums over all of them.

    torchrun --nproc-per-node 8 train.py --model deeplab

Without torchrun there is one process, rank 0 of 1, and nothing here does anything.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def restarted() -> bool:
    """Whether torchrun started these processes again after one of them had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def own_device(name: str) -> str:
    """This process's device: of "auto" and "cuda" the GPU with its number on this machine."""
    number = os.environ.get("LOCAL_RANK")
    if number is not None and name in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{number}"
    return name


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Be one of the processes, for the time of the context; only rank 0 prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, number, count = next(dist.rendezvous("env://"))
    # Addresses that dead processes have left in torchrun's store must not be found.
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count)
    try:
        with ExitStack() as stack:
            if rank() > 0:
                null = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(redirect_stdout(null))
                stack.enter_context(redirect_stderr(null))
            yield
    finally:
        dist.destroy_process_group()


def synchronized(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The model with batch norm over the batches of all ranks, where torch has that: on GPUs."""
    if world() > 1 and device.type == "cuda":
        return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def parallel(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The model's forward for training; its backward averages the gradients over the ranks."""
    if world() == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over the ranks, in place, on the device."""
    if world() > 1:
        dist.all_reduce(value)
        value /= world()
    return value


def joined(mine: torch.Tensor, count: int) -> torch.Tensor:
    """(count, ...) tensor out of its parts: rank r has rows r, r + world, ... of it."""
    if world() == 1:
        return mine
    whole = torch.zeros(count, *mine.shape[1:], dtype=mine.dtype, device=mine.device)
    whole[rank() :: world()] = mine
    dist.all_reduce(whole)
    return whole
