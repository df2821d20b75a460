/* What follows a convolution: x * scale + shift, + shortcut, and a PReLU. A pointer is NULL where there is no such:
 * without `positive`, the slope of positive numbers is 1. */
typedef struct {
    const float *scale, *shift, *positive, *negative; /* of each channel; the last two are slopes */
} Finish;

/* Finish a pixel, changing its values; `out` may be `shortcut`. */
static void finish_pixel(const Finish *finish, int channels, float *restrict values, const float *shortcut, float *out)
{
    const float *restrict scale = finish->scale, *restrict shift = finish->shift;
    const float *restrict positive = finish->positive, *restrict negative = finish->negative;

    for (int channel = 0; scale != NULL && channel < channels; channel++) {
        values[channel] *= scale[channel];
    }
    for (int channel = 0; shift != NULL && channel < channels; channel++) {
        values[channel] += shift[channel];
    }
    for (int channel = 0; shortcut != NULL && channel < channels; channel++) {
        values[channel] += shortcut[channel];
    }
    for (int channel = 0; negative != NULL && channel < channels; channel++) {
        const float above = values[channel] > 0 ? values[channel] : 0; /* no branch: this becomes a maximum */
        const float below = (values[channel] - above) * negative[channel];
        values[channel] = (positive == NULL ? above : above * positive[channel]) + below;
    }
    memcpy(out, values, (size_t)channels * sizeof *out);
}
