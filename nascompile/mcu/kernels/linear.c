/* Linear maps: packed weights, blocks of four tokens by two outputs. */
#include "linear.h"

#include "dot.h"

enum { TO_ROWS, THROUGH_TABLE, TO_KEYS, TO_VALUES };

/* Where row r of a block and output o are, from (row 0, output o & ~1); a block starts at a token that is a multiple of its rows. */
NC_INLINE uint32_t place(int kind, uint32_t stride, uint32_t r, uint32_t o)
{
    if (kind == TO_KEYS)
        return r / 2 * stride + r % 2 + 4 * o;
    return kind == TO_VALUES ? r * 2 + o : r * stride + o;
}

NC_INLINE int8_t looked_up(const nc_linear_t *op, int kind, int32_t y)
{
    return kind == THROUGH_TABLE ? op->table[(uint8_t)y] : (int8_t)y;
}

/* One row's two outputs; only the first where `odd` is none. */
NC_INLINE void put(const nc_linear_t *op, int kind, const int32_t *y2, uint32_t r, int odd, int8_t *y)
{
    y[place(kind, op->y_stride, r, 0)] = looked_up(op, kind, y2[0]);
    if (odd)
        y[place(kind, op->y_stride, r, 1)] = looked_up(op, kind, y2[1]);
}

NC_INLINE int8_t onto(const nc_linear_t *op, int32_t sum, int32_t multiplier, int8_t residual)
{
    return (int8_t)nc_requantize_onto(sum, multiplier, residual * 256, op->residual_multiplier, op->residual_constant);
}

/* kind and rows are constants. `op` is a copy in registers or on the stack: a store through y cannot change it. */
NC_INLINE void block(const nc_linear_t op, int kind, uint32_t rows, const uint32_t *x, uint32_t pairs, uint32_t first, int8_t *y)
{
    const uint32_t *w = op.weights;
    const uint32_t stride = op.y_stride;
    if (kind == TO_KEYS)
        y += first / 2 * stride + first % 2;
    else
        y += kind == TO_VALUES ? first * 2 : first * stride;
    for (uint32_t left = op.outputs; left > 0; left -= 2) {
        int32_t y8[8];
        w = nc_linear_rows(rows, y8, x, w, pairs, op.zero_point);
        if (left == 1) {
            for (uint32_t r = 0; r < rows; r++)
                put(&op, kind, y8 + 2 * r, r, 0, y);
            break;
        }
        int8_t *to = y;
        for (uint32_t r = 0; r < rows; r++)
            if (kind == TO_KEYS || kind == TO_VALUES)
                put(&op, kind, y8 + 2 * r, r, 1, y);
            else {
                put(&op, kind, y8 + 2 * r, 0, 1, to);
                to = NC_OPAQUE(to + stride);
            }
        if (kind == TO_KEYS)
            y += left % 4 == op.outputs % 4 ? 2 : 6;
        else
            y += kind == TO_VALUES ? stride : 2;
    }
}

NC_INLINE void block_onto(const nc_linear_t op, uint32_t rows, const uint32_t *x, uint32_t pairs, uint32_t first, const int8_t *residual,
                          int8_t *y)
{
    const uint32_t *w = op.weights;
    y += first * op.y_stride, residual += first * op.y_stride;
    for (uint32_t left = op.outputs; left > 0; left -= 2, residual += 2, y += 2) {
        int32_t sums[8];
        for (uint32_t r = 0; r < rows; r++)
            sums[2 * r] = nc_signed(w[0]), sums[2 * r + 1] = nc_signed(w[1]);
        w = nc_dot(rows, sums, x, w + 2, pairs);
        const int32_t m0 = nc_signed(w[0]), m1 = nc_signed(w[1]);
        const int8_t *from = residual;
        int8_t *to = y;
        w += 2;
        if (left == 1) {
            for (uint32_t r = 0; r < rows; r++)
                to[r * op.y_stride] = onto(&op, sums[2 * r], m0, from[r * op.y_stride]);
            break;
        }
        for (uint32_t r = 0; r < rows; r++) {
            to[0] = onto(&op, sums[2 * r], m0, from[0]);
            to[1] = onto(&op, sums[2 * r + 1], m1, from[1]);
            from = NC_OPAQUE(from + op.y_stride);
            to = NC_OPAQUE(to + op.y_stride);
        }
    }
}

NC_INLINE void block_of(const nc_linear_t *op, uint32_t rows, const uint32_t *x, uint32_t pairs, uint32_t first, const int8_t *residual,
                        int8_t *y)
{
    if (op->residual_multiplier != 0)
        block_onto(*op, rows, x, pairs, first, residual, y);
    else if (op->table != NULL)
        block(*op, THROUGH_TABLE, rows, x, pairs, first, y);
    else if (op->layout == NC_ROWS)
        block(*op, TO_ROWS, rows, x, pairs, first, y);
    else if (op->layout == NC_KEYS)
        block(*op, TO_KEYS, rows, x, pairs, first, y);
    else
        block(*op, TO_VALUES, rows, x, pairs, first, y);
}

NC_OPERATOR void nc_linear_block(const nc_linear_t *op, uint32_t rows, const uint32_t *x, uint32_t pairs, uint32_t first,
                                 const int8_t *residual, int8_t *y)
{
    NC_WITH_ROWS(rows, block_of(op, ROWS, x, pairs, first, residual, y));
}

NC_OPERATOR void nc_linear(const nc_linear_t *op, const int8_t *x, uint32_t tokens, const int8_t *residual, int8_t *y, void *scratch)
{
    uint32_t rows, pairs = 2 * nc_quads(op->inputs), *words = scratch;
    for (uint32_t t = 0; t < tokens; t += rows) {
        rows = nc_block_of(tokens - t);
        for (uint32_t r = 0; r < rows; r++, x += op->x_stride)
            NC_WITH_ROWS(rows, nc_expand_row(ROWS, words + r, x, op->inputs));
        nc_linear_block(op, rows, words, pairs, t, residual, y);
    }
}

/* The first factor of a block of rows: the words of the second factor's input. */
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
        for (uint32_t r = 0; r < rows; r++)
            mid[r] = nc_narrow2(sums[2 * r], sums[2 * r + 1], m0, m1, 13);
    }
}

NC_OPERATOR void nc_low_rank(const nc_low_rank_t *op, const int8_t *x, uint32_t tokens, const int8_t *residual, int8_t *y, void *scratch)
{
    const nc_linear_t *first = &op->first, *second = &op->second;
    uint32_t rows, pairs = (second->inputs + 1) / 2, *words = scratch, *mid = words + 8 * nc_quads(first->inputs);
    for (uint32_t t = 0; t < tokens; t += rows) {
        rows = nc_block_of(tokens - t);
        for (uint32_t r = 0; r < rows; r++, x += first->x_stride)
            NC_WITH_ROWS(rows, nc_expand_row(ROWS, words + r, x, first->inputs));
        NC_WITH_ROWS(rows, narrow(first, ROWS, words, mid));
        nc_linear_block(second, rows, mid, pairs, t, residual, y);
    }
}

NC_OPERATOR void nc_head(const nc_linear_t *op, const int8_t *x, int32_t *y, void *scratch)
{
    const uint32_t *w = op->weights;
    nc_expand_row(1, scratch, x, op->inputs);
    for (uint32_t o = 0; o < op->outputs; o += 2) {
        int32_t sums[2] = {nc_signed(w[0]), nc_signed(w[1])};
        w = nc_dot(1, sums, scratch, w + 2, 2 * nc_quads(op->inputs));
        y[o] = nc_mul_high(sums[0], nc_signed(w[0]));
        if (o + 1 < op->outputs)
            y[o + 1] = nc_mul_high(sums[1], nc_signed(w[1]));
        w += 2;
    }
}
