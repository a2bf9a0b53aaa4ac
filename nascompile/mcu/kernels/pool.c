/* Means: of rows, and of windows of an image. */
#include "kernels.h"
#include "port.h"

/* lanes: 4 or 1, a constant */
NC_INLINE void add_bytes(int32_t *sums, const int8_t *from, uint32_t lanes)
{
    if (lanes == 1) {
        sums[0] += from[0];
        return;
    }
    const uint32_t word = nc_load4(from), even = nc_even_bytes(word), odd = nc_odd_bytes(word);
    sums[0] += nc_low(even);
    sums[1] += nc_low(odd);
    sums[2] += nc_high(even);
    sums[3] += nc_high(odd);
}

NC_INLINE void put(int8_t *y, const int32_t *sums, uint32_t lanes, int32_t multiplier, int32_t zero_point)
{
    for (uint32_t lane = 0; lane < lanes; lane++)
        y[lane] = (int8_t)nc_saturate8(nc_mul_high_add(sums[lane] * 256, multiplier, zero_point));
}

NC_INLINE void mean_of(const nc_mean_t *op, const int8_t *x, uint32_t lanes, int8_t *y)
{
    const int32_t start = -(int32_t)op->rows * op->x_zero;
    int32_t sums[4] = {start, start, start, start};
    for (uint32_t t = op->rows; t > 0; t--, x += op->x_stride)
        add_bytes(sums, x, lanes);
    put(y, sums, lanes, op->multiplier, op->zero_point);
}

NC_OPERATOR void nc_mean(const nc_mean_t *op, const int8_t *x, int8_t *y)
{
    uint32_t c = 0;
    for (; c + 4 <= op->channels; c += 4)
        mean_of(op, x + c, 4, y + c);
    for (; c < op->channels; c++)
        mean_of(op, x + c, 1, y + c);
}

NC_INLINE void pool_window(const nc_average_pool_t *op, const int8_t *x, uint32_t lanes, int8_t *y)
{
    const uint32_t channels = op->channels, kernel = op->kernel;
    const int32_t start = -(int32_t)(kernel * kernel) * op->x_zero;
    int32_t sums[4] = {start, start, start, start};
    for (uint32_t i = kernel; i > 0; i--, x += op->width * channels) {
        const int8_t *pixel = x;
        for (uint32_t j = kernel; j > 0; j--, pixel += channels)
            add_bytes(sums, pixel, lanes);
    }
    put(y, sums, lanes, op->multiplier, op->zero_point);
}

NC_OPERATOR void nc_average_pool(const nc_average_pool_t *op, const int8_t *x, int8_t *y)
{
    const uint32_t channels = op->channels;
    for (uint32_t top = 0; top + op->kernel <= op->height; top += op->stride)
        for (uint32_t left = 0; left + op->kernel <= op->width; left += op->stride, y += channels) {
            const int8_t *from = x + (top * op->width + left) * channels;
            uint32_t c = 0;
            for (; c + 4 <= channels; c += 4)
                pool_window(op, from + c, 4, y + c);
            for (; c < channels; c++)
                pool_window(op, from + c, 1, y + c);
        }
}
