"""One model on many processes, as torchrun starts them; with one process, nothing of this happens.

    torchrun --nproc_per_node=8 train.py configs/base.py

Every process computes the gradient of its rows of the global batch, and the sum of all is what each of them steps by.
"ddp": each holds the whole model. "fsdp": each holds a share of every matrix, of its gradient and of the optimizer's
state; a block is put together when it is needed. The first process alone writes to the disk.
"""

import datetime
import os
import re
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

import cli
from cli import Stopped, UserError, log

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
        local, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= there:
            raise UserError(f"{local + 1} or more processes here, {there} GPUs; start --nproc_per_node={there}")
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        cli.end_with_parent(signal.SIGTERM)  # torchrun, if it is killed, cannot end its processes any more
    wait = datetime.timedelta(seconds=timeout)
    try:
        # After a restart torchrun's store still has the addresses of the dead: each attempt gets names of its own. They
        # are counted in the store, for torchrun counts on each machine by itself.
        store, this, count = next(dist.rendezvous("env://", timeout=wait))
        attempt = dist.PrefixStore(f"attempt {store.add('attempts', 0)}", store)
        try:
            dist.init_process_group(backend, store=attempt, rank=this, world_size=count, timeout=wait)
        finally:
            if this == 0:
                store.add("attempts", 1)
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
        what = f"has not answered for {timeout:g} s" if re.search("[Tt]imed out|[Tt]imeout", reason) else "has ended"
        raise Stopped(
            1, f"process {rank()}: another one {what}, and so this one stops; the same command goes on ({reason})"
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


class Exchange:
    """Adds up the processes' gradients while the backward pass still computes the rest (arXiv:2006.15704).

    A gradient is a view of a bucket, 25 MB of them in a row, from the last parameter to the first: the order in which
    the backward pass comes to them. A bucket whose gradients are all there is on its way. Which gradient lies where
    never changes, and so neither does the order of any sum: a run that is resumed gives the same bytes. A parameter
    that has no part in the loss has a gradient of zeros, not none: freeze it, if it is to stay as it is.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        buckets: list[list[nn.Parameter]] = [[]]
        for p in reversed([p for p in parameters if p.requires_grad]):
            if buckets[-1] and sum(q.numel() for q in buckets[-1]) + p.numel() > 25_000_000 // 4:
                buckets.append([])
            buckets[-1].append(p)
        self.sizes, self.sums, self.open = [len(bucket) for bucket in buckets], [], False
        for i, bucket in enumerate(buckets):
            self.sums.append(torch.zeros(sum(p.numel() for p in bucket), device=bucket[0].device))
            for p, gradient in zip(bucket, self.sums[i].split([p.numel() for p in bucket]), strict=True):
                dist.broadcast(p.data, 0)  # they are the same, or else are from here on
                p.grad = gradient.view_as(p)  # which backward adds to
                p.register_post_accumulate_grad_hook(partial(self._arrived, i))

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """Around the last backward pass of a step. After it every gradient is the sum of all processes'."""
        self.missing, self.sent, self.open = list(self.sizes), [], True
        yield
        self.open = False
        self._send(len(self.sums))  # and those that had no part in the loss
        for work in self.sent:
            work.wait()

    def _arrived(self, bucket: int, _: nn.Parameter) -> None:
        if self.open:
            self.missing[bucket] -= 1
            self._send(next((i for i, missing in enumerate(self.missing) if missing), len(self.missing)))

    def _send(self, until: int) -> None:
        """Sends the buckets before one: all processes in the same order."""
        for total in self.sums[len(self.sent) : until]:
            self.sent.append(dist.all_reduce(total, async_op=True))


def distribute(model: nn.Module, how: str, device: torch.device, dtype: torch.dtype) -> Exchange | None:
    """Moves a model to the device, in whole or in part, and has the processes add up their gradients: with "ddp" by
    what is returned, with "fsdp" by themselves, wherever the model is called as a function.

    dtype: of matrix products. With "fsdp" the blocks travel in it, and sums of gradients in float32 as everywhere.
    """
    if ranks() == 1 or how == "ddp":
        model.to(device)
        return Exchange(model.parameters()) if ranks() > 1 else None
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (ranks(),))
    narrow = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=narrow)
    fully_shard(model, mesh=mesh)  # embedding, last norm and output projection stay float32: so does the stream
    for module in (*model.blocks, model):  # a sum, not a mean
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)


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
