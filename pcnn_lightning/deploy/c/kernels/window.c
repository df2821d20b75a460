/* Rows or columns of the window of pixel `index` along a side. With stride 0, windows share out the whole side. */
static int window_start(const Shape *shape, int index, int in_side, int out_side)
{
    return shape->stride ? at_least(index * shape->stride - shape->padding, 0) : index * in_side / out_side;
}

static int window_end(const Shape *shape, int index, int in_side, int out_side)
{
    return shape->stride ? at_most(index * shape->stride - shape->padding + shape->kernel, in_side)
                         : ((index + 1) * in_side + out_side - 1) / out_side;
}
