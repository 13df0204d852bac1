import sys, ctypes, torch
from stage import log


def pick_device():
    return torch.device("cpu")


def pick_dtype(device, precision):
    return torch.float32 if precision == "auto" else getattr(torch, precision)


def peak_flops(d, t):
    return None


def page(*a):
    return ["page"]


def out_of_memory(e):
    return False


def smaller(*a):
    return ""


def make_deterministic(d):
    pass


def compile_blocks(model, device) -> None:
    """Has torch.compile fuse what stands between a block's matrix products; a warning where it cannot.

    One block is compiled, and its code serves all of them: 11 s for tiny, where the whole model takes 29.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=next(model.parameters()).device))
    except Exception as error:  # no C++ compiler, no Python headers, …: its messages come in many types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        log.warning(f"training goes on uncompiled, and slower; set compile=False, or mend this: {reason}")
        return
    for block in model.blocks:
        block.compile()


def keep_freed_memory() -> None:
    """Has the C library keep the memory that a step frees for the next one.

    By default it returns large blocks to the system, and getting them anew costs a step of tiny on a CPU 37,000 page
    faults, a twelfth of its time.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):  # glibc has it
        M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
