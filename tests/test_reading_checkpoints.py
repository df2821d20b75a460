"""Reading checkpoints: damaged ones are refused, and none can run code."""

import os
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import fit, tiny_digits, tiny_pcnn, tiny_trainer

from pcnn_lightning import PCNN, StageCheckpoint
from pcnn_lightning.checkpoints import load_checkpoint
from pcnn_lightning.errors import InputError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    fit(tiny_pcnn(), callbacks=[StageCheckpoint(str(folder))], enable_checkpointing=True)
    return folder / "last.ckpt"


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_changes_no_tensor(checkpoint, tmp_path, position, bit):
    content = bytearray(checkpoint.read_bytes())
    content[int(position * len(content))] ^= 1 << bit
    (tmp_path / "flipped.ckpt").write_bytes(content)
    try:
        read = load_checkpoint(str(tmp_path / "flipped.ckpt"))
    except InputError:
        return
    for name, value in load_checkpoint(str(checkpoint))["state_dict"].items():  # the bit is of padding
        assert torch.equal(read["state_dict"][name], value)


def test_no_bit_of_the_directory_of_a_file_changes_what_is_read(checkpoint, tmp_path):
    """Torch takes an entry that is marked as a folder for an empty one, and leaves its tensor unread."""
    content, flipped = checkpoint.read_bytes(), tmp_path / "flipped.ckpt"
    start = content.index(b"PK\x01\x02")
    fields = range(start, start + 2 * content[start + 1 :].index(b"PK\x01\x02"))  # of two entries
    weights = load_checkpoint(str(checkpoint))["state_dict"]
    for position in fields:
        for bit in range(8):
            changed = bytearray(content)
            changed[position] ^= 1 << bit
            flipped.write_bytes(changed)
            try:
                read = load_checkpoint(str(flipped))["state_dict"]
            except InputError:
                continue
            assert all(torch.equal(read[name], value) for name, value in weights.items()), (position, bit)


RUNS = ["fit", "validate", "test", "predict"]


@pytest.mark.parametrize("read", [*RUNS, "load_from_checkpoint"])
def test_a_damaged_file_is_refused_by_whatever_reads_it(checkpoint, tmp_path, read):
    content = bytearray(checkpoint.read_bytes())
    weight = torch.load(checkpoint, weights_only=True)["state_dict"]["net.classifier.weight"]
    content[content.index(weight.numpy().tobytes())] ^= 64
    path = tmp_path / "flipped.ckpt"
    path.write_bytes(content)
    readers = {name: partial(getattr(tiny_trainer(), name), tiny_pcnn(), datamodule=tiny_digits()) for name in RUNS}
    readers["load_from_checkpoint"] = lambda ckpt_path: PCNN.load_from_checkpoint(ckpt_path)
    with pytest.raises(InputError, match=r"flipped\.ckpt is damaged or no checkpoint"):
        readers[read](ckpt_path=path)


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"a checkpoint must be a file, but .*pipe is none"):
        load_checkpoint(str(tmp_path / "pipe"))


def test_a_remote_file_is_refused():
    with pytest.raises(InputError, match=r"must be a local file, but got http://host/x\.ckpt"):
        load_checkpoint("http://host/x.ckpt")


@pytest.mark.parametrize("weights_only", [None, False])
def test_training_on_never_runs_code_of_the_file(checkpoint, tmp_path, monkeypatch, weights_only):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({**torch.load(checkpoint, weights_only=True), "evil": Evil()}, tmp_path / "evil.ckpt")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    trainer = tiny_trainer(callbacks=[StageCheckpoint(str(tmp_path / "kept"))], enable_checkpointing=True, max_epochs=2)
    with pytest.raises(InputError, match=r"evil\.ckpt is damaged or no checkpoint"):
        trainer.fit(tiny_pcnn(), datamodule=tiny_digits(), ckpt_path=tmp_path / "evil.ckpt", weights_only=weights_only)
    assert not (tmp_path / "executed").exists()
