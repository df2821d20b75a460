"""What devices are called in reports and tables."""

import torch


def device_name(device: torch.device) -> str:
    """The name of a GPU, or the number of threads of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)}"
