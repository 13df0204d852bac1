"""One model on many processes, as torchrun starts them. With one process, nothing here does anything.

    torchrun --nproc_per_node=8 train.py configs/base.py

Every process computes the gradient of its rows of the global batch; the optimizer steps with their sum. With "ddp" each
process holds the whole model. With "fsdp" it holds a share of every matrix, its gradient and its optimizer state, and
gathers a block when it needs it. Only the first process writes to the disk.
"""

import datetime
import os
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

import cli
from cli import Stopped, UserError, log

DAY = 86_400.0


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def joined(timeout: float) -> Iterator[None]:
    """Joins the processes that torchrun started, and leaves them at the end. timeout: seconds to wait for another."""
    # If another one ends or does not answer, this one stops with one line and status 1 (or NCCL's watchdog stops it).
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        cli.end_with_parent(signal.SIGTERM)  # a killed torchrun cannot end its processes any more
    try:
        connect(datetime.timedelta(seconds=timeout))
        if rank():
            log.setLevel("ERROR")
        yield
        dist.destroy_process_group()
    except (UserError, Stopped) as error:
        if rank() == 0:
            raise
        message = f"process {rank()}: error: {error}" if isinstance(error, UserError) else ""
        raise Stopped(getattr(error, "status", 2), message) from None
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not re.search("gloo|NCCL|[Cc]onnection|[Tt]imed out", str(error)):
            raise
        reason = str(error).strip().splitlines()[0]
        what = f"has not answered for {timeout:g} s" if re.search("[Tt]imed out|[Tt]imeout", reason) else "has ended"
        message = f"another process {what}, so this one stops; run the same command again ({reason})"
        raise Stopped(1, f"process {rank()}: {message}") from None


def connect(timeout: datetime.timedelta) -> None:
    """Connects the processes: with NCCL for GPUs, one GPU per process, or with gloo for CPUs."""
    backend, local, gpus = "gloo", int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if torch.cuda.is_available():
        if local >= gpus:
            raise UserError(f"{local + 1} or more processes here, {gpus} GPUs; start --nproc_per_node={gpus}")
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    # After a restart, torchrun's store still has the addresses of the dead processes, so each attempt uses its own
    # names. The store counts the attempts, because every machine's torchrun has a count of its own.
    store, number, count = next(dist.rendezvous("env://", timeout=timeout))
    attempt = dist.PrefixStore(f"attempt {store.add('attempts', 0)}", store)
    try:
        dist.init_process_group(backend, store=attempt, rank=number, world_size=count, timeout=timeout)
    finally:
        if number == 0:
            store.add("attempts", 1)


class Signals:
    """Remembers a signal that stops the command: the loop finishes its step and saves. A second one exits at once."""

    caught, when = 0, 0.0

    def __enter__(self) -> "Signals":
        self.before = cli.handle(self._handle)
        return self

    def __exit__(self, *_):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _handle(self, signum, frame):
        # One Ctrl-C can arrive twice: the terminal sends it to all processes, and the parent (pipeline.py, or
        # torchrun, which takes longer) passes it on. The second one may interrupt this function at a call, so there is
        # no call between reading `caught` and setting it.
        now = time.monotonic()
        if not self.caught:
            self.caught, self.when = signum, now
            if rank() == 0:
                with suppress(OSError):  # the terminal is closed
                    os.write(2, b"\nfinishing the step and saving; once more to exit at once\n")
        elif now - self.when > (1 if ranks() == 1 else 5):
            os._exit(128 + signum)


def lead(function: Callable, timeout: float | None = None):
    """Calls a function in the first process only. All processes return its result, or stop if it raises."""
    # timeout: seconds that the other processes wait; None: the timeout of `joined`.
    if ranks() == 1:
        return function()
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout)) if timeout else None
    message = [None, None]  # the result, and the exit status of an error
    try:
        message[0] = function() if rank() == 0 else None
    except BaseException as error:  # even Ctrl-C: the others wait for an answer
        message[1] = getattr(error, "status", 2)
        raise
    finally:
        dist.broadcast_object_list(message, 0, group, torch.device("cpu"))
    result, status = message
    if status is not None:
        raise Stopped(status, "")
    return result


def refuse(message: str) -> NoReturn:
    """Ends all processes with status 2; the first one prints the message. Every process must call it."""
    raise UserError(message) if rank() == 0 else Stopped(2, "")


def add_up(x: Tensor, how=dist.ReduceOp.SUM) -> Tensor:
    """Replaces x by its sum over all processes, or by their maximum."""
    if ranks() > 1:
        dist.all_reduce(x, how)
    return x


def total(number: int) -> int:
    return int(add_up(torch.tensor(number)))


def largest(number: int) -> int:
    return int(add_up(torch.tensor(number), dist.ReduceOp.MAX))


def shared_rows(chosen: Sequence[int], rows: int) -> Iterator[tuple[list[int], bool]]:
    """Yields this process's share of `chosen`, at most `rows` at a time, and whether the share counts."""
    # All processes must call a sharded model together. A process with no row left reads the first row, uncounted.
    for start in range(0, len(chosen), rows * ranks()):
        share = chosen[start + rank() * rows : start + (rank() + 1) * rows]
        yield share or chosen[:1], bool(share)


def command(remake: str) -> str:
    """The command `remake`, by torchrun if torchrun started this process. Several machines need more switches."""
    torchrun = f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', ranks())}"
    return remake.replace("python", torchrun, 1) if ranks() > 1 else remake


class Exchange:
    """Adds up the processes' gradients while the backward pass still computes the rest (arXiv:2006.15704)."""

    # Not torch's DistributedDataParallel: after its first step, it changes the groups of gradients that it sends
    # together. A resumed run of three or more processes would sum in another order, and differ in the last digits.

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.parameters = [p for p in parameters if p.requires_grad]
        self.waiting, self.ready, self.sent = [], set(), []
        for p in self.parameters:
            dist.broadcast(p.data, 0)
            p.register_post_accumulate_grad_hook(self._arrived)

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """Encloses the last backward pass of a step. After it, every gradient is the sum over all processes."""
        self.waiting, self.ready, self.sent = self.parameters.copy(), set(), []
        yield
        for p in self.parameters:
            if p.grad is None:  # it had no part in this process's loss
                p.grad = torch.zeros_like(p)
            self._arrived(p)
        for work in self.sent:
            work.wait()

    def _arrived(self, p: nn.Parameter) -> None:
        # The backward pass reaches the last layer first. The order is fixed: gradients that a process sends in
        # another order than the others would be added to the wrong ones.
        self.ready.add(p)
        while self.waiting and self.waiting[-1] in self.ready:
            self.sent.append(dist.all_reduce(self.waiting.pop().grad, async_op=True))


def distribute(model: nn.Module, how: str, device: torch.device, dtype: torch.dtype) -> Exchange:
    """Moves a model, or this process's share of it, to the device. Returns the object that adds up its gradients."""
    # dtype: of matrix products; with "fsdp", processes send the weights of blocks in it, and gradients in float32.
    if how == "ddp" or ranks() == 1:
        model.to(device)
        return Exchange(model.parameters() if ranks() > 1 else [])
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (ranks(),))
    narrow = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=narrow)
    fully_shard(model, mesh=mesh)  # embedding, last norm and head stay float32, and so does the residual stream
    for module in (*model.blocks, model):  # a sum, not a mean
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)
    return Exchange([])


def whole(x):
    """Gathers sharded tensors in nested containers. Every process must call it; the first gets them, on its CPU."""
    if isinstance(x, dict):
        return {key: whole(value) for key, value in x.items()}
    if isinstance(x, list):
        return [whole(value) for value in x]
    if not isinstance(x, Tensor):
        return x
    x = x.full_tensor() if hasattr(x, "full_tensor") else x  # a DTensor; importing its class takes a second
    return x.cpu() if rank() == 0 else None


def part(x: Tensor, like: Tensor) -> Tensor:
    """This process's share of a whole tensor if `like`, the parameter it belongs to, is sharded; else all of it."""
    if not hasattr(like, "full_tensor") or x.shape != like.shape:
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
