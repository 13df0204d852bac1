"""The model traced on fake CUDA tensors, without a GPU: finds tensors on the wrong device. It computes nothing.

A part of `python -m benchmarks.gpu_rehearsal`, behind --trace. A fake tensor (PyTorch's FakeTensorMode) has a shape, a
dtype and a device, but no numbers. Tensors on the CPU stay real, so that the host's bookkeeping runs as usual; what the
host reads from the GPU is 0. Triton kernels cannot run on fake tensors: their plain twins are traced. PyTorch starts no
backward pass on CUDA tensors without a driver, so only those gradients are traced that the loss computes itself.

    wrong device    an operation that mixes tensors of the GPU with tensors of the CPU: an error on a card, or, for an
                    index, a hidden copy. Should be 0
    waits           the host reads from the GPU, or copies to it without non_blocking, and so waits until all earlier
                    work there is done
    unpinned        copies to the GPU marked non_blocking that block all the same, because the memory is not pinned
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import cli
import generate
from model import KVCache, ModelConfig, Transformer, loss_and_gradients

ROOT = Path(__file__).resolve().parent.parent
SHAPE = ModelConfig(vocab_size=512, context_length=64, n_layers=2, d_model=64, n_heads=4, n_kv_heads=2, kernels="torch")
B, T = 4, 64
aten = torch.ops.aten


def place() -> str:
    """The line of the project that is running: file, line and function."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path != Path(__file__) and ".venv" not in path.parts:
            return f"{path.relative_to(ROOT)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "the benchmark"


class Watch(TorchDispatchMode):
    """Runs operations of the CPU, leaves those of the GPU to a FakeTensorMode, and notes what crosses between them."""

    def __init__(self):
        super().__init__()
        self.operations = 0  # on the GPU
        self.noted: Counter[tuple[str, str]] = Counter()  # (kind, place and operation)
        self.pinned: dict[int, Tensor] = {}  # by address: memory that would be pinned, were there a driver

    def note(self, kind: str, what: object) -> None:
        self.noted[kind, f"{place()}: {what}"] += 1

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        key = torch._C.DispatchKey.CompositeImplicitAutograd
        if operation.namespace == "aten" and operation.has_kernel_for_dispatch_key(key):
            with self:  # it consists of other operations
                return operation.decompose(*args, **kwargs)
        fake = any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs)))
        if fake or torch.device(kwargs.get("device") or "cpu").type == "cuda":
            self.operations += operation.namespace == "aten"
            return self.on_gpu(operation, args, kwargs)
        with unset_fake_temporarily():
            return self.on_cpu(operation, args, kwargs)

    def on_cpu(self, operation, args: tuple, kwargs: dict):
        if operation is aten.is_pinned.default:
            return args[0].untyped_storage().data_ptr() in self.pinned
        pin = operation is aten._pin_memory.default or kwargs.get("pin_memory")
        if operation is aten._pin_memory.default:
            result = args[0].clone()
        else:
            result = operation(*args, **kwargs | ({"pin_memory": False} if pin else {}))
        if pin:
            self.pinned[result.untyped_storage().data_ptr()] = result
        return result

    def on_gpu(self, operation, args: tuple, kwargs: dict):
        if operation is aten._local_scalar_dense.default:
            self.note("waits", "reads a number")
            return {torch.bool: False}.get(args[0].dtype, 0.0 if args[0].is_floating_point() else 0)
        if operation is aten.equal.default:
            self.note("waits", "compares")
            return True
        if operation is aten._to_copy.default:
            return self.copied(args[0], kwargs)
        if operation is aten.copy_.default:
            target, source = args[:2]
            if not isinstance(target, FakeTensor):
                self.note("waits", "copies to the CPU")
                return target
            self.note_copy(source, kwargs.get("non_blocking") or args[2:3] == (True,))
            return operation(*args, **kwargs)
        return operation(*tree_map(lambda leaf: self.moved(operation, leaf), args), **kwargs)

    def copied(self, x: Tensor, kwargs: dict) -> Tensor:
        """x.to(device, dtype) with one of the two on the GPU."""
        device, dtype = torch.device(kwargs.get("device") or x.device), kwargs.get("dtype") or x.dtype
        if device.type == "cpu":
            self.note("waits", "copies to the CPU")
            with unset_fake_temporarily():
                return torch.zeros(x.shape, dtype=dtype)
        self.note_copy(x, kwargs.get("non_blocking"))
        return torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=device)

    def note_copy(self, source: Tensor, non_blocking: bool) -> None:
        if isinstance(source, FakeTensor):
            return
        if not non_blocking:
            self.note("waits", "copies to the GPU without non_blocking")
        elif source.untyped_storage().data_ptr() not in self.pinned:
            self.note("unpinned", "copies to the GPU")

    def moved(self, operation, leaf: object) -> object:
        """A tensor of the CPU, noted, as one of the GPU, so that the trace goes on. A single number may stay there."""
        if not isinstance(leaf, Tensor) or isinstance(leaf, FakeTensor) or leaf.dim() == 0:
            return leaf
        self.note("wrong device", f"{operation} with a tensor of the CPU, {tuple(leaf.shape)}")
        return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="cuda")


@contextlib.contextmanager
def autocast() -> Iterator[None]:
    """torch.autocast("cuda", torch.bfloat16), which without a card would turn itself off."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


def losses(model: Transformer, tokens: Tensor, targets: Tensor) -> None:
    """The loss and the gradients that it computes itself: of the mean, and with a weight for each target."""
    model(tokens, targets)
    each = model(tokens, targets, reduction="none")
    with autocast():
        model(tokens, targets)
    x = model.hidden(tokens).flatten(0, 1)
    options = torch.float32, "torch", True
    with torch.no_grad():
        loss_and_gradients(x, model.head.weight, targets.flatten(), options, each.flatten(), True, True)


def cached(model: Transformer, tokens: Tensor) -> None:
    """A prompt of 5 tokens, one more, and one more after texts of unequal lengths."""
    with torch.inference_mode():
        cache = KVCache(model, B, T)
        for part in (tokens[:, :5], tokens[:, 5:6]):
            model(part, cache=cache)
        cache.used[0] = 3
        model(tokens[:, 6:7], cache=cache)
        cache.clear(1)
        cache.move(2, 1)


def parts(model: Transformer, tokens: Tensor) -> dict[str, Callable[[], object]]:
    """What is traced, by name. tokens: (B, T) on the CPU."""
    gpu = tokens.to("cuda")
    packed = torch.cat((torch.arange(20), torch.arange(T - 20))).expand(B, T)  # two texts in each row
    branching = torch.cat((torch.arange(30), torch.arange(10, 10 + T - 30))).expand(B, T)  # two endings of one
    seen = torch.ones(B, 1, T, T, dtype=torch.bool, device="cuda")
    ignored = tokens.where(tokens % 5 > 0, -100)
    prompts = [[1, 2, 3], [4, 5]]
    return {
        "forward": lambda: model(gpu),
        "loss, targets on the GPU": lambda: losses(model, gpu, gpu),
        "loss, targets on the CPU": lambda: losses(model, gpu, ignored),
        "packed attention": lambda: model(gpu, gpu, positions=packed),
        "packed attention, shared prompts": lambda: model(gpu, gpu, positions=branching),
        "attention with a mask": lambda: model.hidden(gpu, positions=packed, mask=seen),
        "cached decoding": lambda: cached(model, gpu),
        "generate, greedy": lambda: generate.generate(model, prompts, 3, temperature=0),
        "generate, top_k": lambda: generate.generate(model, prompts, 3, temperature=0.8, top_k=5, seed=0),
    }


def main() -> None:
    if torch.version.cuda is None:
        version = torch.__version__.partition("+")[0]
        raise cli.UserError(
            f"--trace needs a PyTorch built for CUDA (no card), and this is {torch.__version__}; into another "
            f"environment: pip install torch=={version} --index-url https://download.pytorch.org/whl/cu130"
        )
    torch.manual_seed(0)
    model, tokens = Transformer(SHAPE), torch.randint(SHAPE.vocab_size, (B, T))
    lines, noted, failed = [("part", "operations", "wrong device", "waits", "unpinned")], Counter(), []
    with FakeTensorMode(allow_non_fake_inputs=True):
        with Watch():
            model.to("cuda")
            traced = parts(model, tokens)
        for name, part in traced.items():
            watch = Watch()
            try:
                with watch:
                    part()
            except Exception as error:  # of any kind: the other parts are still worth tracing
                failed.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
            sums = Counter()
            for (kind, _), count in watch.noted.items():
                sums[kind] += count
            lines.append((name, str(watch.operations), *(str(sums[kind]) for kind in lines[0][2:])))
            noted |= watch.noted
    print(cli.table(lines, right=range(1, 5)))
    for kind in lines[0][2:]:
        found = sorted(what for other, what in noted if other == kind)
        print(f"\n{kind}: {'none' if not found else ''}", *found, sep="\n    ")
    print(*(f"\ncould not be traced: {line}" for line in failed), sep="", end="")
    if failed or any(kind == "wrong device" for kind, _ in noted):
        raise SystemExit(1)
