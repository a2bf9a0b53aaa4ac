/* Means: of rows, and of windows of an image. */
#include "kernels.h"
#include "port.h"

NC_INLINE void add_bytes(int32_t *sums, const int8_t *from, uint32_t lanes)
{
    if (lanes < 4) {
        for (uint32_t lane = 0; lane < lanes; lane++)
            sums[lane] += from[lane];
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

NC_OPERATOR void nc_mean(const nc_mean_t *op, const int8_t *x, int8_t *y)
{
    const int32_t start = -(int32_t)op->rows * op->x_zero;
    for (uint32_t c = 0; c < op->channels; c += 4) {
        const uint32_t lanes = op->channels - c < 4 ? op->channels - c : 4;
        int32_t sums[4] = {start, start, start, start};
        for (uint32_t t = 0; t < op->rows; t++)
            add_bytes(sums, x + t * op->x_stride + c, lanes);
        put(y + c, sums, lanes, op->multiplier, op->zero_point);
    }
}

NC_OPERATOR void nc_average_pool(const nc_average_pool_t *op, const int8_t *x, int8_t *y)
{
    const uint32_t channels = op->channels, pitch = op->width * channels, kernel = op->kernel;
    const int32_t start = -(int32_t)(kernel * kernel) * op->x_zero;
    for (uint32_t top = 0; top + kernel <= op->height; top += op->stride)
        for (uint32_t left = 0; left + kernel <= op->width; left += op->stride, y += channels)
            for (uint32_t c = 0; c < channels; c += 4) {
                const uint32_t lanes = channels - c < 4 ? channels - c : 4;
                const int8_t *from = x + top * pitch + left * channels + c;
                int32_t sums[4] = {start, start, start, start};
                for (uint32_t i = 0; i < kernel; i++, from += pitch)
                    for (uint32_t j = 0; j < kernel; j++)
                        add_bytes(sums, from + j * channels, lanes);
                put(y + c, sums, lanes, op->multiplier, op->zero_point);
            }
}
