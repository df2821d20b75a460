typedef struct {
    int channels, pixels;
    int planes;             /* number of times that each channel is repeated */
    const float *mean, *std; /* of each channel, in units of raw pixels */
} Image;

/* Normalize an image, whose channels lie one after another, and interleave its channels. */
static void load_image(const Image *layer, const uint8_t *image, float *out)
{
    for (int pixel = 0; pixel < layer->pixels; pixel++) {
        for (int channel = 0; channel < layer->channels; channel++) {
            const float raw = (float)image[channel * layer->pixels + pixel];
            for (int plane = 0; plane < layer->planes; plane++) {
                *out++ = (raw - layer->mean[channel]) / layer->std[channel];
            }
        }
    }
}
