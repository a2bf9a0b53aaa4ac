/* Row by row: softmax and layer normalization. */
#include "kernels.h"
#include "port.h"

NC_INLINE uint32_t weight_of(uintptr_t zero, int32_t x) { return *(const uint16_t *)(zero + 2 * (uintptr_t)x); }

NC_OPERATOR void nc_softmax(const uint16_t *table, const int8_t *x, uint8_t *y, uint32_t rows, uint32_t width)
{
    for (; rows > 0; rows--, x += width, y += width) {
        uint32_t best = 0x80808080, total = 0, i = 0;
        for (; i + 4 <= width; i += 4)
            best = nc_max8(best, nc_load4(x + i));
        best = nc_max8(best, best >> 16 | best << 16);
        int32_t top = nc_signed_byte(nc_max8(best, best >> 8));
        for (; i < width; i++)
            top = x[i] > top ? x[i] : top;
        /* where x = 0 would be: an address, since a pointer may not lie behind the table; for x in [-128 .. top] it is within */
        const uintptr_t weights = (uintptr_t)table + 2 * (uint32_t)(255 - top);
#pragma GCC unroll 4
        for (i = 0; i < width; i++)
            total += weight_of(weights, x[i]);
        uint32_t inverse = ((UINT32_C(1) << 31) + total / 2) / total;
#pragma GCC unroll 4
        for (i = 0; i < width; i++) {
            uint32_t p = (weight_of(weights, x[i]) * inverse + (UINT32_C(1) << 22)) >> 23;
            y[i] = (uint8_t)(p - (p >> 8)); /* 256 does not fit */
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

NC_INLINE int8_t normalized(int32_t x, int32_t scale, int32_t offset, int32_t inverse, const int32_t *affine)
{
    int32_t v = nc_mul_high(nc_mul_add(x, scale, offset), inverse);
    return (int8_t)nc_saturate(8, nc_mul_high_add(v, affine[0], affine[1]), 8);
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
        for (i = 0; i + 4 <= n; i += 4, affine += 8)
#pragma GCC unroll 4
            for (uint32_t j = 0; j < 4; j++)
                y[i + j] = normalized(x[i + j], scale, offset, inverse, affine + 2 * j);
        for (; i < n; i++, affine += 2)
            y[i] = normalized(x[i], scale, offset, inverse, affine);
    }
}
