typedef struct {
    int channels, pixels;
    Finish finish;
} Pointwise;

/* Layers without a convolution before them; `pixel` is scratch for one, and `out` may be `in` or `shortcut`. */
static void finish_image(const Pointwise *layer, const float *in, const float *shortcut, float *out, float *pixel)
{
    const int channels = layer->channels;

    for (int index = 0; index < layer->pixels; index++) {
        memcpy(pixel, in + index * channels, (size_t)channels * sizeof *pixel);
        finish_pixel(&layer->finish, channels, pixel, shortcut ? shortcut + index * channels : NULL,
                     out + index * channels);
    }
}
