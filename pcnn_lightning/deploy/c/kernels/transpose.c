typedef struct {
    int in_width, out_height, out_width, stride; /* of the pixels to take */
    int rows, columns;                           /* of the matrix that the channels of a pixel form */
} Transpose;

/* Transpose each pixel, so that the planes of a map become pixels side by side, or the other way round. */
static void transpose(const Transpose *layer, const float *in, float *out)
{
    for (int y = 0; y < layer->out_height; y++) {
        for (int x = 0; x < layer->out_width; x++) {
            const float *pixel = in + (y * layer->in_width + x) * layer->stride * layer->rows * layer->columns;
            for (int column = 0; column < layer->columns; column++) {
                for (int row = 0; row < layer->rows; row++) {
                    *out++ = pixel[row * layer->columns + column];
                }
            }
        }
    }
}
