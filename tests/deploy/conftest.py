import pytest
import torch


@pytest.fixture
def double_precision():
    """Makes float64 torch's default, as a user may have done."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
