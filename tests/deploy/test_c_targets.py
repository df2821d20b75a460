"""Networks in C on other processors, with other compilers and under sanitizers: the same labels everywhere."""

import subprocess
from pathlib import Path

import pytest
import torch
from agreement import assert_agree
from c_programs import STRICT, build, needs, odd_model, packed, packed_digits, run_program, write_program
from trained_networks import IMAGE_SHAPE, trained_model

from pcnn_lightning.deploy.c import save_c

pytestmark = pytest.mark.slow

SANITIZERS = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
KINDS = ["PCNN wrn7", "PCNN resnet18", "PCNN vgg_small", "PCNN mcn8", "PCNN mcn_small", "PCNN J=4", "PCNN ternary"]
KINDS += ["PCNN full precision", "MCN mcn8", "MCN mcn_small", "MCN-1", "MCN U=3", "MCN U=4", "U-MCN"]
TARGETS = {
    "aarch64": ("aarch64-linux-gnu-gcc", "qemu-aarch64"),
    "armhf": ("arm-linux-gnueabihf-gcc", "qemu-arm"),
    "armhf with NEON": ("arm-linux-gnueabihf-gcc", "qemu-arm", "-mfpu=neon"),
    "s390x": ("s390x-linux-gnu-gcc", "qemu-s390x"),  # big-endian
}

LINKER_SCRIPT = """
MEMORY { FLASH (rx) : ORIGIN = 0, LENGTH = 4M  RAM (rwx) : ORIGIN = 0x20000000, LENGTH = 4M }
ENTRY(reset)
SECTIONS {
    .text : { KEEP(*(.vectors)) *(.text*) *(.rodata*) KEEP(*(.init)) KEEP(*(.fini)) } > FLASH
    .ARM.exidx : { *(.ARM.exidx*) } > FLASH
    .data : { *(.data*) } > RAM
    .bss : { __bss_start__ = .; *(.bss*) *(COMMON) __bss_end__ = .; } > RAM
    end = .; __end__ = .;
    stack = ORIGIN(RAM) + LENGTH(RAM);
}
"""
START = """
extern char stack[];
void _start(void);

void reset(void)
{
    *(volatile unsigned *)0xe000ed88 |= 0xf00000; /* switch on the floating-point unit */
    _start();
}

__attribute__((section(".vectors"), used)) static const void *const vectors[2] = {stack, (const void *)reset};
"""


@pytest.fixture(scope="module", params=["PCNN", "MCN"])
def digits(request):
    return packed_digits(request.param)


@pytest.mark.parametrize("words", [32, 64])
@pytest.mark.parametrize("target", TARGETS)
def test_processor(digits, target, words):
    compiler, emulator, *flags = TARGETS[target]
    needs(compiler, emulator)
    network, images = digits
    write_program(network, images)
    for level in ("-Os", "-O3"):
        build(compiler, "-static", level, *flags, f"-DPCNN_WORD_BITS={words}")
        assert_agree(network, images, *run_program(emulator, "./run"))
    build(compiler, "-static", "-O2", *flags, "-DPCNN_SELF_TEST", sources=["network.c"], output="self_test")
    assert subprocess.run([emulator, "./self_test"], check=False).returncode == 0


@pytest.mark.parametrize("words", [32, 64])
@pytest.mark.parametrize("stage", ["binary", "ternary"])
@pytest.mark.parametrize("target", TARGETS)
def test_processor_with_odd_numbers_of_channels(target, stage, words):
    """They leave a rest in the loops of vector units."""
    compiler, emulator, *flags = TARGETS[target]
    needs(compiler, emulator)
    network = packed(odd_model(stage), (9, 7))
    images = torch.randint(0, 256, (5, 2, 9, 7), dtype=torch.uint8)
    write_program(network, images)
    build(compiler, "-static", "-O2", *flags, f"-DPCNN_WORD_BITS={words}")
    assert_agree(network, images, *run_program(emulator, "./run"))


def test_microcontroller(digits):
    """A Cortex-M4 with nothing but the files; the emulator's debugger reads the images and prints."""
    needs("arm-none-eabi-gcc", "qemu-system-arm")
    network, images = digits
    write_program(network, images)
    Path("start.c").write_text(START, encoding="utf-8")
    Path("board.ld").write_text(LINKER_SCRIPT, encoding="utf-8")
    processor = ["-mcpu=cortex-m4", "-mthumb", "-mfloat-abi=hard", "-mfpu=fpv4-sp-d16"]
    build("arm-none-eabi-gcc", "-Os", *processor, "-c", sources=["network.c"], output="network.o")
    subprocess.run(["arm-none-eabi-gcc", *processor, "-Os", "-c", "start.c"], check=True)
    linked = [*processor, "--specs=rdimon.specs", "-T", "board.ld"]
    build("arm-none-eabi-gcc", "-Os", *linked, sources=["start.o", "run.c", "network.o"])
    board = ["qemu-system-arm", "-M", "mps2-an386", "-nographic", "-monitor", "none", "-serial", "none"]
    command = [*board, "-semihosting-config", "enable=on,target=native", "-kernel"]
    assert_agree(network, images, *run_program(*command, "run"))
    build("arm-none-eabi-gcc", "-O2", "-DPCNN_SELF_TEST", *linked, sources=["start.o", "network.c"], output="self_test")
    done = subprocess.run([*command, "self_test"], capture_output=True, text=True, check=False, timeout=60)
    assert "4 of 4 labels agree" in done.stdout
    assert done.returncode == 0
    print(subprocess.check_output(["arm-none-eabi-size", "network.o"], text=True))


@pytest.mark.parametrize("flags", [["-O3"], ["-O3", "-march=native"], ["-Os", "-ffp-contract=fast"]], ids=" ".join)
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_compiler(digits, compiler, flags):
    needs(compiler)
    network, images = digits
    write_program(network, images)
    build(compiler, *flags)
    assert_agree(network, images, *run_program("./run"))


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("name", KINDS)
def test_no_warnings(name, compiler):
    needs(compiler)
    network = packed(trained_model(name), IMAGE_SHAPE[1:])
    save_c(network, "network.c", network.description)
    warnings = ["-Wconversion", "-Wno-sign-conversion", "-Wshadow"] if compiler == "gcc" else ["-Wshadow"]
    for words in ("-DPCNN_WORD_BITS=32", "-DPCNN_WORD_BITS=64"):
        for macros in ([], ["-DPCNN_SELF_TEST"]):
            command = [compiler, *STRICT, *warnings, "-O2", words, *macros, "-c", "network.c"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr


def needs_sanitizers(compiler):
    needs(compiler)
    Path("empty.c").write_text("int main(void) { return 0; }", encoding="utf-8")
    if subprocess.run([compiler, *SANITIZERS, "empty.c"], capture_output=True, check=False).returncode != 0:
        pytest.skip(f"{compiler} has no library of sanitizers here")


@pytest.mark.parametrize("words", [32, 64])
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("name", KINDS)
def test_sanitizers(name, compiler, words):
    needs_sanitizers(compiler)
    network = packed(trained_model(name), (9, 7))
    images = torch.randint(0, 256, (3, 3, 9, 7), dtype=torch.uint8)
    write_program(network, images)
    build(compiler, *SANITIZERS, f"-DPCNN_WORD_BITS={words}")
    labels, _ = run_program("./run")
    assert labels.tolist() == network.classify(images).tolist()


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_sanitizers_on_every_test_image_of_digits(digits, compiler):
    needs_sanitizers(compiler)
    network, images = digits
    write_program(network, images)
    build(compiler, *SANITIZERS)
    assert_agree(network, images, *run_program("./run"))
