#define DECODED 8 /* number of input channels whose weights are decoded at a time */

typedef struct {
    Shape shape;
    int groups;
    int planes;              /* number of output channels made from each map, one for each M-Filter */
    const float *weights;    /* (groups, kernel, kernel, in_channels / groups, maps / groups), or NULL */
    const uint8_t *codes;    /* else codes of the weights, in the same order; each row of maps starts with a new byte */
    int bits;                /* of a code, the first one in the lowest bits */
    const float *values;     /* what codes stand for */
    const float *modulation; /* of each pixel of the window and each plane, (kernel, kernel, planes); or NULL */
    Finish finish;
} Convolution;

static void decode(const uint8_t *codes, int rows, int maps, int bits, const float *values, float *weights)
{
    for (int row = 0; row < rows; row++) {
        for (int map = 0; map < maps; map++) {
            const int place = map * bits;
            *weights++ = values[codes[place / 8] >> place % 8 & ((1 << bits) - 1)];
        }
        codes += (maps * bits + 7) / 8;
    }
}

/* sums += in * weights (count, maps) */
static void add_products(const float *in, int count, const float *restrict weights, int maps, float *restrict sums)
{
    int index = 0;

    for (; index + 4 <= count; index += 4, weights += 4 * maps) {
        const float a = in[index], b = in[index + 1], c = in[index + 2], d = in[index + 3];
        for (int map = 0; map < maps; map++) {
            sums[map] += a * weights[map] + b * weights[maps + map] + c * weights[2 * maps + map] +
                         d * weights[3 * maps + map];
        }
    }
    for (; index < count; index++, weights += maps) {
        const float a = in[index];
        for (int map = 0; map < maps; map++) {
            sums[map] += a * weights[map];
        }
    }
}

/* Add the products of one pixel of the windows, `tap`, for a row of windows, whose pixels lie `step` apart. */
static void add_tap(const Convolution *layer, int group, int tap, const float *in, int pixels, float *sums,
                    float *decoded)
{
    const int taps = layer->shape.kernel * layer->shape.kernel;
    const int channels = layer->shape.in_channels / layer->groups;
    const int all_maps = layer->shape.out_channels / layer->planes, maps = all_maps / layer->groups;
    const int row = (group * taps + tap) * channels; /* index of the first row of weights */
    const int row_bytes = (maps * layer->bits + 7) / 8;

    in += group * channels;
    sums += group * maps;
    for (int first = 0; first < channels; first += DECODED) {
        const int count = at_most(channels - first, DECODED);
        const float *weights = decoded;
        if (decoded == NULL) {
            weights = layer->weights + (row + first) * maps;
        } else {
            decode(layer->codes + (row + first) * row_bytes, count, maps, layer->bits, layer->values, decoded);
        }
        for (int pixel = 0; pixel < pixels; pixel++) {
            add_products(in + pixel * layer->shape.stride * layer->shape.in_channels + first, count, weights, maps,
                         sums + pixel * all_maps);
        }
    }
}

/* totals[map * planes + plane] += sums[map] * modulation[plane] */
static void modulate(const float *sums, int maps, const float *modulation, int planes, float *totals)
{
    for (int map = 0; map < maps; map++) {
        for (int plane = 0; plane < planes; plane++) {
            *totals++ += sums[map] * modulation[plane];
        }
    }
}

/*
 * Convolve numbers, row by row. Windows end at the border, since padding adds nothing. `totals` (out_width,
 * out_channels), `sums` (out_width, maps) and `decoded` (DECODED, maps) are scratch; `sums` is NULL unless kernels are
 * modulated, and `decoded` unless weights are codes. `out` may be `shortcut`.
 */
static void convolve(const Convolution *layer, const float *in, const float *shortcut, float *out, float *totals,
                     float *sums, float *decoded)
{
    const Shape shape = layer->shape;
    const int channels = shape.out_channels, maps = channels / layer->planes, stride = shape.stride;

    for (int y = 0; y < shape.out_height; y++) {
        memset(totals, 0, (size_t)(shape.out_width * channels) * sizeof *totals);
        for (int tap = 0; tap < shape.kernel * shape.kernel; tap++) {
            const int top = y * stride - shape.padding + tap / shape.kernel;
            const int left = tap % shape.kernel - shape.padding;
            const int first = (at_least(-left, 0) + stride - 1) / stride; /* pixel of the output */
            const int end = at_most((at_least(shape.in_width - left, 0) + stride - 1) / stride, shape.out_width);
            if (top < 0 || top >= shape.in_height || first >= end) {
                continue;
            }
            if (sums != NULL) {
                memset(sums, 0, (size_t)((end - first) * maps) * sizeof *sums);
            }
            for (int group = 0; group < layer->groups; group++) {
                add_tap(layer, group, tap, in + (top * shape.in_width + first * stride + left) * shape.in_channels,
                        end - first, sums ? sums : totals + first * channels, decoded);
            }
            for (int x = first; sums != NULL && x < end; x++) {
                modulate(sums + (x - first) * maps, maps, layer->modulation + tap * layer->planes, layer->planes,
                         totals + x * channels);
            }
        }
        for (int x = 0; x < shape.out_width; x++) {
            finish_pixel(&layer->finish, channels, totals + x * channels, shortcut, out);
            shortcut = shortcut ? shortcut + channels : NULL;
            out += channels;
        }
    }
}
