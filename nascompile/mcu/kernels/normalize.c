/* Row by row: softmax and layer normalization. */
#include "kernels.h"
#include "port.h"

NC_OPERATOR void nc_softmax(const uint16_t *table, const int8_t *x, uint8_t *y, uint32_t rows, uint32_t width)
{
    for (; rows > 0; rows--, x += width, y += width) {
        int32_t top = -128;
        uint32_t total = 0, i;
        for (i = 0; i < width; i++)
            top = x[i] > top ? x[i] : top;
        for (i = 0; i < width; i++)
            total += table[top - x[i]];
        uint32_t inverse = ((UINT32_C(1) << 31) + total / 2) / total;
        for (i = 0; i < width; i++) {
            uint32_t p = (table[top - x[i]] * inverse + (UINT32_C(1) << 22)) >> 23;
            y[i] = (uint8_t)(p > 255 ? 255 : p);
        }
    }
}

/* floor(sqrt(m)), one bit a turn. */
NC_INLINE uint32_t square_root(uint32_t m)
{
    uint32_t root = 0;
    for (uint32_t bit = UINT32_C(1) << 30; bit != 0; bit >>= 2) {
        uint32_t trial = root + bit;
        root >>= 1;
        if (m >= trial) {
            m -= trial;
            root += bit;
        }
    }
    return root;
}

NC_OPERATOR void nc_layer_norm(const nc_layer_norm_t *op, const int8_t *x, int8_t *y, uint32_t rows)
{
    const uint32_t n = op->width;
    for (; rows > 0; rows--, x += op->x_stride, y += op->y_stride) {
        int32_t sum = 0, squares = 0;
        uint32_t i = 0;
        for (; i + 4 <= n; i += 4) {
            uint32_t word = nc_load4(x + i), even = nc_even_bytes(word), odd = nc_odd_bytes(word);
            sum = nc_dot2(odd, 0x00010001, nc_dot2(even, 0x00010001, sum));
            squares = nc_dot2(odd, odd, nc_dot2(even, even, squares));
        }
        for (; i < n; i++) {
            sum += x[i];
            squares += x[i] * x[i];
        }
        uint64_t variance = (uint64_t)n * (uint32_t)squares - (uint64_t)((int64_t)sum * sum) + op->epsilon;
        if (variance == 0)
            variance = 1;
        uint32_t high = (uint32_t)(variance >> 32);
        int32_t bits = high != 0 ? 64 - (int32_t)nc_leading_zeros(high) : 32 - (int32_t)nc_leading_zeros((uint32_t)variance);
        int32_t q = (bits - 31) >> 1;
        uint32_t m = (uint32_t)(q >= 0 ? variance >> (2 * q) : variance << (-2 * q));
        int32_t inverse = (int32_t)((UINT32_MAX / square_root(m)) << 14);
        int32_t scale = nc_signed(n << (9 - q)), offset = nc_signed(0U - ((uint32_t)sum << (9 - q)));
        const int32_t *affine = op->affine;
        for (i = 0; i < n; i++, affine += 2) {
            int32_t v = nc_mul_high(nc_mul_add(x[i], scale, offset), inverse);
            y[i] = (int8_t)nc_saturate(8, nc_mul_high_add(v, affine[0], affine[1]), 8);
        }
    }
}
