#if defined(__POPCNT__) || defined(__AVX512VPOPCNTDQ__) || defined(__riscv_zbb) || defined(__wasm__)
#if PCNN_WORD_BITS == 64
#define ONES(word) ((Word)__builtin_popcountll(word))
#else
#define ONES(word) ((Word)__builtin_popcount(word))
#endif
#define ONES_OF_3(a, b, c) (ONES(a) + ONES(b) + ONES(c))
#else
/* Elsewhere the compiler would call a function for each word. Here, each byte of a word counts its own ones. */
#define EACH_BYTE(value) ((Word)-1 / 255 * (value))
#define ONES(word) sum_of_bytes(ones_by_byte(word))
#define ONES_OF_3(a, b, c) sum_of_bytes(ones_by_byte(a) + ones_by_byte(b) + ones_by_byte(c))

static inline Word ones_by_byte(Word word)
{
    word -= word >> 1 & EACH_BYTE(0x55);
    word = (word & EACH_BYTE(0x33)) + (word >> 2 & EACH_BYTE(0x33));
    return (word + (word >> 4)) & EACH_BYTE(0x0f);
}

static inline Word sum_of_bytes(Word word)
{
    return word * EACH_BYTE(1) >> (PCNN_WORD_BITS - 8);
}
#endif

#if defined(__ARM_NEON) && PCNN_WORD_BITS == 32
#include <arm_neon.h>
#define HAS_NEON 1

static inline uint8x16_t ones_in_4(uint32_t word, const uint32_t *weights)
{
    return vcntq_u8(vreinterpretq_u8_u32(veorq_u32(vdupq_n_u32(word), vld1q_u32(weights))));
}

static inline void add_sums_of_bytes(uint8x16_t ones, uint32_t *counts)
{
    vst1q_u32(counts, vpadalq_u16(vld1q_u32(counts), vpaddlq_u8(ones)));
}
#else
#define HAS_NEON 0
#endif

/* Add to each channel's count the number of bits in which `words` differ from its weights, (count, channels). */
static void count_differences(const Word *words, int count, const Word *restrict weights, int channels,
                              Word *restrict counts)
{
    int index = 0;

    for (; index + 3 <= count; index += 3, weights += 3 * channels) {
        const Word a = words[index], b = words[index + 1], c = words[index + 2];
        const Word *restrict of_b = weights + channels, *restrict of_c = weights + 2 * channels;
        int channel = 0;
#if HAS_NEON
        for (; channel + 4 <= channels; channel += 4) {
            const uint8x16_t a_and_b = vaddq_u8(ones_in_4(a, weights + channel), ones_in_4(b, of_b + channel));
            add_sums_of_bytes(vaddq_u8(a_and_b, ones_in_4(c, of_c + channel)), counts + channel);
        }
#endif
        for (; channel < channels; channel++) {
            counts[channel] += ONES_OF_3(a ^ weights[channel], b ^ of_b[channel], c ^ of_c[channel]);
        }
    }
    for (; index < count; index++, weights += channels) {
        const Word word = words[index];
        int channel = 0;
#if HAS_NEON
        for (; channel + 4 <= channels; channel += 4) {
            add_sums_of_bytes(ones_in_4(word, weights + channel), counts + channel);
        }
#endif
        for (; channel < channels; channel++) {
            counts[channel] += ONES(word ^ weights[channel]);
        }
    }
}

/* values = most - each * counts */
static void sums_of_signs(const Word *restrict counts, int channels, int most, int each, float *restrict values)
{
    for (int channel = 0; channel < channels; channel++) {
        values[channel] = (float)(most - each * (int)counts[channel]);
    }
}

typedef struct {
    Shape shape;
    int planes;          /* 1 for binary kernels; 2 for ternary ones, each the mean of two binary kernels */
    const Word *weights; /* (planes, kernel, kernel, words, out_channels) */
    Finish finish;
} SignConvolution;

/* Convolve signs. Windows end at the border: padding is 0 and adds nothing. `counts` and `pixel` are scratch. */
static void convolve_signs(const SignConvolution *layer, const Word *in, const float *shortcut, float *out,
                           Word *counts, float *pixel)
{
    const Shape shape = layer->shape;
    const int words = words_of(shape.in_channels), channels = shape.out_channels;
    const int tap = words * channels; /* number of weights for one pixel of the window */

    for (int y = 0; y < shape.out_height; y++) {
        for (int x = 0; x < shape.out_width; x++) {
            const int top = y * shape.stride - shape.padding, left = x * shape.stride - shape.padding;
            const int first_row = at_least(-top, 0), rows = at_most(shape.in_height - top, shape.kernel);
            const int first = at_least(-left, 0), columns = at_most(shape.in_width - left, shape.kernel);
            const int inside = at_least(rows - first_row, 0) * at_least(columns - first, 0);
            const Word *weights = layer->weights;

            memset(counts, 0, (size_t)channels * sizeof *counts);
            for (int plane = 0; plane < layer->planes; plane++) {
                for (int row = first_row; row < rows && first < columns; row++) {
                    count_differences(in + ((top + row) * shape.in_width + left + first) * words,
                                      (columns - first) * words, weights + (row * shape.kernel + first) * tap,
                                      channels, counts);
                }
                weights += shape.kernel * shape.kernel * tap;
            }
            sums_of_signs(counts, channels, inside * shape.in_channels, 2 / layer->planes, pixel);
            finish_pixel(&layer->finish, channels, pixel, shortcut, out);
            shortcut = shortcut ? shortcut + channels : NULL;
            out += channels;
        }
    }
}
