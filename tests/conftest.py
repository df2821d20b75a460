import warnings

import pytest
import torch

# The networks here are too small to gain from a second thread.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _temporary_folder(tmp_path, monkeypatch):
    """Run each test in a temporary folder, where relative paths and default outputs end up."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")  # whatever terminal the tests are run in
    warnings.filterwarnings("ignore", ".*(many workers|LeafSpec|logging interval|exists and is not empty)")
