"""Randomly corrupted configurations and checkpoints end in an error message."""

import random
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from tiny import fit, tiny_mcn, tiny_pcnn

from pcnn_lightning.checkpoints import load_checkpoint
from pcnn_lightning.cli import main
from pcnn_lightning.errors import InputError

CONFIGS = Path(__file__).parents[2] / "configs"
SECONDS = 25
NASTY = [-1, 0, 1, 3, 0.5, -0.5, 1e-300, float("nan"), float("inf"), "abc", "", "3", None, True, [], [1], {}, {"a": 1}]


def corrupt(value: object, rng: random.Random) -> object:
    """A copy with one value, key or item changed, removed or added."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        if rng.random() < 0.1:
            return {name: item for name, item in value.items() if name != key}
        if rng.random() < 0.1:
            return {**value, "unknown": rng.choice(NASTY)}
        return {**value, key: corrupt(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        return [*value[:place], corrupt(value[place], rng), *value[place + 1 :]]
    return rng.choice(NASTY)


def status_of(*args: str, said: str) -> object:
    try:
        main(list(args))
    except SystemExit as leave:
        return leave.code
    except Exception as error:
        raise AssertionError(said) from error
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "mcn_digits"])
def test_corrupted_configurations_end_in_a_message(tmp_path, monkeypatch, capsys, name):
    """``summary`` builds everything in a configuration without training."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pcnn_lightning"])
    whole = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    statuses, end, seed = set(), time.monotonic() + SECONDS, 0
    while time.monotonic() < end:
        seed += 1
        Path("corrupted.yaml").write_text(yaml.safe_dump(corrupt(whole, random.Random(seed))), encoding="utf-8")
        said = f"seed {seed}: {Path('corrupted.yaml').read_text()}"
        status = status_of("summary", "--config=corrupted.yaml", said=said)
        assert status in (0, 2), said
        assert status == 0 or "error: " in capsys.readouterr().err, said
        capsys.readouterr()
        statuses.add(status)
    assert statuses == {0, 2}


@pytest.mark.slow
@pytest.mark.parametrize("family", [tiny_pcnn, tiny_mcn])
def test_corrupted_checkpoints_end_in_a_message(tmp_path, family):
    """Truncated checkpoints or changed bytes are either refused or loaded completely."""
    model = family(center_loss_weight=0.1)
    fit(model).save_checkpoint(tmp_path / "x.ckpt")
    content, refused = (tmp_path / "x.ckpt").read_bytes(), 0
    corrupted, end, seed = tmp_path / "corrupted.ckpt", time.monotonic() + SECONDS, 0
    while time.monotonic() < end:
        seed += 1
        rng = random.Random(seed)
        changed = bytearray(content[: rng.randrange(len(content))] if rng.random() < 0.3 else content)
        for _ in range(rng.randrange(1, 20)):
            if changed:
                changed[rng.randrange(len(changed))] = rng.randrange(256)
        corrupted.write_bytes(changed)
        try:
            checkpoint = load_checkpoint(str(corrupted))
            model.on_load_checkpoint(checkpoint)
            model.load_state_dict(checkpoint["state_dict"])
        except InputError:  # any other error fails the test
            refused += 1
    assert refused > 0
    corrupted.write_bytes(b"")
    with pytest.raises(InputError):
        load_checkpoint(str(corrupted))
    torch.save({"state_dict": {}, "hyper_parameters": {}, "one_bit": Path("x")}, corrupted)
    with pytest.raises(InputError):
        load_checkpoint(str(corrupted))
