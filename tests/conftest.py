import warnings

import pytest
import torch

# The networks here are so small that a second thread costs more than it brings.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    """What a run writes without being told where goes to the test's own folder."""
    monkeypatch.chdir(tmp_path)
    warnings.filterwarnings("ignore", ".*(many workers|LeafSpec|logging interval|exists and is not empty)")
