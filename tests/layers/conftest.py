"""Ways to copy a layer."""

import copy
import io
import pickle

import pytest
import torch


def through_pickle(layer):
    return pickle.loads(pickle.dumps(layer))


def through_torch_save(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.fixture(params=[copy.deepcopy, through_pickle, through_torch_save])
def duplicate(request):
    """A function that copies a layer."""
    return request.param
