/* What follows a convolution: x * scale + shift, + shortcut, and a PReLU. A pointer is NULL where there is no such. */
typedef struct {
    const float *scale, *shift, *slopes; /* of each channel */
} Finish;

/* Finish a pixel, changing its values; `out` may be `shortcut`. */
static void finish_pixel(const Finish *finish, int channels, float *restrict values, const float *shortcut, float *out)
{
    const float *restrict scale = finish->scale, *restrict shift = finish->shift, *restrict slopes = finish->slopes;

    for (int channel = 0; scale != NULL && channel < channels; channel++) {
        values[channel] *= scale[channel];
    }
    for (int channel = 0; shift != NULL && channel < channels; channel++) {
        values[channel] += shift[channel];
    }
    for (int channel = 0; shortcut != NULL && channel < channels; channel++) {
        values[channel] += shortcut[channel];
    }
    for (int channel = 0; slopes != NULL && channel < channels; channel++) {
        const float positive = values[channel] > 0 ? values[channel] : 0; /* no branch: this becomes a maximum */
        values[channel] = positive + (values[channel] - positive) * slopes[channel];
    }
    memcpy(out, values, (size_t)channels * sizeof *out);
}
