"""What devices are called in reports and tables, and what they can do."""

import torch


def device_name(device: torch.device) -> str:
    """The name of a GPU, or the number of threads of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)}"


def computes_bf16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16; an x86 processor without instructions for it converts in software."""
    if device.type != "cpu":
        return True
    found = torch.cpu.get_capabilities()
    return found.get("architecture") != "x86_64" or any(found.get(name) for name in ("avx512_bf16", "amx_bf16"))
