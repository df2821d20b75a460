"""Networks from outside the package on the command line."""

import signal
from pathlib import Path

import pytest
import torch
from cli_helpers import DIGITS, QUIET, load, same_weights, tensors_in
from lightning.pytorch import Callback
from tiny import TinyNetwork
from torch import nn
from torchvision.models import resnet18

from pcnn_lightning.deploy import load_packed, save_packed
from pcnn_lightning.modules import describe

TRAINING = [*QUIET, "--trainer.max_epochs=1", "--model.eta2=0.01"]
PCNN = ["--model=PCNN", "--model.projections=2", "--model.stage=ternary", "--stage_switch.epoch=1"]
OWN = [*DIGITS, *PCNN, "--model.network=tiny.TinyNetwork", *TRAINING]
THRESHOLDS = "--model.convert={activations: threshold}"


class Stop(Callback):
    """End the run in the middle of its second epoch, as SIGTERM does."""

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 3:
            signal.raise_signal(signal.SIGTERM)


def test_a_network_of_torchvision_goes_through_all_commands(command):
    network = ["--model=BNN", "--model.backbone=torchvision/resnet18", "--model.small_images=true"]
    fitted = command("fit", *DIGITS, *network, *QUIET, "--trainer.max_epochs=1", "--model.eta1=0.01")
    assert fitted.code == 0, fitted.err
    assert len(fitted.cli.model.one_bit_layers) == 16
    seen = command("fit", *DIGITS, *network, "--trainer.fast_dev_run=true", "--trainer.accelerator=cpu").out
    assert "16 of 21 layers became 1-bit: " in seen
    assert "features.layer4.0.conv1" in command("summary", *DIGITS, *network).out
    best = "--ckpt_path=runs/default/version_0/checkpoints/binary.ckpt"
    tested = command("test", *DIGITS, *QUIET, best)
    assert command("export", *DIGITS, best, "--output=network.safetensors").code == 0
    packed = command("test", *DIGITS, *QUIET, "--ckpt_path=network.safetensors")
    assert packed.code == 0, packed.err
    results = [run.cli.trainer.callback_metrics["test/accuracy"] for run in (tested, packed)]
    assert results[0] == results[1]
    assert command("export", *DIGITS, best, "--format=c", "--output=network.c").code == 0


@pytest.mark.parametrize("more", [[], [THRESHOLDS], ["--model.center_loss_weight=0.01", "--model.full_precision=true"]])
def test_a_network_of_ones_own_resumes_bit_for_bit(command, more):
    if "--model.full_precision=true" in more:
        more = [*more, "--stage_switch=null"]
    whole = command("fit", *OWN, *more, "--trainer.max_epochs=3", "--run_dir=whole")
    assert whole.code == 0, whole.err
    cut = command(
        "fit", *OWN, *more, "--trainer.max_epochs=3", "--run_dir=cut", f"--trainer.callbacks+={__name__}.Stop"
    )
    assert cut.code == 143
    again = command("fit", *OWN, *more, "--trainer.max_epochs=3", "--run_dir=cut", "--ckpt_path=last")
    assert again.code == 0, again.err
    assert same_weights(again.cli.model, whole.cli.model)
    tensors = [tensors_in(load(Path(name, "version_0/checkpoints/last.ckpt"))) for name in ("whole", "cut")]
    assert all(torch.equal(*pair) for pair in zip(*tensors, strict=True))


def test_a_packed_network_of_ones_own_is_loaded_by_what_makes_it(command, tmp_path):
    fitted = command("fit", *OWN, THRESHOLDS)
    assert fitted.code == 0, fitted.err
    model, data = fitted.cli.model.eval(), fitted.cli.datamodule
    save_packed(model.net, tmp_path / "own.safetensors", describe(model, data))
    images = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(load_packed(tmp_path / "own.safetensors", network=TinyNetwork)(images), model(images))
    command("test", *DIGITS, "--ckpt_path=own.safetensors").is_refused("own.safetensors", "load_packed(path, network=")


class Flattening(nn.Module):
    """A network for 8×8 images only."""

    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.stem, self.main = nn.Conv2d(in_channels, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4 * 8 * 8, num_classes)

    def forward(self, images):
        return self.head(self.main(self.stem(images)).flatten(1))


def test_a_network_sees_images_of_the_size_of_the_data(command):
    network = ["--model=BNN", f"--model.network={__name__}.Flattening"]
    fitted = command("fit", *DIGITS, *network, *QUIET, "--trainer.max_epochs=1", "--model.eta1=0.01")
    assert fitted.code == 0, fitted.err
    assert list(fitted.cli.model.one_bit_layers) == ["features.main"]
    tested = command("test", *DIGITS, *QUIET, "--ckpt_path=runs/default/version_0/checkpoints/last.ckpt")
    assert tested.code == 0, tested.err
    command("summary", *DIGITS, *network, "--data.image_size=16").is_refused("(1, 16, 16)", "cannot pass")


def test_a_checkpoint_does_without_the_file_of_pretrained_weights(command):
    torch.save(resnet18(num_classes=1000).state_dict(), "weights.pt")
    network = ["--model=BNN", "--model.backbone=torchvision/resnet18", "--model.pretrained=weights.pt"]
    fitted = command("fit", *DIGITS, *network, *QUIET, "--trainer.max_epochs=1", "--model.eta1=0.01")
    assert fitted.code == 0, fitted.err
    Path("weights.pt").unlink()
    tested = command("test", *DIGITS, *QUIET, "--ckpt_path=runs/default/version_0/checkpoints/last.ckpt")
    assert tested.code == 0, tested.err
    assert fitted.cli.model.twin().net is not None


REFUSED = {
    "an unknown key": (["--model.convert={includes: [a]}"], ("includes", "include, exclude, overrides")),
    "a pattern without a match": (["--model.convert={include: [three]}"], ("'three'", "stem, main, last")),
    "other activations": (["--model.convert={activations: 1-bit}"], ("activations", "real, sign, threshold", "1-bit")),
    "widths": (["--model.widths=[2,2]"], ("widths", "networks of this package", "tiny.TinyNetwork")),
    "dropout": (["--model.dropout=0.5"], ("dropout", "networks of this package")),
    "no such function": (["--model.network=nowhere.build"], ("nowhere.build",)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_are_refused_in_one_line(command, name):
    added, mentioned = REFUSED[name]
    command("fit", *OWN, *added).is_refused(*mentioned)


def test_arguments_of_conversion_are_for_networks_from_outside(command):
    own = [*DIGITS, "--model=PCNN", "--model.backbone=wrn7", *TRAINING]
    command("fit", *own, THRESHOLDS).is_refused("convert", "torchvision and timm or your own", "wrn7")
    command("fit", *own, "--model.pretrained=true").is_refused("pretrained", "wrn7")
    mcn = [*DIGITS, "--model=MCN", "--model.planes=1", "--model.network=tiny.TinyNetwork", *TRAINING]
    command("fit", *mcn, THRESHOLDS).is_refused("activations", "real", "threshold")
