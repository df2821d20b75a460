"""Networks in C give the labels of the frozen network; compiled for this machine."""

import os
import platform
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from agreement import assert_agree, logits_of
from c_programs import (
    build,
    needs,
    odd_model,
    packed,
    packed_digits,
    randomise,
    run_program,
    write_program,
)
from packed_files import describe, packed_file
from tiny import tiny_mcn, tiny_pcnn
from torch import nn
from trained_networks import IMAGE_SHAPE, MODELS, trained_model

from pcnn_lightning.deploy.c import compile_c, save_c
from pcnn_lightning.deploy.c.source import to_c
from pcnn_lightning.errors import InputError

FAST = ["-O1", "-Wall", "-Wextra", "-pedantic", "-Werror"]
WORDS = ["-DPCNN_WORD_BITS=32", "-DPCNN_WORD_BITS=64"]
POPCOUNTS = ["-mpopcnt", "-mno-popcnt", "-march=native"] if platform.machine() == "x86_64" else ["-march=native"]


@pytest.fixture(autouse=True)
def _compiler():
    needs("cc")


@pytest.fixture(scope="module", params=["PCNN", "MCN"])
def digits(request):
    return packed_digits(request.param)


@pytest.fixture(scope="module")
def pcnn_digits():
    return packed_digits("PCNN")


def assert_close(network, images, compiled):
    """No sign differs: a single one would exceed this."""
    expected = logits_of(network, images)
    assert compiled.classify(images).tolist() == expected.argmax(1).tolist()
    torch.testing.assert_close(compiled.logits(images), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def random_images(network, count=5):
    description = network.description
    return torch.randint(0, 256, (count, description.in_channels, *description.image_size), dtype=torch.uint8)


# --- the same labels --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("popcount", POPCOUNTS)
@pytest.mark.parametrize("words", WORDS)
def test_every_test_image_of_digits(pcnn_digits, words, popcount):
    network, images = pcnn_digits
    compiled = compile_c(network, flags=["-O2", words, popcount])
    assert len(images) == 360
    assert_agree(network, images, compiled.classify(images), compiled.logits(images))


def test_every_test_image_with_the_defaults(digits):
    network, images = digits
    compiled = compile_c(network)
    assert_agree(network, images, compiled.classify(images), compiled.logits(images))


def test_fused_multiplication_and_addition(pcnn_digits):
    """It changes the last bit of sums; thresholds are compared with the sums that are computed."""
    network, images = pcnn_digits
    compiled = compile_c(network, flags=["-O3", "-march=native", "-ffp-contract=fast"])
    assert_agree(network, images, compiled.classify(images), compiled.logits(images))


@pytest.mark.parametrize("name", MODELS)
def test_networks_of_all_kinds(name):
    model = trained_model(name)
    network = packed(model, IMAGE_SHAPE[1:])
    assert_close(network, random_images(network), compile_c(network, flags=FAST))


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("stage", ["binary", "ternary"])
@pytest.mark.parametrize("image_size", [(9, 7), (5, 16), (1, 3)])
def test_odd_numbers_of_channels_and_sizes(image_size, stage, words):
    network = packed(odd_model(stage), image_size)
    assert_close(network, random_images(network), compile_c(network, flags=[*FAST, words]))


@pytest.mark.parametrize("arguments", [{}, {"average": True}, {"levels": 3}, {"levels": 4}, {"binarize": False}])
def test_odd_numbers_of_modulated_maps(arguments):
    torch.manual_seed(1)
    model = tiny_mcn(in_channels=2, widths=[3, 5, 9, 11], planes=3, backbone="mcn_small", **arguments)
    network = packed(randomise(model), (9, 7))
    assert_close(network, random_images(network), compile_c(network, flags=FAST))


@pytest.mark.parametrize("stage", ["binary", "ternary"])
def test_signs_of_weights_alone(stage):
    """1-bit kernels on real activations, as in BWN."""
    model = tiny_pcnn(widths=[4, 6, 8, 9], stage=stage)
    for block in model.net.modules():
        if hasattr(block, "activation"):
            block.activation = nn.Identity()
    network = packed(randomise(model), (8, 8), sign_activations=False)
    source = to_c(network, "network").code
    assert "convolve_signs" not in source
    assert "uint8_t features_stage1_0_conv_codes[]" in source
    assert_close(network, random_images(network), compile_c(network, flags=FAST))


def test_constant_signs_and_signs_of_zero():
    """A batch norm with factor 0 has one sign everywhere, and the sign of 0 is +1."""
    model = randomise(tiny_pcnn(widths=[4, 4, 4, 4], projections=1))
    norm = model.net.features.stage1[0].norm
    norm.weight.data[:] = torch.tensor([0.0, 0.0, 1.0, -1.0])
    norm.bias.data[:] = torch.tensor([1.0, -1.0, 0.0, 0.0])
    norm.running_mean[:] = 0
    model.net.features.stem.prelu.weight.data[:] = 0  # many inputs are 0
    network = packed(model, (8, 8))
    assert_close(network, random_images(network), compile_c(network, flags=FAST))


def test_a_shortcut_around_nothing_but_a_convolution():
    """The output cannot take the memory of its shortcut, which the convolution reads."""
    network = packed(trained_model("PCNN full precision"), (9, 8))
    for name in ("stage1.0", "stage2.0", "stage3.0"):
        network.set_submodule(f"features.{name}.norm", nn.Identity())
    images = random_images(network)
    write_program(network, images)
    build("cc", "-O1")
    _, logits = run_program("./run")
    expected = logits_of(network, images)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_batch_norm_of_which_more_than_the_sign_is_used():
    network = packed(trained_model("PCNN J=1"), (9, 8))
    block = network.features.stage1[0]
    block.forward = lambda x: block.prelu(block.conv(block.activation(y := block.norm(x))) + y)
    images = random_images(network)
    write_program(network, images)
    build("cc", "-O1")
    assert_agree(network, images, *run_program("./run"))


# --- the files --------------------------------------------------------------------------------------------------


def test_self_test(digits):
    network, _ = digits
    save_c(network, "digits.c", network.description)
    build("cc", "-O2", "-DPCNN_SELF_TEST", sources=["digits.c"], output="self_test")
    done = subprocess.run(["./self_test"], capture_output=True, text=True, check=False)
    found = re.fullmatch(r"4 of 4 labels agree; the largest difference of logits is (\S+)\n", done.stdout)
    assert found is not None
    assert float(found[1]) < 1e-4
    assert done.returncode == 0


def test_self_test_fails_if_a_label_differs(pcnn_digits):
    network, _ = pcnn_digits
    save_c(network, "digits.c", network.description)
    text = Path("digits.c").read_text(encoding="utf-8")
    Path("digits.c").write_text(text.replace("(raw - ", "(-raw - "), encoding="utf-8")
    build("cc", "-O2", "-DPCNN_SELF_TEST", sources=["digits.c"], output="self_test")
    assert subprocess.run(["./self_test"], capture_output=True, check=False).returncode == 1


def test_a_program_of_c_files_alone(pcnn_digits):
    network, images = pcnn_digits
    write_program(network, images)
    build("cc", "-O3")
    assert_agree(network, images, *run_program("./run"))


def test_files_include_nothing_else(digits):
    network, _ = digits
    source = to_c(network, "network")
    headers = {"stddef.h", "stdint.h", "string.h", "network.h", "arm_neon.h", "stdio.h"}
    assert set(re.findall(r'#include [<"](.*)[>"]', source.code)) <= headers
    before, after = source.code.split("#ifdef PCNN_SELF_TEST")
    assert "stdio.h" not in before
    assert "stdio.h" in after
    assert re.findall(r"#include (.*)", source.header) == ["<stdint.h>"]
    assert "malloc" not in source.code
    assert max(map(len, (source.code + source.header).splitlines())) <= 120


def test_files_are_the_same_each_time(digits):
    network, _ = digits
    assert to_c(network, "network") == to_c(network, "network")


def test_sizes_in_the_head(pcnn_digits):
    network, _ = pcnn_digits
    source = to_c(network, "network")
    save_c(network, "network.c", network.description)
    text = '#include <stdio.h>\n#include "network.h"\nint main(void) { printf("%d", (int)NETWORK_ARENA_BYTES); }'
    Path("arena.c").write_text(text, encoding="utf-8")
    build("cc", sources=["arena.c"], output="arena")
    assert int(subprocess.check_output(["./arena"])) == source.arena_bytes
    flash, wide, ram = (
        int(number.replace(",", ""))
        for number in re.search(
            r"Flash: ([\d,]+) bytes of constants \(([\d,]+) with words of 64 bits\).*RAM:   ([\d,]+) bytes of arena",
            source.code,
            re.DOTALL,
        ).groups()
    )
    assert ram == source.arena_bytes
    assert flash < wide
    layers = 150 * source.code.count("_layer")  # structs, which are not counted
    for bits, constants in ((32, flash), (64, wide)):
        build("cc", "-c", f"-DPCNN_WORD_BITS={bits}", sources=["network.c"], output="network.o")
        table = subprocess.run(["size", "-A", "network.o"], capture_output=True, text=True, check=False).stdout
        size = sum(int(match[1]) for match in re.finditer(r"^\.(?:data\.rel\.ro.*|rodata\S*) +(\d+)", table, re.M))
        assert constants <= size < constants + 3000 + layers


def test_header_from_cpp(pcnn_digits):
    needs("c++")
    write_program(*pcnn_digits)
    build("cc", "-c", sources=["network.c"], output="network.o")
    text = Path("run.c").read_text(encoding="utf-8")
    Path("run.cpp").write_text(text, encoding="utf-8")
    flags = ["-Wall", "-Wextra", "-pedantic", "-Werror"]
    subprocess.run(["c++", *flags, "run.cpp", "network.o", "-o", "run"], check=True)
    assert len(run_program("./run")[0]) == 360


def test_names_of_classes():
    names = ['a "b"\\', "é??/", "", *"3456789"]
    network = packed(trained_model("PCNN J=4"), IMAGE_SHAPE[1:], class_names=tuple(names))
    save_c(network, "network.c", network.description)
    text = '#include <stdio.h>\n#include "network.h"\nint main(void) { for (int i = 0; i < NETWORK_CLASSES; i++)'
    Path("names.c").write_text(f"{text} puts(network_class_names[i]); }}", encoding="utf-8")
    build("cc", sources=["names.c", "network.c"], output="names")
    assert subprocess.check_output(["./names"]).decode().split("\n") == [*names, ""]


@pytest.mark.parametrize(("stem", "name"), [("digits", "digits"), ("my-net v1.2", "my_net_v1_2"), ("int", "int")])
def test_names_come_from_the_path(stem, name):
    network = packed(trained_model("PCNN J=4"), IMAGE_SHAPE[1:])
    save_c(network, f"folder/{stem}.c", network.description)
    assert sorted(path.name for path in Path("folder").iterdir()) == [f"{stem}.c", f"{stem}.h"]
    assert f"int {name}_classify(" in Path(f"folder/{stem}.h").read_text(encoding="utf-8")
    build("cc", "-c", sources=[f"folder/{stem}.c"], output="network.o")


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stem", ["3digits", "ünet", "_net", "a*b"])
def test_names_that_c_does_not_allow(stem):
    network = packed(trained_model("PCNN J=4"), IMAGE_SHAPE[1:])
    with pytest.raises(InputError, match=r"names in C cannot begin with "):
        save_c(network, f"{stem}.c", network.description)
    assert list(Path().iterdir()) == []


def test_another_suffix():
    model = trained_model("PCNN J=4")
    with pytest.raises(InputError, match=r"written as NAME\.c and NAME\.h, but the path is network\.so"):
        save_c(model.net, "network.so", describe(model))


def test_a_description_of_another_network_is_refused():
    model = trained_model("PCNN J=4")
    with pytest.raises(InputError, match="the network is not the one of its description"):
        save_c(model.net, "network.c", describe(model, stage="ternary"))


class Swish(nn.Module):
    def forward(self, x):
        return x * 0.5


class OwnConv2d(nn.Conv2d):
    pass


@pytest.mark.parametrize(
    ("path", "module", "why"),
    [
        ("features.stem.prelu", Swish(), r"features\.stem\.prelu \(Swish\) .*no translation for modules of this kind"),
        ("features.stem.conv", OwnConv2d(3, 8, 3, padding=1, bias=False), r"features\.stem\.conv \(OwnConv2d\)"),
        ("features.stem.conv", nn.Conv2d(3, 8, 3, padding=2, dilation=2, bias=False), "stem.conv .* it is dilated"),
        ("features.stem.conv", nn.Conv2d(3, 8, (3, 1), padding=(1, 0), bias=False), "the same along both sides"),
        (
            "features.stem.conv",
            nn.Conv2d(3, 8, 3, padding=1, bias=False, padding_mode="circular"),
            "padding mode is 'circular'",
        ),
        ("features.pool", nn.AvgPool2d((9, 8)), r"features\.pool .* its windows must be the same along both sides"),
        ("features.stem.prelu", nn.AvgPool2d(3, 1, padding=1), "its mean is not that of the pixels inside"),
    ],
)
def test_modules_without_a_translation(path, module, why):
    network = packed(trained_model("PCNN wrn7"), IMAGE_SHAPE[1:])
    network.set_submodule(path, module)
    with pytest.raises(InputError, match=why):
        to_c(network, "network")


# --- the classifier ---------------------------------------------------------------------------------------------


def test_a_packed_file_is_compiled():
    path = packed_file("PCNN J=4")
    compiled = compile_c(path, flags=FAST)
    assert compiled.description.backbone == "wrn7"
    images = torch.randint(0, 256, (3, *IMAGE_SHAPE), dtype=torch.uint8)
    swapped = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(compiled.logits(images), compiled.logits(swapped))
    assert compiled.classify(images[:0]).shape == (0,)
    assert compiled.logits(images[:0]).shape == (0, 10)
    with pytest.raises(ValueError, match=r"images must be uint8 of shape \(B, 3, 33, 30\), but got torch.float32"):
        compiled.classify(images.float())


def test_threads_and_a_fork(pcnn_digits):
    network, images = pcnn_digits
    compiled = compile_c(network)
    labels = compiled.classify(images)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(found, labels) for found in pool.map(compiled.classify, [images] * 8))
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(compiled.classify(images[:9]), labels[:9]) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_home_that_does_not_exist(monkeypatch):
    monkeypatch.setenv("HOME", "/nonexistent")
    compile_c(packed_file("PCNN J=4"), flags=FAST)


@pytest.mark.usefixtures("double_precision")
def test_compiled_networks_do_not_depend_on_the_default_dtype(pcnn_digits):
    network, images = pcnn_digits
    logits = compile_c(network, flags=FAST).logits(images[:5])
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, logits_of(network, images[:5]), rtol=0, atol=1e-4)


def test_no_compiler(monkeypatch):
    path = packed_file("PCNN J=4")
    monkeypatch.setenv("CC", "no-such-compiler -m32")
    with pytest.raises(InputError, match="there is no C compiler 'no-such-compiler -m32' here: install GCC or Clang"):
        compile_c(path)


def test_a_compiler_that_fails():
    with pytest.raises(InputError, match=r"^cc -std=c99 --no-such-flag .* failed: .*no-such-flag"):
        compile_c(packed_file("PCNN J=4"), flags=["--no-such-flag"])
