"""What devices are called in reports and tables, and what they can do."""

import ctypes
from contextlib import suppress

import torch


def device_name(device: torch.device) -> str:
    """The name of a GPU, or the number of threads of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)}"


def keep_freed_memory() -> None:
    """Let glibc keep what this process frees, for its next tensors; with other C libraries, do nothing.

    By default it returns the memory of large tensors to the system and asks for it again in each step, and the system
    clears every page anew. This takes a fifth of a step of a small network. What a process once took stays with it.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give back the top of the heap
        mallopt(-4, 0)  # M_MMAP_MAX: take all tensors from the heap


def computes_bf16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16; an x86 processor without instructions for it converts in software."""
    if device.type != "cpu":
        return True
    found = torch.cpu.get_capabilities()
    return found.get("architecture") != "x86_64" or any(found.get(name) for name in ("avx512_bf16", "amx_bf16"))
