/* Convolutions over [height][width][channels]. */
#include "dot.h"
#include "linear.h"

/* The window whose corner is (top, left) of the padded image, as one row of bytes. */
NC_INLINE void gather(const nc_conv_t *op, const int8_t *x, uint32_t top, uint32_t left, int8_t *row)
{
    const uint32_t run = op->kernel * op->channels;
    for (uint32_t i = 0; i < op->kernel; i++, row += run) {
        uint32_t at = top + i - op->pad; /* wraps above the image: then >= height too */
        if (at >= op->height) {
            memset(row, op->x_zero, run);
            continue;
        }
        uint32_t first = left < op->pad ? op->pad - left : 0, last = op->width + op->pad - left;
        last = last < op->kernel ? last : op->kernel;
        if (first > 0)
            memset(row, op->x_zero, first * op->channels);
        if (last < op->kernel)
            memset(row + last * op->channels, op->x_zero, (op->kernel - last) * op->channels);
        memcpy(row + first * op->channels, x + (at * op->width + left + first - op->pad) * op->channels, (last - first) * op->channels);
    }
}

NC_OPERATOR void nc_conv(const nc_conv_t *op, const int8_t *x, const int8_t *residual, int8_t *y, void *scratch)
{
    const uint32_t out_width = NC_CONV_OUT(op->width, op->kernel, op->stride, op->pad);
    const uint32_t count = out_width * NC_CONV_OUT(op->height, op->kernel, op->stride, op->pad), inputs = op->linear.inputs;
    uint32_t rows, top = 0, left = 0, *words = scratch;
    int8_t *row = (int8_t *)(words + 8 * nc_quads(inputs));
    for (uint32_t t = 0; t < count; t += rows) {
        rows = nc_block_of(count - t);
        for (uint32_t r = 0; r < rows; r++) {
            gather(op, x, top, left, row);
            if (rows == 4)
                nc_expand_row(4, words + r, row, inputs);
            else
                nc_expand_row(1, words, row, inputs);
            left += op->stride;
            if (left == out_width * op->stride)
                left = 0, top += op->stride;
        }
        nc_linear_block(&op->linear, rows, words, 2 * nc_quads(inputs), t, residual, y);
    }
}

/* Four channels of a window (`lanes` of them real) to sums. */
NC_INLINE void depthwise_window(const nc_depthwise_t *op, const int8_t *x, uint32_t top, uint32_t left, uint32_t lanes,
                                const uint32_t *taps, int32_t *sums)
{
    const uint32_t zeros = ((uint32_t)op->x_zero & 0xFFFFU) * 0x00010001U;
    for (uint32_t i = 0; i < 3; i++)
        for (uint32_t j = 0; j < 3; j++, taps++) {
            uint32_t row = top + i - op->pad, column = left + j - op->pad, word = 0;
            if (row >= op->height || column >= op->width)
                continue;
            const int8_t *from = x + (row * op->width + column) * op->channels;
            if (lanes == 4)
                word = nc_load4(from);
            else
                memcpy(&word, from, lanes);
            uint32_t even = nc_sub16(nc_even_bytes(word), zeros), odd = nc_sub16(nc_odd_bytes(word), zeros);
            uint32_t w_even = nc_even_bytes(*taps), w_odd = nc_odd_bytes(*taps);
            sums[0] += nc_low(even) * nc_low(w_even);
            sums[1] += nc_low(odd) * nc_low(w_odd);
            sums[2] += nc_high(even) * nc_high(w_even);
            sums[3] += nc_high(odd) * nc_high(w_odd);
        }
}

NC_OPERATOR void nc_depthwise(const nc_depthwise_t *op, const int8_t *x, int8_t *y)
{
    const uint32_t out_height = NC_CONV_OUT(op->height, 3, op->stride, op->pad), out_width = NC_CONV_OUT(op->width, 3, op->stride, op->pad);
    const uint32_t *w = op->weights;
    for (uint32_t c = 0; c < op->channels; c += 4, w += 17) {
        const uint32_t lanes = op->channels - c < 4 ? op->channels - c : 4;
        int8_t *to = y + c;
        for (uint32_t i = 0; i < out_height; i++)
            for (uint32_t j = 0; j < out_width; j++, to += op->channels) {
                int32_t sums[4] = {nc_signed(w[0]), nc_signed(w[1]), nc_signed(w[2]), nc_signed(w[3])};
                depthwise_window(op, x + c, i * op->stride, j * op->stride, lanes, w + 4, sums);
                for (uint32_t lane = 0; lane < lanes; lane++) {
                    int32_t out = nc_saturate8(nc_mul_high_add(sums[lane], nc_signed(w[13 + lane]), op->zero_point));
                    to[lane] = op->table != NULL ? op->table[(uint8_t)out] : (int8_t)out;
                }
            }
    }
}
