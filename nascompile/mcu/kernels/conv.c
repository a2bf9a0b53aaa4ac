/* Convolutions over [height][width][channels]. */
#include "dot.h"
#include "linear.h"

NC_INLINE void copy(int8_t *to, const int8_t *from, uint32_t bytes)
{
    for (; bytes >= 4; bytes -= 4, to += 4, from += 4)
        nc_store4(to, nc_load4(from));
    for (; bytes > 0; bytes--)
        *to++ = *from++;
}

/* The window whose corner is (top, left) of the padded image, as one row of bytes. */
NC_INLINE void gather(const nc_conv_t *op, const int8_t *x, uint32_t top, uint32_t left, int8_t *row)
{
    const uint32_t channels = op->channels, run = op->kernel * channels;
    const uint32_t first = left < op->pad ? op->pad - left : 0, room = op->width + op->pad - left;
    const uint32_t last = room < op->kernel ? room : op->kernel;
    for (uint32_t i = 0; i < op->kernel; i++, row += run) {
        const uint32_t at = top + i - op->pad; /* wraps above the image: then >= height too */
        if (at >= op->height) {
            memset(row, op->x_zero, run);
            continue;
        }
        if (first > 0)
            memset(row, op->x_zero, first * channels);
        if (last < op->kernel)
            memset(row + last * channels, op->x_zero, (op->kernel - last) * channels);
        copy(row + first * channels, x + (at * op->width + left + first - op->pad) * channels, (last - first) * channels);
    }
}

/* One window to every rows-th word: straight from the image where it lies inside and its rows are whole words, else by way of `row`. */
NC_INLINE void expand_window(const nc_conv_t *op, uint32_t rows, const int8_t *x, uint32_t top, uint32_t left, int8_t *row, uint32_t *words)
{
    const uint32_t run = op->kernel * op->channels, up = top - op->pad, across = left - op->pad; /* wrap on the border */
    if (run % 4 == 0 && up < op->height && across < op->width && up + op->kernel <= op->height && across + op->kernel <= op->width) {
        const int8_t *from = x + (up * op->width + across) * op->channels;
        for (uint32_t i = op->kernel; i > 0; i--, from += op->width * op->channels, words += run / 2 * rows)
            nc_expand_row(rows, words, from, run);
        return;
    }
    gather(op, x, top, left, row);
    nc_expand_row(rows, words, row, op->linear.inputs);
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
            NC_WITH_ROWS(rows, expand_window(op, ROWS, x, top, left, row, words + r));
            left += op->stride;
            if (left == out_width * op->stride)
                left = 0, top += op->stride;
        }
        nc_linear_block(&op->linear, rows, words, 2 * nc_quads(inputs), t, residual, y);
    }
}

/* `lanes` bytes (1 to 4, behind them zeros) as halves less x_zero: bytes 0 and 2, bytes 1 and 3. */
NC_INLINE void lift(const int8_t *from, uint32_t lanes, uint32_t zeros, uint32_t *to)
{
    uint32_t word = 0;
    if (lanes == 4)
        word = nc_load4(from);
    else
        memcpy(&word, from, lanes);
    to[0] = nc_sub16(nc_even_bytes(word), zeros);
    to[1] = nc_sub16(nc_odd_bytes(word), zeros);
}

/* Row `row` of the padded image, four channels: two words a pixel. */
NC_INLINE void lift_row(const nc_depthwise_t *op, const int8_t *x, uint32_t row, uint32_t lanes, uint32_t *strip)
{
    const uint32_t at = row - op->pad, zeros = ((uint32_t)op->x_zero & 0xFFFFU) * 0x00010001U; /* at wraps above the image */
    if (at >= op->height) {
        memset(strip, 0, 8 * (op->width + 2 * op->pad));
        return;
    }
    memset(strip, 0, 8 * op->pad);
    strip += 2 * op->pad;
    x += at * op->width * op->channels;
    for (uint32_t j = op->width; j > 0; j--, x += op->channels, strip += 2)
        lift(x, lanes, zeros, strip);
    memset(strip, 0, 8 * op->pad);
}

/* Three neighbouring pixels of four channels by their taps; returns the tap behind the last. */
NC_INLINE const uint32_t *three_taps(const uint32_t *pixel, const uint32_t *tap, int32_t *sums)
{
#if NC_ON_TARGET
#define NC_TAP                                                                                                                  \
    "ldrd %[p], %[q], [%[pixel]], #8\n\t"                                                                                       \
    "ldrd %[u], %[v], [%[tap]], #8\n\t"                                                                                         \
    "smlabb %[s0], %[p], %[u], %[s0]\n\t"                                                                                       \
    "smlabb %[s1], %[q], %[v], %[s1]\n\t"                                                                                       \
    "smlatt %[s2], %[p], %[u], %[s2]\n\t"                                                                                       \
    "smlatt %[s3], %[q], %[v], %[s3]\n\t"
    int32_t s0 = sums[0], s1 = sums[1], s2 = sums[2], s3 = sums[3];
    uint32_t p, q, u, v;
    __asm__ volatile(NC_TAP NC_TAP NC_TAP
                     : [s0] "+&r"(s0), [s1] "+&r"(s1), [s2] "+&r"(s2), [s3] "+&r"(s3), [pixel] "+&r"(pixel), [tap] "+&r"(tap),
                       [p] "=&r"(p), [q] "=&r"(q), [u] "=&r"(u), [v] "=&r"(v)
                     :
                     : "memory");
    sums[0] = s0, sums[1] = s1, sums[2] = s2, sums[3] = s3;
    return tap;
#else
    for (uint32_t word = 0; word < 6; word++) { /* words: channels 0 and 2, channels 1 and 3 */
        sums[word % 2] = nc_signed((uint32_t)sums[word % 2] + (uint32_t)(nc_low(pixel[word]) * nc_low(tap[word])));
        sums[2 + word % 2] = nc_signed((uint32_t)sums[2 + word % 2] + (uint32_t)(nc_high(pixel[word]) * nc_high(tap[word])));
    }
    return tap + 6;
#endif
}

NC_OPERATOR void nc_depthwise(const nc_depthwise_t *op, const int8_t *x, int8_t *y, void *scratch)
{
    const uint32_t out_height = NC_CONV_OUT(op->height, 3, op->stride, op->pad), out_width = NC_CONV_OUT(op->width, 3, op->stride, op->pad);
    const uint32_t pitch = 2 * (op->width + 2 * op->pad), channels = op->channels, stride = op->stride;
    const int32_t zero_point = op->zero_point;
    const int8_t *table = op->table;
    const uint32_t *w = op->weights;
    uint32_t taps[18], *strip = scratch;
    for (uint32_t c = 0; c < channels; c += 4, w += 17) {
        const uint32_t lanes = channels - c < 4 ? channels - c : 4;
        for (uint32_t tap = 0; tap < 9; tap++)
            lift((const int8_t *)(w + 4 + tap), 4, 0, taps + 2 * tap);
        uint32_t lifted = 0; /* rows of the padded image; row r is in the strip's row r % 3 */
        int8_t *to = y + c;
        for (uint32_t i = 0; i < out_height; i++) {
            const uint32_t top = i * stride;
            const uint32_t *rows[3];
            for (lifted = lifted > top ? lifted : top; lifted < top + 3; lifted++)
                lift_row(op, x + c, lifted, lanes, strip + lifted % 3 * pitch);
            for (uint32_t r = 0; r < 3; r++)
                rows[r] = strip + (top + r) % 3 * pitch;
            for (uint32_t j = 0; j < out_width; j++, to += channels) {
                int32_t sums[4] = {nc_signed(w[0]), nc_signed(w[1]), nc_signed(w[2]), nc_signed(w[3])};
                const uint32_t *tap = taps;
                for (uint32_t r = 0; r < 3; r++)
                    tap = three_taps(rows[r] + 2 * j * stride, tap, sums);
                nc_requantize2(sums, nc_signed(w[13]), nc_signed(w[14]), zero_point);
                nc_requantize2(sums + 2, nc_signed(w[15]), nc_signed(w[16]), zero_point);
                if (table != NULL)
                    for (uint32_t lane = 0; lane < 4; lane++)
                        sums[lane] = table[(uint8_t)sums[lane]];
                if (lanes == 4)
                    for (uint32_t lane = 0; lane < 4; lane++)
                        to[lane] = (int8_t)sums[lane];
                else
                    for (uint32_t lane = 0; lane < lanes; lane++)
                        to[lane] = (int8_t)sums[lane];
            }
        }
    }
}
