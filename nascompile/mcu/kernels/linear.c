/* Linear maps: packed weights, blocks of four tokens by two outputs. */
#include "linear.h"

#include "dot.h"

enum { TO_ROWS, THROUGH_TABLE, ONTO_RESIDUAL, TO_LAYOUT };

NC_INLINE uint32_t channel_offset(const nc_linear_t *op, uint32_t channel)
{
    if (op->layout == NC_KEYS)
        return channel / 4 * 8 + (channel & 1) * 4 + (channel & 2);
    return channel / 2 * op->y_stride + channel % 2;
}

NC_INLINE uint32_t token_offset(const nc_linear_t *op, uint32_t token)
{
    if (op->layout == NC_KEYS)
        return token / 2 * op->y_stride + token % 2;
    return op->layout == NC_VALUES ? token * 2 : token * op->y_stride;
}

NC_INLINE int8_t finish(const nc_linear_t *op, int kind, int32_t sum, int32_t multiplier, const int8_t *residual)
{
    if (kind == ONTO_RESIDUAL) {
        int64_t value = op->residual_constant + (int64_t)sum * multiplier + (int64_t)(*residual * 256) * op->residual_multiplier;
        return (int8_t)nc_saturate8((int32_t)(value >> 32));
    }
    int32_t y = nc_saturate8(nc_mul_high_add(sum, multiplier, op->zero_point));
    return kind == THROUGH_TABLE ? op->table[(uint8_t)y] : (int8_t)y;
}

NC_INLINE void block(const nc_linear_t *op, int kind, uint32_t rows, const uint32_t *x, uint32_t pairs, uint32_t first,
                     const int8_t *residual, int8_t *y)
{
    const uint32_t *w = op->weights;
    uint32_t at[4];
    for (uint32_t r = 0; r < rows; r++)
        at[r] = token_offset(op, first + r);
    for (uint32_t o = 0; o < op->outputs; o += 2) {
        int32_t sums[8];
        for (uint32_t r = 0; r < rows; r++)
            sums[2 * r] = nc_signed(w[0]), sums[2 * r + 1] = nc_signed(w[1]);
        w = nc_dot(rows, sums, x, w + 2, pairs);
        int32_t m0 = nc_signed(w[0]), m1 = nc_signed(w[1]);
        w += 2;
        uint32_t c = kind == TO_LAYOUT ? channel_offset(op, o) : o;
        for (uint32_t r = 0; r < rows; r++)
            y[at[r] + c] = finish(op, kind, sums[2 * r], m0, residual + at[r] + c);
        if (o + 1 == op->outputs)
            break;
        c = kind == TO_LAYOUT ? channel_offset(op, o + 1) : o + 1;
        for (uint32_t r = 0; r < rows; r++)
            y[at[r] + c] = finish(op, kind, sums[2 * r + 1], m1, residual + at[r] + c);
    }
}

NC_INLINE void block_of(const nc_linear_t *op, uint32_t rows, const uint32_t *x, uint32_t pairs, uint32_t first, const int8_t *residual,
                        int8_t *y)
{
    if (op->residual_multiplier != 0)
        block(op, ONTO_RESIDUAL, rows, x, pairs, first, residual, y);
    else if (op->table != NULL)
        block(op, THROUGH_TABLE, rows, x, pairs, first, y, y);
    else if (op->layout == NC_ROWS)
        block(op, TO_ROWS, rows, x, pairs, first, y, y);
    else
        block(op, TO_LAYOUT, rows, x, pairs, first, y, y);
}

NC_OPERATOR void nc_linear_block(const nc_linear_t *op, uint32_t rows, const uint32_t *x, uint32_t pairs, uint32_t first,
                                 const int8_t *residual, int8_t *y)
{
    if (rows == 4)
        block_of(op, 4, x, pairs, first, residual, y);
    else
        block_of(op, 1, x, pairs, first, residual, y);
}

NC_OPERATOR void nc_linear(const nc_linear_t *op, const int8_t *x, uint32_t tokens, const int8_t *residual, int8_t *y, void *scratch)
{
    uint32_t rows, pairs = 2 * nc_quads(op->inputs), *words = scratch;
    for (uint32_t t = 0; t < tokens; t += rows) {
        rows = nc_block_of(tokens - t);
        for (uint32_t r = 0; r < rows; r++, x += op->x_stride)
            if (rows == 4)
                nc_expand_row(4, words + r, x, op->inputs);
            else
                nc_expand_row(1, words, x, op->inputs);
        nc_linear_block(op, rows, words, pairs, t, residual, y);
    }
}

/* The first factor of four rows or one: the words of the second factor's input. */
NC_INLINE void narrow(const nc_linear_t *op, uint32_t rows, const uint32_t *x, uint32_t *mid)
{
    const uint32_t *w = op->weights;
    for (uint32_t o = 0; o < op->outputs; o += 2, mid += rows) {
        int32_t sums[8];
        for (uint32_t r = 0; r < rows; r++)
            sums[2 * r] = nc_signed(w[0]), sums[2 * r + 1] = nc_signed(w[1]);
        w = nc_dot(rows, sums, x, w + 2, 2 * nc_quads(op->inputs));
        int32_t m0 = nc_signed(w[0]), m1 = nc_signed(w[1]);
        w += 2;
        for (uint32_t r = 0; r < rows; r++) {
            int32_t low = nc_saturate(13, nc_mul_high(sums[2 * r], m0), 0), high = nc_saturate(13, nc_mul_high(sums[2 * r + 1], m1), 0);
            mid[r] = nc_pack_low((uint32_t)low, (uint32_t)high);
        }
    }
}

NC_OPERATOR void nc_low_rank(const nc_low_rank_t *op, const int8_t *x, uint32_t tokens, const int8_t *residual, int8_t *y, void *scratch)
{
    const nc_linear_t *first = &op->first, *second = &op->second;
    uint32_t rows, pairs = (second->inputs + 1) / 2, *words = scratch, *mid = words + 8 * nc_quads(first->inputs);
    for (uint32_t t = 0; t < tokens; t += rows) {
        rows = nc_block_of(tokens - t);
        for (uint32_t r = 0; r < rows; r++, x += first->x_stride)
            if (rows == 4)
                nc_expand_row(4, words + r, x, first->inputs);
            else
                nc_expand_row(1, words, x, first->inputs);
        if (rows == 4)
            narrow(first, 4, words, mid);
        else
            narrow(first, 1, words, mid);
        nc_linear_block(second, rows, mid, pairs, t, residual, y);
    }
}

NC_OPERATOR void nc_head(const nc_linear_t *op, const int8_t *x, int32_t *y, void *scratch)
{
    const uint32_t *w = op->weights;
    nc_expand_row(1, scratch, x, op->inputs);
    for (uint32_t o = 0; o < op->outputs; o += 2) {
        int32_t sums[2] = {nc_signed(w[0]), nc_signed(w[1])};
        w = nc_dot_1x2(sums, scratch, w + 2, 2 * nc_quads(op->inputs));
        y[o] = nc_mul_high(sums[0], nc_signed(w[0]));
        if (o + 1 < op->outputs)
            y[o + 1] = nc_mul_high(sums[1], nc_signed(w[1]));
        w += 2;
    }
}
