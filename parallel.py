"""One model on many processes, as torchrun starts them; with one process, nothing of this happens.

    torchrun --nproc_per_node=8 train.py configs/base.py

Every process computes the gradient of its rows of the global batch, and the mean of all is what each of them steps by.
"ddp": each holds the whole model. "fsdp": each holds a share of every matrix, of its gradient and of the optimizer's
state; a block is put together when it is needed. The first process alone writes to the disk.
"""

import datetime
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stage import Stopped, UserError, log

DAY = 86_400.0


def rank() -> int:
    """Which process this is, counted from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def joined(timeout: float) -> Iterator[None]:
    """Joins the processes that torchrun has started with this one, and leaves them at the end.

    timeout: seconds that one waits for the others. Where another ends, or does not answer in that time, this one stops
    too, with one line and status 1, or, in the middle of NCCL's work, by its watchdog. GPUs speak through NCCL,
    processors through gloo.
    """
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= there:
            raise UserError(f"{local + 1} or more processes here, {there} GPUs; start --nproc_per_node={there}")
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout))
        if rank():
            log.setLevel("ERROR")
        yield
        dist.destroy_process_group()
    except UserError as error:
        if rank() == 0:
            raise
        raise Stopped(2, f"process {rank()}: error: {error}") from None
    except Stopped as stop:
        raise Stopped(stop.status, str(stop) if rank() == 0 else "") from None
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not re.search("gloo|NCCL|[Cc]onnection|[Tt]imed out", str(error)):
            raise
        reason = str(error).strip().splitlines()[0]
        raise Stopped(
            1,
            f"process {rank()}: another one has ended, or has not answered for {timeout:g} s, and so this one stops; "
            f"the same command goes on from the last checkpoint ({reason})",
        ) from None


def lead(function: Callable, timeout: float | None = None):
    """What the function gives in the first process, which alone calls it, on all. If it raises, all of them stop.

    timeout: seconds that the others wait for it, if not as long as for anything else.
    """
    if ranks() == 1:
        return function()
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout)) if timeout else None
    cpu, found = torch.device("cpu"), [None, None]
    if rank() == 0:
        try:
            found[0] = function()
        except BaseException as error:  # whatever it is, the others wait for it
            found[1] = getattr(error, "status", 2)
            dist.broadcast_object_list(found, 0, group, cpu)
            raise
    dist.broadcast_object_list(found, 0, group, cpu)
    if found[1] is not None:
        raise Stopped(found[1], "")
    return found[0]


def refuse(message: str) -> NoReturn:
    """Ends every process, each of which has to call it, with status 2; the first one says why."""
    raise UserError(message) if rank() == 0 else Stopped(2, "")


def add_up(x: Tensor) -> Tensor:
    """The sum of x over all processes, written into it."""
    if ranks() > 1:
        dist.all_reduce(x)
    return x


def total(number: int) -> int:
    """Its sum over all processes."""
    return int(add_up(torch.tensor(number))) if ranks() > 1 else number


def largest(number: int) -> int:
    """The largest that any process has."""
    if ranks() == 1:
        return number
    found = torch.tensor(number)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def command(remake: str) -> str:
    """The command that was given, as far as it is known: on several machines torchrun takes more."""
    if ranks() == 1:
        return remake
    return remake.replace("python", f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', ranks())}", 1)


def distribute(model: nn.Module, how: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Moves a model to the device, in whole or in part; returns what is to be called in its place.

    dtype: of matrix products. With "fsdp" the blocks travel in it, and sums of gradients in float32 as everywhere. What
    is returned keeps the processes' gradients the same, but only where it is called as a function.
    """
    if ranks() == 1:
        return model.to(device)
    if how == "ddp":
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of broadcast_buffers' new name
            return nn.parallel.DistributedDataParallel(
                model.to(device),
                device_ids=[device.index] if device.type == "cuda" else None,
                broadcast_buffers=False,  # they are constants
                gradient_as_bucket_view=True,
                # No parameter is unused. But without this the order in which gradients are summed is another in the
                # first step of a process than in the rest, and a run that is resumed no longer the same.
                find_unused_parameters=True,
            )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (ranks(),))
    narrow = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=narrow)
    return fully_shard(model, mesh=mesh)  # embedding, last norm and output projection stay float32: so does the stream


def _sharded(x) -> bool:
    return hasattr(x, "full_tensor")  # a DTensor; its class takes a second to import


def whole(x):
    """Tensors in nested containers, those that are shared out put together, on the CPU. Every process must call it;
    only the first gets them."""
    if isinstance(x, dict):
        return {key: whole(value) for key, value in x.items()}
    if isinstance(x, list):
        return [whole(value) for value in x]
    if not isinstance(x, Tensor):
        return x
    x = x.full_tensor() if _sharded(x) else x
    return x.cpu() if rank() == 0 else None


def part(x: Tensor, like: Tensor) -> Tensor:
    """This process's share of a whole tensor, if that which it belongs to is shared out; else all of it."""
    if not _sharded(like) or x.shape != like.shape:
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
