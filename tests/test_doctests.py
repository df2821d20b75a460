"""The examples in docstrings."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import pcnn_lightning.functional
import pcnn_lightning.layers
import pcnn_lightning.losses

MODULES = [
    name
    for room in (pcnn_lightning.functional, pcnn_lightning.layers, pcnn_lightning.losses)
    for _, name, _ in pkgutil.iter_modules(room.__path__, f"{room.__name__}.")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(name)
    results = doctest.testmod(module, extraglobs={"torch": torch})
    assert results.failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    examples = [test.name for name in MODULES for test in finder.find(importlib.import_module(name)) if test.examples]
    assert len(examples) >= 10
