/* Mean of each channel over each window, which ends at the border. */
static void pool_average(const Shape *shape, const float *restrict in, float *restrict out)
{
    const int channels = shape->in_channels;

    for (int y = 0; y < shape->out_height; y++) {
        const int top = window_start(shape, y, shape->in_height, shape->out_height);
        const int bottom = window_end(shape, y, shape->in_height, shape->out_height);
        for (int x = 0; x < shape->out_width; x++, out += channels) {
            const int left = window_start(shape, x, shape->in_width, shape->out_width);
            const int right = window_end(shape, x, shape->in_width, shape->out_width);
            memset(out, 0, (size_t)channels * sizeof *out);
            for (int row = top; row < bottom; row++) {
                for (int column = left; column < right; column++) {
                    const float *pixel = in + (row * shape->in_width + column) * channels;
                    for (int channel = 0; channel < channels; channel++) {
                        out[channel] += pixel[channel];
                    }
                }
            }
            for (int channel = 0; channel < channels; channel++) {
                out[channel] /= (float)((bottom - top) * (right - left));
            }
        }
    }
}
