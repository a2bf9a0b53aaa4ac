/* Means: of rows, and of windows of an image. */
#include "kernels.h"
#include "port.h"

NC_OPERATOR void nc_mean(const nc_mean_t *op, const int8_t *x, int8_t *y)
{
    const int32_t start = -(int32_t)op->rows * op->x_zero;
    uint32_t c = 0;
    for (; c + 4 <= op->channels; c += 4) {
        int32_t sums[4] = {start, start, start, start};
        const int8_t *from = x + c;
        for (uint32_t t = op->rows; t > 0; t--, from += op->x_stride) {
            uint32_t word = nc_load4(from), even = nc_even_bytes(word), odd = nc_odd_bytes(word);
            sums[0] += nc_low(even);
            sums[1] += nc_low(odd);
            sums[2] += nc_high(even);
            sums[3] += nc_high(odd);
        }
        for (uint32_t j = 0; j < 4; j++)
            y[c + j] = (int8_t)nc_saturate8(nc_mul_high_add(sums[j] * 256, op->multiplier, op->zero_point));
    }
    for (; c < op->channels; c++) {
        int32_t sum = start;
        for (uint32_t t = 0; t < op->rows; t++)
            sum += x[t * op->x_stride + c];
        y[c] = (int8_t)nc_saturate8(nc_mul_high_add(sum * 256, op->multiplier, op->zero_point));
    }
}

NC_OPERATOR void nc_average_pool(const nc_average_pool_t *op, const int8_t *x, int8_t *y)
{
    const uint32_t pitch = op->width * op->channels;
    for (uint32_t top = 0; top + op->kernel <= op->height; top += op->stride)
        for (uint32_t left = 0; left + op->kernel <= op->width; left += op->stride)
            for (uint32_t c = 0; c < op->channels; c++) {
                const int8_t *from = x + top * pitch + left * op->channels + c;
                int32_t sum = -(int32_t)(op->kernel * op->kernel) * op->x_zero;
                for (uint32_t i = 0; i < op->kernel; i++)
                    for (uint32_t j = 0; j < op->kernel; j++)
                        sum += from[i * pitch + j * op->channels];
                *y++ = (int8_t)nc_saturate8(nc_mul_high_add(sum * 256, op->multiplier, op->zero_point));
            }
}
