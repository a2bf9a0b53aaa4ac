/* Attention of one head, four query rows at a time where there are four: scores, softmax and values without a score matrix. */
#include "dot.h"
#include "kernels.h"

#define LEAST_SCORE (-16384)

/* Scores of the rows with keys (2j, 2j + 1), one word each. */
NC_INLINE void score(const nc_attention_t *op, uint32_t rows, const uint32_t *x, const int8_t *keys, uint32_t *s)
{
    const uint32_t *k = (const uint32_t *)(const void *)keys;
    const uint32_t pairs = 2 * nc_quads(op->width);
    const int32_t multiplier = op->score_multiplier;
    for (uint32_t left = (op->tokens + 1) / 2; left > 0; left--, s += rows) {
        int32_t sums[8] = {0};
        k = nc_dot(rows, sums, x, k, pairs);
        for (uint32_t r = 0; r < rows; r++)
            s[r] = nc_narrow2(sums[2 * r], sums[2 * r + 1], multiplier, multiplier, 15);
    }
    if (op->tokens % 2 != 0)
        for (uint32_t r = 1; r <= rows; r++) /* the pad's score */
            s[-(int32_t)r] = nc_pack_low(s[-(int32_t)r], (uint32_t)LEAST_SCORE);
}

/* Scores of one row to weights, in place; returns their sum. */
NC_INLINE uint32_t exponentiate(const nc_attention_t *op, uint32_t rows, uint32_t *s)
{
    const uint16_t *table = op->exp_table;
    const uint32_t words = op->tokens / 2, odd = op->tokens % 2;
    uint32_t top = nc_pack_low((uint32_t)LEAST_SCORE, (uint32_t)LEAST_SCORE);
    int32_t total = 0;
#pragma GCC unroll 4
    for (uint32_t j = 0; j < words + odd; j++)
        top = nc_max16(top, s[j * rows]);
    top = nc_max16(top, top >> 16);
    top = nc_pack_low(top, top);
#pragma GCC unroll 4
    for (uint32_t j = 0; j < words; j++, s += rows) {
        uint32_t below = nc_clamp16_1023(nc_sub16(top, *s));
        *s = nc_pack_low(table[below & 0xFFFF], table[below >> 16]);
        total = nc_dot2(*s, 0x00010001, total);
    }
    if (odd) {
        *s = table[nc_clamp16_1023(nc_sub16(top, *s)) & 0xFFFF];
        total += (int32_t)*s;
    }
    return (uint32_t)total;
}

NC_INLINE void attend(const nc_attention_t *op, uint32_t rows, const int8_t *q, const int8_t *keys, const int8_t *values, int8_t *y,
                      uint32_t *x)
{
    uint32_t *s = x + 2 * rows * nc_quads(op->width), shift[4];
    int32_t start[4], multiplier[4];
    for (uint32_t r = 0; r < rows; r++)
        nc_expand_row(rows, x + r, q + r * op->q_stride, op->width);
    score(op, rows, x, keys, s);
    for (uint32_t r = 0; r < rows; r++) {
        uint32_t total = exponentiate(op, rows, s + r);
        shift[r] = 17 - nc_leading_zeros(total);
        uint32_t divisor = total >> shift[r];
        multiplier[r] = (int32_t)((op->ratio + divisor / 2) / divisor * 16);
        start[r] = nc_mul_add(-op->value_zero, (int32_t)total, 0);
    }
    const uint32_t *v = (const uint32_t *)(const void *)values;
    const uint32_t width = op->width, stride = op->y_stride, pairs = (op->tokens + 1) / 2;
    const int32_t zero_point = op->zero_point;
    for (uint32_t c = 0; c < width; c += 2) {
        int32_t sums[8];
        for (uint32_t r = 0; r < rows; r++)
            sums[2 * r] = sums[2 * r + 1] = start[r];
        v = nc_dot(rows, sums, s, v, pairs);
        for (uint32_t r = 0; r < rows; r++) {
            int8_t *to = y + r * stride + c;
            sums[2 * r] >>= shift[r], sums[2 * r + 1] >>= shift[r];
            nc_requantize2(sums + 2 * r, multiplier[r], multiplier[r], zero_point);
            to[0] = (int8_t)sums[2 * r];
            if (c + 1 < width) /* a lone last channel: the second is of the pad */
                to[1] = (int8_t)sums[2 * r + 1];
        }
    }
}

NC_OPERATOR void nc_attention(const nc_attention_t *op, const int8_t *q, const int8_t *keys, const int8_t *values, int8_t *y, uint32_t rows,
                              void *scratch)
{
    uint32_t step;
    for (uint32_t r = 0; r < rows; r += step, q += step * op->q_stride, y += step * op->y_stride) {
        step = nc_block_of(rows - r);
        NC_WITH_ROWS(step, attend(op, ROWS, q, keys, values, y, scratch));
    }
}

/* A row to every rows-th word: inputs (k, k+1) of each four, zeros behind the last. */
NC_INLINE void expand_bytes(uint32_t rows, uint32_t *x, const uint8_t *row, uint32_t inputs)
{
    for (uint32_t k = 0; k < inputs; k += 2, x += rows)
        *x = row[k] | (k + 1 < inputs ? (uint32_t)row[k + 1] << 16 : 0);
}

NC_INLINE void multiply(const nc_matmul_t *op, uint32_t rows, const uint8_t *from, const int8_t *w8, int8_t *y, uint32_t *x)
{
    uint32_t pairs = op->of_values ? (op->inputs + 1) / 2 : 2 * nc_quads(op->inputs);
    int32_t start[4];
    for (uint32_t r = 0; r < rows; r++, from += op->x_stride) {
        int32_t sum = 0;
        if (op->of_values)
            expand_bytes(rows, x + r, from, op->inputs);
        else
            nc_expand_row(rows, x + r, (const int8_t *)from, op->inputs);
        for (uint32_t p = 0; p < pairs; p++)
            sum = nc_dot2(x[p * rows + r], 0x00010001, sum);
        start[r] = -op->w_zero * sum;
    }
    const uint32_t *w = (const uint32_t *)(const void *)w8;
    for (uint32_t o = 0; o < op->outputs; o += 2) {
        int32_t sums[8];
        for (uint32_t r = 0; r < rows; r++)
            sums[2 * r] = sums[2 * r + 1] = start[r];
        w = nc_dot(rows, sums, x, w, pairs);
        for (uint32_t r = 0; r < rows; r++) {
            int8_t *to = y + r * op->y_stride + o;
            to[0] = (int8_t)nc_saturate8(nc_mul_high_add(sums[2 * r], op->multiplier, op->zero_point));
            if (o + 1 < op->outputs)
                to[1] = (int8_t)nc_saturate8(nc_mul_high_add(sums[2 * r + 1], op->multiplier, op->zero_point));
        }
    }
}

NC_OPERATOR void nc_matmul(const nc_matmul_t *op, const void *x, const int8_t *w, int8_t *y, uint32_t rows, void *scratch)
{
    const uint8_t *from = x;
    uint32_t step;
    for (uint32_t r = 0; r < rows; r += step, from += step * op->x_stride, y += step * op->y_stride) {
        step = nc_block_of(rows - r);
        NC_WITH_ROWS(step, multiply(op, ROWS, from, w, y, scratch));
    }
}
