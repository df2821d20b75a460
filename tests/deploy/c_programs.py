"""Networks in C for the tests, and a program that runs them on any machine."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from packed_files import describe
from tiny import tiny_pcnn
from torch import nn
from trained_networks import trained_digits

from pcnn_lightning.deploy.c.source import to_c
from pcnn_lightning.deploy.packed import PackedNetwork
from pcnn_lightning.modules import describe as describe_trained

STRICT = ["-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror"]

RUN = """
#include <stdio.h>
#include "network.h"

/* Print the label and the logits of each image in images.bin. */
int main(void)
{
    static network_arena arena;
    static uint8_t image[NETWORK_IMAGE_BYTES];
    static float logits[NETWORK_CLASSES];
    FILE *file = fopen("images.bin", "rb");

    while (file != NULL && fread(image, sizeof image, 1, file) == 1) {
        printf("%d", network_classify(image, logits, &arena));
        for (int index = 0; index < NETWORK_CLASSES; index++) {
            printf(" %.9g", (double)logits[index]);
        }
        printf("\\n");
    }
    return file == NULL;
}
"""


def needs(*programs):
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"there is no {program} here")


def packed(model, image_size, **changes):
    return PackedNetwork.of(model.net, describe(model, image_size, **changes))


def randomise(model):
    """Random batch norms and PReLUs; a third of their factors are negative."""
    for module in model.net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.normal_(0.5)
            module.bias.data.normal_()
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 2)
        elif isinstance(module, nn.PReLU):
            module.weight.data.normal_()
    return model.eval()


def odd_model(stage):
    torch.manual_seed(1)
    widths = [12, 20, 33, 65]
    return randomise(tiny_pcnn(in_channels=2, widths=widths, projections=1, num_classes=7, stage=stage))


def packed_digits(name):
    """The packed network of digits, and the 360 test images."""
    model, data = trained_digits(name)
    network = PackedNetwork.of(model.net, describe_trained(model, data))
    return network, torch.cat([raw[0] for raw in data.test_dataloader()])


def write_program(network, images):
    """Write network.c, network.h, run.c and images.bin into the current folder."""
    source = to_c(network, "network")
    Path("network.c").write_text(source.code, encoding="utf-8")
    Path("network.h").write_text(source.header, encoding="utf-8")
    Path("run.c").write_text(RUN, encoding="utf-8")
    Path("images.bin").write_bytes(images.contiguous().numpy().tobytes())


def build(compiler, *flags, sources=("run.c", "network.c"), output="run"):
    done = subprocess.run(
        [compiler, *STRICT, *flags, *sources, "-o", output], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def run_program(*command):
    """The labels and the logits that the program prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    table = np.loadtxt(done.stdout.splitlines(), ndmin=2)
    return torch.from_numpy(table[:, 0].astype(int)), torch.from_numpy(table[:, 1:].astype(np.float32))
