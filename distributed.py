"""The processes that torchrun starts, one per GPU: which is which, and sums over all of them.

    torchrun --nproc-per-node 8 train.py --model deeplab

Without torchrun there is one process, rank 0 of 1, and nothing here has any effect.
"""

import atexit
import os
import re
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common import UserError

RENDEZVOUS = 60  # seconds in which processes must find each other


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def process_group() -> Iterator[None]:
    """Join the process group for the duration of the context, in which only rank 0 prints. If ranks
    fail, only the first one says why: the others merely lose the connection to it."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()
    # After a restart two processes may wait for each other forever: give up, and torchrun retries.
    limit = threading.Timer(RENDEZVOUS, _give_up)
    limit.daemon = True
    limit.start()
    store, number, count = next(dist.rendezvous("env://"))
    # Addresses that dead processes left in torchrun's store must not be found.
    store = dist.PrefixStore(_common_name(store, number, count), store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count)
    if store.add("joined", 1) == count:
        store.set("all", "joined")
    store.wait(["all"])  # none may exit, as after --help, while another still connects to it
    limit.cancel()
    try:
        with open(os.devnull, "w") as null:
            out, err = (null, null) if rank() else (sys.stdout, sys.stderr)
            with redirect_stdout(out), redirect_stderr(err):
                yield
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else 2
        if not code:  # --help
            dist.destroy_process_group()
            raise
        atexit.register(_leave, code)
        if store.add("failed", 1) > 1:
            sys.exit(2)
        if isinstance(error, RuntimeError) and re.search("gloo|nccl", str(error), re.IGNORECASE):
            # gloo knows no more than this; nccl may have its own reason
            reason = "" if "gloo" in str(error) else f", or {str(error).strip().splitlines()[-1]}"
            died = f"another of torchrun's processes has died: it says which{reason}"
            raise UserError(died) from None
        raise
    dist.destroy_process_group()


def _common_name(store: dist.Store, number: int, count: int) -> str:
    """A name that all processes of this start share, and no earlier start had. (A count of restarts
    would not do, since each machine counts its own.) Each rank asks rank 0 under a fresh name."""
    name = uuid.uuid4().hex
    if number:
        store.set(f"ask/{number}", name)
        store.wait([f"answer/{name}"])
        name = store.get(f"answer/{name}").decode()
        store.add(f"asked/{name}", 1)
        return name
    while store.add(f"asked/{name}", 0) < count - 1:
        for other in range(1, count):
            if store.check([f"ask/{other}"]):
                store.set(f"answer/{store.get(f'ask/{other}').decode()}", name)
        time.sleep(0.1)
    return name


def _leave(code: int) -> None:
    """Exit at once: nccl would wait for the other processes, and they for this one."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _give_up() -> None:
    print(f"not all processes have met within {RENDEZVOUS} s", file=sys.stderr, flush=True)
    os._exit(1)


def _follow(launcher: int) -> None:
    """Exit when the launcher dies, whatever killed it: nobody else would end this process."""
    while os.getppid() == launcher:
        time.sleep(1)
    os._exit(1)


def parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """The model for training: its backward averages the gradients over the ranks."""
    if world() == 1:
        return model
    if device.type != "cuda":  # torch has no synchronized batch norm for CPUs
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    options = {"gradient_as_bucket_view": True, "broadcast_buffers": False}
    return DistributedDataParallel(model, device_ids=[device], **options)


def mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over the ranks, in place, on the device."""
    if world() > 1:
        dist.all_reduce(value)
        value /= world()
    return value


def share_buffers(model: nn.Module) -> None:
    """Give all ranks the buffers of rank 0, whose model is the one that is saved."""
    if world() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def agreed(value: bool) -> bool:
    """The value of rank 0, on all ranks."""
    if world() > 1:
        told = torch.tensor(value)
        dist.broadcast(told, 0)
        return bool(told)
    return value


def launch() -> str | None:
    """An identifier of this torchrun; None without one. On several machines only an id that the
    user gave is the same on all of them."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    name = os.environ["TORCHELASTIC_RUN_ID"]
    return f"process {os.getppid()}" if name == "none" else name


def gather(mine: torch.Tensor, count: int) -> torch.Tensor:
    """(count, ...) tensor from its parts: rank r has rows r, r + world, ..."""
    if world() == 1:
        return mine
    whole = torch.zeros(count, *mine.shape[1:], dtype=mine.dtype, device=mine.device)
    whole[rank() :: world()] = mine
    dist.all_reduce(whole)
    return whole
