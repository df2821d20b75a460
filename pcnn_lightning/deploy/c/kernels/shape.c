/* Images lie in memory as (height, width, channels). A window is what a pixel of the output is made of. */
typedef struct {
    int in_channels, in_height, in_width;
    int out_channels, out_height, out_width;
    int kernel, stride, padding; /* of windows, which are square */
} Shape;

static int at_least(int value, int least)
{
    return value < least ? least : value;
}

static int at_most(int value, int most)
{
    return value > most ? most : value;
}
