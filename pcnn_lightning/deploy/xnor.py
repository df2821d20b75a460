"""Blocks of binary convolutions on bits, compiled by numba, which infers types from the arguments.

A sign is a bit, 1 for +1, and the bits of 64 channels form a word. Signs with different bits have the product -1, so
the sum of C products is ``C - 2 * popcount(x ^ weight)``. Two things are prepared in ``binary_blocks.py``:

- The sign of a batch norm is a comparison of its input with a threshold. Where the norm is decreasing, its bit is
  inverted, and so are the bits of the weights that it meets.
- Padding is 0, which is neither sign. Its words are 0, and the contribution of their popcounts is canceled.

The innermost loop runs over output channels, whose words are adjacent, and compares each of them with two windows of
3×3 words in registers. Images enter and leave in torch's layout, (B, C, H, W). In between, the few images that are
being processed are in channels-last layout, and all blocks are run on them before the next images, so that they stay in
the cache.
"""

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

WORD = 64
TILE = 16  # floats in the widest register


@intrinsic
def _popcount(typing_context, word):
    """Number of ones in a word; the compiler emits vector instructions where available."""

    def generate(context, builder, signature, arguments):
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


@intrinsic
def _fused(typing_context, x, scale, shift):
    """``x * scale + shift``, rounded once."""

    def generate(context, builder, signature, arguments):
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


@intrinsic
def _compare_word(typing_context, values, thresholds, start):
    """Word of the bits ``values[start + i] >= thresholds[start + i]``; the compiler would shift them one by one."""

    def generate(context, builder, signature, arguments):
        floats = ir.VectorType(ir.FloatType(), WORD)
        vectors = []
        for kind, array in zip(signature.args[:2], arguments[:2], strict=True):
            data = context.make_array(kind)(context, builder, value=array).data
            address = builder.bitcast(builder.gep(data, [arguments[2]]), floats.as_pointer())
            vectors.append(builder.load(address, align=4))
        return builder.bitcast(builder.fcmp_ordered(">=", *vectors), ir.IntType(WORD))

    return types.uint64(values, thresholds, types.intp), generate


@intrinsic
def _transpose_tile(typing_context, source, row, column, target):
    """``target[column : column + 16, row : row + 16] = source[row : row + 16, column : column + 16].T``.

    The compiler would move one number at a time. Here, the upper and the lower half of the rows are interleaved, like a
    riffle shuffle, four times.
    """

    def generate(context, builder, signature, arguments):
        floats = ir.VectorType(ir.FloatType(), TILE)

        def addresses(kind, array, row, column):
            view = context.make_array(kind)(context, builder, value=array)
            width = cgutils.unpack_tuple(builder, view.shape)[1]
            rows = [builder.add(row, row.type(index)) for index in range(TILE)]
            places = [builder.add(builder.mul(each, width), column) for each in rows]
            return [builder.bitcast(builder.gep(view.data, [place]), floats.as_pointer()) for place in places]

        def shuffle(upper, lower, start):
            order = [place for pair in range(start, start + TILE // 2) for place in (pair, TILE + pair)]
            return builder.shuffle_vector(upper, lower, ir.Constant(ir.VectorType(ir.IntType(32), TILE), order))

        source, row, column, target = arguments
        rows = [builder.load(address, align=4) for address in addresses(signature.args[0], source, row, column)]
        for _ in range(4):
            pairs = list(zip(rows[: TILE // 2], rows[TILE // 2 :], strict=True))
            rows = [shuffle(*pair, start) for pair in pairs for start in (0, TILE // 2)]
        for values, address in zip(rows, addresses(signature.args[3], target, column, row), strict=True):
            builder.store(values, address, align=4)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, target), generate


@njit(inline="always")
def _window(bits, row, column, word):
    """The 3×3 words of ``bits`` (H, W, words) whose top left corner is at (row, column)."""
    return (
        bits[row, column, word],
        bits[row, column + 1, word],
        bits[row, column + 2, word],
        bits[row + 1, column, word],
        bits[row + 1, column + 1, word],
        bits[row + 1, column + 2, word],
        bits[row + 2, column, word],
        bits[row + 2, column + 1, word],
        bits[row + 2, column + 2, word],
    )


@njit(inline="always")
def _differences(window, weight, channel):
    """Number of bits in which the window differs from an output channel of ``weight`` (9, O)."""
    return np.int32(
        _popcount(window[0] ^ weight[0, channel])
        + _popcount(window[1] ^ weight[1, channel])
        + _popcount(window[2] ^ weight[2, channel])
        + _popcount(window[3] ^ weight[3, channel])
        + _popcount(window[4] ^ weight[4, channel])
        + _popcount(window[5] ^ weight[5, channel])
        + _popcount(window[6] ^ weight[6, channel])
        + _popcount(window[7] ^ weight[7, channel])
        + _popcount(window[8] ^ weight[8, channel])
    )


@njit
def _convolve_row(bits, row, stride, weights, base, columns, scale, slope, stream):
    """Convolve a row of pixels, scale the result, add the shortcut and apply the PReLU.

    Args:
        bits: bits of the padded input, (H, W, words).
        row: first of the three input rows that the output depends on.
        stride: stride of the convolution.
        weights: (words, 9, O).
        base: (kinds of columns, O), to which ``-2 * popcount`` is added.
        columns: (W',), kind of each pixel.
        scale: scale of each output channel, (O,).
        slope: slope of the PReLU, (O,).
        stream: (W', channels), the shortcut, which is replaced by the output.
    """
    words, _, channels = weights.shape
    width = len(columns)
    sums = np.empty((2, channels), np.int32)
    left, right = sums[0], sums[1]
    for column in range(0, width, 2):
        for word in range(words):
            weight = weights[word]
            one = _window(bits, row, column * stride, word)
            other = _window(bits, row, (column + 1) * stride, word)
            if word == 0:
                for channel in range(channels):
                    left[channel] = _differences(one, weight, channel)
                    right[channel] = _differences(other, weight, channel)
            else:
                for channel in range(channels):
                    left[channel] += _differences(one, weight, channel)
                    right[channel] += _differences(other, weight, channel)
        for pixel in range(column, min(column + 2, width)):
            counts, start, values = sums[pixel - column], base[columns[pixel]], stream[pixel]
            for channel in range(channels):
                count = np.float32(counts[channel])
                # Exact up to the product; then the product, the sum and the slope are rounded, as in torch.
                value = (start[channel] - (count + count)) * scale[channel] + values[channel]
                values[channel] = value if value > 0 else value * slope[channel]


@njit
def _pack_row(stream, thresholds, bits):
    """Compare a row of pixels (W, words * 64) with thresholds (words * 64,), and write its ``bits`` (W, words)."""
    for pixel in range(len(stream)):
        values = stream[pixel]
        for word in range(bits.shape[1]):
            bits[pixel, word] = _compare_word(values, thresholds, word * WORD)


@njit
def _load(maps, tile, stream):
    """Transpose a tile of channels of ``maps`` (C, pixels) into ``stream`` (pixels, channels)."""
    channels, pixels = maps.shape
    first, end = tile * TILE, min(tile * TILE + TILE, channels)
    for start in range(0, pixels, TILE):
        if end - first == TILE and start + TILE <= pixels:
            _transpose_tile(maps, first, start, stream)
        else:
            for channel in range(first, end):
                for pixel in range(start, min(start + TILE, pixels)):
                    stream[pixel, channel] = maps[channel, pixel]


@njit
def _store(stream, tile, maps):
    """Transpose a tile of channels back."""
    channels, pixels = maps.shape
    first, end = tile * TILE, min(tile * TILE + TILE, channels)
    for start in range(0, pixels, TILE):
        if end - first == TILE and start + TILE <= pixels:
            _transpose_tile(stream, start, first, maps)
        else:
            for channel in range(first, end):
                for pixel in range(start, min(start + TILE, pixels)):
                    maps[channel, pixel] = stream[pixel, channel]


@njit
def _pool(pixels, scale, shift, fused, size, output):
    """Average ``x * scale + shift`` over squares of one channel (H, W), adding in the same order as torch."""
    height, width = pixels.shape
    for row in range(len(output)):
        sums, end = output[row], min(row * size + size, height)
        sums[:] = 0
        for y in range(row * size, end):
            for x in range(size):
                for column in range((width - x + size - 1) // size):
                    value = pixels[y, column * size + x]
                    sums[column] += _fused(value, scale, shift) if fused else value * scale + shift
        for column in range(len(sums)):
            count = (end - row * size) * (min(column * size + size, width) - column * size)
            sums[column] /= np.float32(count)


@njit(parallel=True, nogil=True, cache=True)
def run_blocks(
    images,
    shortcuts,
    norm,
    pool,
    fused,
    output,
    at_once,
    stride,
    padding,
    thresholds,
    weights,
    base,
    rows,
    columns,
    scales,
    slopes,
):
    """Run images through N blocks: comparison with thresholds → 3×3 convolution → add shortcut → PReLU.

    Args:
        images: (B, C, H, W) float32.
        shortcuts: (B, O, H", W") float32, normalized, averaged and added in the first block; if it is ``images``
            itself, it is added unchanged; if B is 0, nothing is added. Later blocks add their input.
        norm: scale and shift of the shortcuts, (2, O) float32.
        pool: side of the squares over which shortcuts are averaged, which are cropped at the border.
        fused: whether scaling and shifting are rounded as one operation.
        output: (B, O, H', W') float32, written in place.
        at_once: number of images that are processed at a time.
        stride: stride of the first convolution; 1 if N > 1.
        padding: padding of the first convolution; 1 if N > 1.
        thresholds: (N, words * 64) float32, with which inputs are compared; infinite for padding channels.
        weights: (N, words, 9, O) uint64.
        base: (N, kinds of rows, kinds of columns, O) float32, to which ``-2 * popcount`` is added.
        rows: (H',), kind of each output row.
        columns: (W',), kind of each output column.
        scales: (N, O) float32, scales of the convolutions.
        slopes: (N, O) float32, slopes of the PReLUs.
    """
    blocks, words, _, channels = weights.shape
    total, in_channels, height, width = images.shape
    out_height, out_width = output.shape[2:]
    area, out_area, identity = height * width, out_height * out_width, images is shortcuts
    # Windows are processed in pairs, the last of which reaches beyond a row of odd length.
    padded_width = max(width + 2 * padding, (out_width + out_width % 2 - 1) * stride + 3)
    bits = np.zeros((2, at_once, height + 2 * padding, padded_width, words), np.uint64)
    stream = np.zeros((at_once, out_height, out_width, -(-channels // WORD) * WORD), np.float32)
    entering = stream if identity else np.zeros((at_once, height, width, words * WORD), np.float32)
    averages = np.empty((at_once, channels, out_height, out_width), np.float32)
    # The same arrays with rows and columns flattened.
    flat_images, flat_output = images.reshape(total, in_channels, area), output.reshape(total, channels, out_area)
    flat_entering, flat_stream = entering.reshape(at_once, area, -1), stream.reshape(at_once, out_area, -1)
    flat_averages = averages.reshape(at_once, channels, out_area)
    in_tiles, out_tiles = -(-in_channels // TILE), -(-channels // TILE)
    for first in range(0, total, at_once):
        count = min(at_once, total - first)
        for item in prange(count * in_tiles):
            index, tile = item // in_tiles, item % in_tiles
            _load(flat_images[first + index], tile, flat_entering[index])
        for item in prange(count * height):
            index, row = item // height, item % height
            _pack_row(entering[index, row], thresholds[0], bits[0, index, row + padding, padding : padding + width])
        if len(shortcuts) == 0:
            stream[:] = 0
        elif not identity:
            for item in prange(count * out_tiles):
                index, tile = item // out_tiles, item % out_tiles
                for channel in range(tile * TILE, min(tile * TILE + TILE, channels)):
                    scale, shift = norm[0, channel], norm[1, channel]
                    _pool(shortcuts[first + index, channel], scale, shift, fused, pool, averages[index, channel])
                _load(flat_averages[index], tile, flat_stream[index])
        for block in range(blocks):
            source, target = bits[block % 2], bits[1 - block % 2]
            for item in prange(count * out_height):
                index, row = item // out_height, item % out_height
                weight, start, scale, slope = weights[block], base[block, rows[row]], scales[block], slopes[block]
                values = stream[index, row]
                _convolve_row(source[index], row * stride, stride, weight, start, columns, scale, slope, values)
                if block + 1 < blocks:
                    _pack_row(values, thresholds[block + 1], target[index, row + 1, 1 : 1 + out_width])
        for item in prange(count * out_tiles):
            index, tile = item // out_tiles, item % out_tiles
            _store(flat_stream[index], tile, flat_output[first + index])
