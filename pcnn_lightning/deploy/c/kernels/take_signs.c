typedef struct {
    int channels, pixels;
    const float *thresholds, *above; /* the sign at and above the threshold; below, it is the opposite */
} Signs;

/* Batch norm and sign in one, as numbers: for layers that take any numbers. */
static void take_signs(const Signs *layer, const float *in, float *out)
{
    for (int pixel = 0; pixel < layer->pixels; pixel++) {
        for (int channel = 0; channel < layer->channels; channel++, in++, out++) {
            *out = *in >= layer->thresholds[channel] ? layer->above[channel] : -layer->above[channel];
        }
    }
}
