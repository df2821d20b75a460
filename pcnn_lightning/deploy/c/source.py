"""Writes a network as C."""

import os
import re
import textwrap
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from pcnn_lightning.deploy.c.memory import Arena, arrange
from pcnn_lightning.deploy.c.steps import Step, Value, steps_of
from pcnn_lightning.deploy.c.weights import Array, Field, Words
from pcnn_lightning.deploy.description import Description
from pcnn_lightning.deploy.packed import PackedNetwork
from pcnn_lightning.errors import InputError
from pcnn_lightning.files import write_whole
from pcnn_lightning.version import __version__

_PARTS = {
    "load_image": ("load_image",),
    "take_signs": ("take_signs",),
    "pack_signs": ("words", "pack_signs"),
    "convolve_signs": ("shape", "words", "finish_pixel", "convolve_signs"),
    "convolve": ("shape", "finish_pixel", "convolve"),
    "finish_image": ("finish_pixel", "finish_image"),
    "pool_max": ("shape", "window", "pool_max"),
    "pool_average": ("shape", "window", "pool_average"),
    "transpose": ("transpose",),
}
"""The files of ``kernels`` that each function needs."""
_ORDER = (
    *("shape", "words", "load_image", "take_signs", "pack_signs", "finish_pixel", "finish_image"),
    *("convolve_signs", "convolve", "window", "pool_max", "pool_average", "transpose"),
)
_CANDIDATES, _TEST_IMAGES = 16, 4
_WIDTH = 120


class Source(NamedTuple):
    """A network in C.

    Attributes:
        name: what all names of the header begin with.
        header: text of ``name.h``.
        code: text of ``name.c``.
        arena_bytes: size of the arena.
    """

    name: str
    header: str
    code: str
    arena_bytes: int


def save_c(network: nn.Module, path: str | os.PathLike[str], description: Description) -> None:
    """Write a network as C99, ``NAME.c`` and ``NAME.h``, each of them atomically.

    The files need no other than these and ``stdint.h``, ``stddef.h`` and ``string.h`` (``arm_neon.h`` on ARM processors
    with NEON), and no memory but an arena that the caller provides. ``NAME_classify`` takes an image (C, H, W) uint8 of
    the size that the network was trained for, normalizes it, and returns its label and the logits. The head of the file
    says how to call it, and how much memory it takes. Compiled with ``-DPCNN_SELF_TEST``, the file is a program that
    compares its logits of four generated images with those of PyTorch.

    Args:
        network: a network that ``description`` describes, trained or frozen.
        path: the ``.c`` file to write; the ``.h`` file is written beside it. The names in them begin with its stem, in
            which other characters than letters, digits and underscores become underscores.
        description: description of the network.

    Raises:
        InputError: if the path does not end in ``.c``, names cannot begin with its stem, the description is of another
            network, a value is not finite, a layer cannot be translated, or a file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".c":
        raise InputError(f"a network in C is written as NAME.c and NAME.h, but the path is {path}")
    source = to_c(PackedNetwork.of(network, description), path.stem)
    write_whole(path.with_suffix(".h"), source.header.encode())
    write_whole(path, source.code.encode())


def to_c(network: PackedNetwork, stem: str) -> Source:
    """Translate a network to C.

    Args:
        network: the network.
        stem: stem of the files' names.

    Raises:
        InputError: if names in C cannot begin with the stem, or a layer cannot be translated.
    """
    name = re.sub(r"[-. ]", "_", stem)
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
        raise InputError(f"names in C cannot begin with {stem!r}: call the file after letters, digits and underscores")
    steps = steps_of(network)
    arena = arrange(steps)
    constants = _Constants()
    layers = [constants.layer(step) for step in steps]
    description = network.description
    parts = {part for step in steps for part in _PARTS[step.function]}
    kernels = [
        resources.files(__package__).joinpath("kernels", f"{part}.c").read_text("utf-8")
        for part in _ORDER
        if part in parts
    ]
    head = _head(description, stem, name, constants, arena)
    code = [
        f'{head}#include <stddef.h>\n#include <stdint.h>\n#include <string.h>\n\n#include "{stem}.h"\n',
        *kernels,
        *constants.texts,
        *_class_names(description, name),
        _classify(steps, layers, arena, name, constants),
        _self_test(network, name),
    ]
    return Source(name, _header(description, stem, name, arena), "\n".join(code), arena.size)


class _Constants:
    """The constants of a network: their text and their sizes in bytes, for words of 32 and of 64 bits."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.narrow = self.wide = 0
        self.names = {"image", "logits", "arena", "label", "values", "bits"}  # of NAME_classify

    def layer(self, step: Step) -> str:
        """Define a layer and what it points to; return its name."""
        path = self.unused(step.name, "_layer")
        fields = self.fields(path, step.fields, "    ")
        self.texts.append(f"static const {step.struct} {path} = {{\n{fields}}};\n")
        return path

    def fields(self, path: str, fields: dict[str, Field], indent: str) -> str:
        """The initializers of fields; null pointers need none."""
        lines = ""
        for name, value in fields.items():
            if isinstance(value, dict):
                inner = self.fields(path, value, indent + "    ")
                lines += f"{indent}.{name} = {{\n{inner}{indent}}},\n" if inner else ""
            elif isinstance(value, np.ndarray | Words):
                lines += f"{indent}.{name} = {self.array(f'{path}_{name}', value)},\n"
            elif value is not None:
                lines += f"{indent}.{name} = {value},\n"
        return lines

    def array(self, name: str, values: Array | Words) -> str:
        """Define an array; return its name."""
        name = self.unused(name, "_of_layer")
        if isinstance(values, Words):
            narrow, wide = values.narrow, values.wide
            kind, body = "Word", f"#if PCNN_WORD_BITS == 64\n{_rows(wide)}#else\n{_rows(narrow)}#endif\n"
        else:
            narrow = wide = values
            kind, body = ("float" if values.dtype == np.float32 else "uint8_t"), _rows(values)
        self.narrow += narrow.nbytes
        self.wide += wide.nbytes
        self.texts.append(f"static const {kind} {name}[] = {{\n{body}}};\n")
        return name

    def unused(self, path: str, ending: str) -> str:
        """A name in C for a path of modules, with an ending if another has it."""
        name = re.sub(r"\W", "_", path, flags=re.ASCII)
        while name in self.names:
            name += ending
        self.names.add(name)
        return name


def _rows(values: Array) -> str:
    """Initializers of an array in row-major order."""
    flat = values.flatten()
    if flat.dtype == np.float32:
        largest = np.finfo(np.float32).max  # in place of infinity, which has no constant without math.h
        texts = [f"{number!s}f" for number in flat.clip(-largest, largest)]
        count = 6
    else:
        digits = 2 * flat.itemsize
        texts = [f"0x{number:0{digits}x}" for number in flat.tolist()]
        count = (_WIDTH - 4) // (digits + 4)
    lines = (", ".join(texts[start : start + count]) for start in range(0, len(texts), count))
    return "".join(f"    {line},\n" for line in lines)


def _summary(description: Description) -> str:
    channels, (height, width) = description.in_channels, description.image_size
    summary = (
        f"{description.family} ({description.stage}) with backbone {description.backbone}: {description.num_classes} "
        f"classes, images of {channels} x {height} x {width}"
    )
    return re.sub(r"[^ -~]|[*/]", "_", summary)  # registered names could end the comment that it is in


def _head(description: Description, stem: str, name: str, constants: _Constants, arena: Arena) -> str:
    flash = f"{constants.narrow:,} bytes of constants"
    if constants.wide != constants.narrow:
        flash += f" ({constants.wide:,} with words of 64 bits)"
    return f"""/*
 * {_summary(description)}.
 * Written by pcnn_lightning {__version__}.
 *
 *     static {name}_arena arena;
 *     float logits[{name.upper()}_CLASSES];
 *     int label = {name}_classify(image, logits, &arena);
 *
 * Flash: {flash}, and the code.
 * RAM:   {arena.size:,} bytes of arena, and less than a kilobyte of stack.
 *
 *     cc -std=c99 -O3 -march=native -c {stem}.c
 *     cc -std=c99 -O3 -march=native -DPCNN_SELF_TEST {stem}.c -o self_test && ./self_test
 *
 * -DPCNN_WORD_BITS=32 or 64 sets the size of the words that hold signs; the default depends on the processor.
 */
"""


def _header(description: Description, stem: str, name: str, arena: Arena) -> str:
    upper = name.upper()
    height, width = description.image_size
    words = f"""    union {{
        uint32_t narrow[{arena.words}];
        uint64_t wide[{arena.words}];
    }} bits; /* words of either size */
"""
    names = f"""
/* Name of each class. */
extern const char *const {name}_class_names[{upper}_CLASSES];
"""
    return f"""/* {_summary(description)}. */
#ifndef {upper}_H
#define {upper}_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {{
#endif

#define {upper}_CHANNELS {description.in_channels}
#define {upper}_HEIGHT {height}
#define {upper}_WIDTH {width}
#define {upper}_IMAGE_BYTES ({upper}_CHANNELS * {upper}_HEIGHT * {upper}_WIDTH)
#define {upper}_CLASSES {description.num_classes}
#define {upper}_ARENA_BYTES sizeof({name}_arena) /* {arena.size:,} */

/* Memory for one call at a time. It need not be cleared. */
typedef struct {{
    float values[{max(arena.floats, 1)}];
{words if arena.words else ""}}} {name}_arena;
{names if description.class_names else ""}
/*
 * Classify an image.
 *
 * image: {upper}_IMAGE_BYTES raw pixels in the order (channel, row, column): all of the first channel, row by row,
 *        then those of the next channel.
 * logits: {upper}_CLASSES numbers, which are written.
 * arena: memory; calls at the same time need one each.
 *
 * Returns the label, from 0 to {upper}_CLASSES - 1: the index of the largest logit.
 */
int {name}_classify(const uint8_t *image, float *logits, {name}_arena *arena);

#ifdef __cplusplus
}}
#endif

#endif
"""


def _class_names(description: Description, name: str) -> Iterator[str]:
    if description.class_names is not None:
        lines = "".join(f"    {_string(label)},\n" for label in description.class_names)
        yield f"const char *const {name}_class_names[{name.upper()}_CLASSES] = {{\n{lines}}};\n"


def _string(text: str) -> str:
    """A string literal in UTF-8; three octal digits cannot be confused with what follows them."""
    literal = "".join(
        chr(byte) if 32 <= byte < 127 and chr(byte) not in '"\\?' else f"\\{byte:03o}" for byte in text.encode()
    )
    return f'"{literal}"'


def _classify(steps: list[Step], layers: list[str], arena: Arena, name: str, constants: _Constants) -> str:
    logits = steps[-1].output
    names = {logits: "logits"}
    declarations, calls = "", ""

    def pointer(value: Value | None) -> str:
        nonlocal declarations
        if value is None:
            return "NULL"
        if value not in names and value.shape == (0, 0, 0):  # scratch
            return f"{'bits' if value.in_words else 'values'} + {arena.places[value]}"
        if value not in names:
            names[value] = constants.unused(value.name, "_bits" if value.in_words else "_output")
            kind, memory = ("Word", "bits") if value.in_words else ("float", "values")
            channels, height, width = value.shape
            declarations += f"    {kind} *const {names[value]} = {memory} + {arena.places[value]};"
            declarations += f" /* {height} x {width} x {channels} */\n"
        return names[value]

    for step, layer in zip(steps, layers, strict=True):
        inputs = [pointer(value) for value in step.inputs] or ["image"]
        arguments = [f"&{layer}", *inputs, pointer(step.output), *map(pointer, step.scratch)]
        start = f"    {step.function}("
        lines = textwrap.wrap(", ".join(arguments), _WIDTH - len(start) - 2, break_long_words=False)
        calls += start + f"\n{' ' * len(start)}".join(lines) + ");\n"
    bits = "    Word *const bits = arena->bits.WORDS;\n" if arena.words else ""
    return f"""int {name}_classify(const uint8_t *image, float *logits, {name}_arena *arena)
{{
    float *const values = arena->values;
{bits}
    /* Images in the arena, (height, width, channels). Those that are not needed at the same time share memory. */
{declarations}
{calls}
    int label = 0;
    for (int other = 1; other < {name.upper()}_CLASSES; other++) {{
        label = logits[other] > logits[label] ? other : label;
    }}
    return label;
}}
"""


def _self_test(network: PackedNetwork, name: str) -> str:
    """A program that compares the logits of a few images with those of torch."""
    description = network.description
    seeds = list(range(_CANDIDATES))
    with torch.no_grad():
        logits = network(network.preprocess(torch.from_numpy(np.stack([_noise(seed, description) for seed in seeds]))))
    # Those whose labels are the clearest: other orders of additions change logits a little.
    clearest = logits.topk(min(2, logits.shape[1])).values.diff().sum(dim=1).argsort()[:_TEST_IMAGES]
    upper = name.upper()
    rows = "".join(f"    {{\n{textwrap.indent(_rows(logits[seed].numpy()), '    ')}    }},\n" for seed in clearest)
    return f"""#ifdef PCNN_SELF_TEST
#include <stdio.h>

#define IMAGES {_TEST_IMAGES}

static const uint32_t seeds[IMAGES] = {{{", ".join(str(int(seed)) for seed in clearest)}}};

/* Logits in PyTorch. */
static const float expected[IMAGES][{upper}_CLASSES] = {{
{rows}}};

/* Draw noise in squares of 1, 2, 4 or 8 pixels. */
static void draw(uint32_t seed, uint8_t *image)
{{
    for (uint32_t channel = 0; channel < {upper}_CHANNELS; channel++) {{
        for (uint32_t y = 0; y < {upper}_HEIGHT; y++) {{
            for (uint32_t x = 0; x < {upper}_WIDTH; x++) {{
                uint32_t bits = seed + 3 * channel + 1031 * (y >> seed % 4) + 65537 * (x >> seed % 4);
                bits = (bits ^ bits >> 16) * 0x7feb352d;
                bits = (bits ^ bits >> 15) * 0x846ca68b;
                *image++ = (uint8_t)(bits >> 24);
            }}
        }}
    }}
}}

int main(void)
{{
    static {name}_arena arena;
    static uint8_t image[{upper}_IMAGE_BYTES];
    static float logits[{upper}_CLASSES];
    float largest = 0;
    int agree = 0;

    for (int index = 0; index < IMAGES; index++) {{
        int label = 0;
        draw(seeds[index], image);
        const int found = {name}_classify(image, logits, &arena);
        for (int other = 0; other < {upper}_CLASSES; other++) {{
            const float difference = logits[other] - expected[index][other];
            const float size = difference < 0 ? -difference : difference;
            largest = size > largest ? size : largest;
            label = expected[index][other] > expected[index][label] ? other : label;
        }}
        agree += found == label;
    }}
    printf("%d of %d labels agree; the largest difference of logits is %g\\n", agree, IMAGES, (double)largest);
    return agree == IMAGES ? 0 : 1;
}}
#endif
"""


def _noise(seed: int, description: Description) -> Array:
    """The image that the self-test draws."""
    sizes = (description.in_channels, *description.image_size)
    channel, y, x = np.indices(sizes, dtype=np.uint32)
    bits = np.uint32(seed) + 3 * channel + 1031 * (y >> (seed % 4)) + 65537 * (x >> (seed % 4))
    bits = (bits ^ bits >> 16) * np.uint32(0x7FEB352D)
    bits = (bits ^ bits >> 15) * np.uint32(0x846CA68B)
    image: Array = (bits >> 24).astype(np.uint8)
    return image
