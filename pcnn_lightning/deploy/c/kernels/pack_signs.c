typedef struct {
    int channels, pixels;
    const float *thresholds; /* batch norm and sign in one; where a norm falls, the bits of the weights are inverted */
} Threshold;

/* Bits of up to 32 channels: a loop that compilers vectorize. */
static inline uint32_t compare(const float *in, const float *thresholds, int count)
{
    uint32_t bits = 0;

    for (int bit = 0; bit < count; bit++) {
        bits |= (uint32_t)(in[bit] >= thresholds[bit]) << bit;
    }
    return bits;
}

/* Compare each channel of each pixel with its threshold. */
static void pack_signs(const Threshold *layer, const float *in, Word *out)
{
    for (int pixel = 0; pixel < layer->pixels; pixel++) {
        for (int first = 0; first < layer->channels; first += PCNN_WORD_BITS, out++) {
            *out = 0;
            for (int bit = 0; bit < PCNN_WORD_BITS && first + bit < layer->channels; bit += 32) {
                const int start = first + bit, count = at_most(layer->channels - start, 32);
                *out |= (Word)compare(in + start, layer->thresholds + start, count) << bit;
            }
        }
        in += layer->channels;
    }
}
