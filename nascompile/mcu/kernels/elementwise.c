/* One value at a time: table look-up and residual addition. */
#include "kernels.h"
#include "port.h"

NC_OPERATOR void nc_lookup(const int8_t *table, const int8_t *x, int8_t *y, uint32_t count)
{
    uint32_t i = 0;
    for (; i + 8 <= count; i += 8)
#pragma GCC unroll 8
        for (uint32_t j = 0; j < 8; j++)
            y[i + j] = table[(uint8_t)x[i + j]];
    for (; i < count; i++)
        y[i] = table[(uint8_t)x[i]];
}

NC_INLINE int8_t sum_of(const nc_add_t *op, int8_t a, int8_t b)
{
    return (int8_t)nc_saturate(8, nc_mul_add(b, op->b_multiplier, nc_mul_add(a, op->a_multiplier, op->constant)), 20);
}

NC_OPERATOR void nc_add(const nc_add_t *op, const int8_t *a, const int8_t *b, int8_t *y, uint32_t count)
{
    const nc_add_t constants = *op;
    uint32_t i = 0;
    for (; i + 8 <= count; i += 8)
#pragma GCC unroll 8
        for (uint32_t j = 0; j < 8; j++)
            y[i + j] = sum_of(&constants, a[i + j], b[i + j]);
    for (; i < count; i++)
        y[i] = sum_of(&constants, a[i], b[i]);
}
