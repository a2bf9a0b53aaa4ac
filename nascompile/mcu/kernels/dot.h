/* The inner loop of everything that multiplies matrices: rows of int16 against packed pairs of int8 outputs.
 *
 * x: for each two inputs k, k', words (row 0: x_k, x_k'), (row 1), ... of 4 rows or 1.
 * w: for each two inputs, bytes w[o][k], w[o+1][k], w[o][k'], w[o+1][k'].
 * sums[2 * row + output] grow by the products. Returns the word behind the last weight read.
 *
 * Four rows and two outputs are what 14 registers hold: 8 sums, 2 pointers, 2 words of x, 2 of w. A pair of inputs costs 13
 * instructions for 16 products, and a weight is read once for four rows. */
#ifndef NC_DOT_H
#define NC_DOT_H

#include "port.h"

#if NC_ON_TARGET

#define NC_PAIR_4X2                                                                                                             \
    "ldr %[u], [%[w]], #4\n\t"                                                                                                  \
    "ldrd %[p], %[q], [%[x]], #8\n\t"                                                                                           \
    "sxtb16 %[v], %[u]\n\t"                                                                                                     \
    "sxtb16 %[u], %[u], ror #8\n\t"                                                                                             \
    "smlad %[s0], %[p], %[v], %[s0]\n\t"                                                                                        \
    "smlad %[s1], %[p], %[u], %[s1]\n\t"                                                                                        \
    "smlad %[s2], %[q], %[v], %[s2]\n\t"                                                                                        \
    "smlad %[s3], %[q], %[u], %[s3]\n\t"                                                                                        \
    "ldrd %[p], %[q], [%[x]], #8\n\t"                                                                                           \
    "smlad %[s4], %[p], %[v], %[s4]\n\t"                                                                                        \
    "smlad %[s5], %[p], %[u], %[s5]\n\t"                                                                                        \
    "smlad %[s6], %[q], %[v], %[s6]\n\t"                                                                                        \
    "smlad %[s7], %[q], %[u], %[s7]\n\t"

/* Two pairs of one row. */
#define NC_QUAD_1X2                                                                                                             \
    "ldrd %[u], %[v], [%[w]], #8\n\t"                                                                                           \
    "ldrd %[p], %[q], [%[x]], #8\n\t"                                                                                           \
    "sxtb16 %[t], %[u]\n\t"                                                                                                     \
    "sxtb16 %[u], %[u], ror #8\n\t"                                                                                             \
    "smlad %[s0], %[p], %[t], %[s0]\n\t"                                                                                        \
    "smlad %[s1], %[p], %[u], %[s1]\n\t"                                                                                        \
    "sxtb16 %[t], %[v]\n\t"                                                                                                     \
    "sxtb16 %[v], %[v], ror #8\n\t"                                                                                             \
    "smlad %[s0], %[q], %[t], %[s0]\n\t"                                                                                        \
    "smlad %[s1], %[q], %[v], %[s1]\n\t"

/* No general register is left for the end of the loop: it waits in a floating-point one. */
#define NC_LOOP_4X2(body, end)                                                                                                  \
    __asm__ volatile("1:\n\t" body "vmov %[p], %[last]\n\t"                                                                     \
                     "cmp %[w], %[p]\n\t"                                                                                       \
                     "bne 1b"                                                                                                   \
                     : [s0] "+r"(s0), [s1] "+r"(s1), [s2] "+r"(s2), [s3] "+r"(s3), [s4] "+r"(s4), [s5] "+r"(s5),                \
                       [s6] "+r"(s6), [s7] "+r"(s7), [x] "+r"(x), [w] "+r"(w), [p] "=&r"(p), [q] "=&r"(q), [u] "=&r"(u),        \
                       [v] "=&r"(v)                                                                                             \
                     : [last] "t"(end)                                                                                          \
                     : "cc", "memory")

/* Every general register has its name here: GCC's allocator does not always find the one way to fill them all. */
NC_INLINE const uint32_t *nc_dot_4x2(int32_t *sums, const uint32_t *words, const uint32_t *weights, uint32_t pairs)
{
    const uint32_t *eights = weights + (pairs & ~7U), *end = weights + pairs;
    register int32_t s0 __asm__("r0") = sums[0], s1 __asm__("r1") = sums[1], s2 __asm__("r2") = sums[2], s3 __asm__("r3") = sums[3];
    register int32_t s4 __asm__("r4") = sums[4], s5 __asm__("r5") = sums[5], s6 __asm__("r6") = sums[6], s7 __asm__("r7") = sums[7];
    register const uint32_t *x __asm__("r8") = words, *w __asm__("r9") = weights;
    register uint32_t p __asm__("r10"), q __asm__("r11"), u __asm__("r12"), v __asm__("lr");
    if (weights != eights)
        NC_LOOP_4X2(NC_PAIR_4X2 NC_PAIR_4X2 NC_PAIR_4X2 NC_PAIR_4X2 NC_PAIR_4X2 NC_PAIR_4X2 NC_PAIR_4X2 NC_PAIR_4X2, eights);
    if (w != end)
        NC_LOOP_4X2(NC_PAIR_4X2, end);
    sums[0] = s0, sums[1] = s1, sums[2] = s2, sums[3] = s3, sums[4] = s4, sums[5] = s5, sums[6] = s6, sums[7] = s7;
    return w;
}

#define NC_FINISH(even, odd)                                                                                                    \
    "smmlar %[s" #even "], %[s" #even "], %[p], %[u]\n\t"                                                                       \
    "smmlar %[s" #odd "], %[s" #odd "], %[q], %[u]\n\t"                                                                         \
    "ssat %[s" #even "], #8, %[s" #even "]\n\t"                                                                                 \
    "ssat %[s" #odd "], #8, %[s" #odd "]\n\t"

/* The same between a pair of outputs' biases and multipliers, requantized: y[2 * row + output]. */
NC_INLINE const uint32_t *nc_linear_4x2(int32_t *y, const uint32_t *words, const uint32_t *weights, uint32_t pairs, int32_t zero_point)
{
    const uint32_t *start = weights + 2, *eights = start + (pairs & ~7U), *end = start + pairs;
    register int32_t s0 __asm__("r0") = nc_signed(weights[0]), s1 __asm__("r1") = nc_signed(weights[1]);
    register int32_t s2 __asm__("r2") = s0, s3 __asm__("r3") = s1, s4 __asm__("r4") = s0, s5 __asm__("r5") = s1;
    register int32_t s6 __asm__("r6") = s0, s7 __asm__("r7") = s1;
    register const uint32_t *x __asm__("r8") = words, *w __asm__("r9") = start;
    register uint32_t p __asm__("r10"), q __asm__("r11"), u __asm__("r12"), v __asm__("lr");
    if (start != eights)
        NC_LOOP_4X2(NC_PAIR_4X2 NC_PAIR_4X2 NC_PAIR_4X2 NC_PAIR_4X2 NC_PAIR_4X2 NC_PAIR_4X2 NC_PAIR_4X2 NC_PAIR_4X2, eights);
    if (w != end)
        NC_LOOP_4X2(NC_PAIR_4X2, end);
    u = (uint32_t)zero_point;
    __asm__ volatile("ldrd %[p], %[q], [%[w]], #8\n\t" NC_FINISH(0, 1) NC_FINISH(2, 3) NC_FINISH(4, 5) NC_FINISH(6, 7)
                     : [s0] "+r"(s0), [s1] "+r"(s1), [s2] "+r"(s2), [s3] "+r"(s3), [s4] "+r"(s4), [s5] "+r"(s5), [s6] "+r"(s6),
                       [s7] "+r"(s7), [w] "+r"(w), [p] "=&r"(p), [q] "=&r"(q)
                     : [u] "r"(u)
                     : "memory");
    y[0] = s0, y[1] = s1, y[2] = s2, y[3] = s3, y[4] = s4, y[5] = s5, y[6] = s6, y[7] = s7;
    return w;
}

#else

NC_INLINE const uint32_t *nc_linear_4x2(int32_t *y, const uint32_t *x, const uint32_t *w, uint32_t pairs, int32_t zero_point)
{
    for (uint32_t i = 0; i < 8; i++) {
        const uint32_t *weights = w + 2;
        y[i] = nc_signed(w[i % 2]);
        for (uint32_t p = 0; p < pairs; p++, weights++)
            y[i] = nc_dot2(x[4 * p + i / 2], i % 2 != 0 ? nc_odd_bytes(*weights) : nc_even_bytes(*weights), y[i]);
        y[i] = nc_saturate8(nc_mul_high_add(y[i], nc_signed(weights[i % 2]), zero_point));
    }
    return w + pairs + 4;
}

NC_INLINE const uint32_t *nc_dot_4x2(int32_t *sums, const uint32_t *x, const uint32_t *w, uint32_t pairs)
{
    for (; pairs > 0; pairs--, w++)
        for (uint32_t row = 0; row < 4; row++, x++) {
            sums[2 * row] = nc_dot2(*x, nc_even_bytes(*w), sums[2 * row]);
            sums[2 * row + 1] = nc_dot2(*x, nc_odd_bytes(*w), sums[2 * row + 1]);
        }
    return w;
}

#endif

/* One row. */
NC_INLINE const uint32_t *nc_dot_1x2(int32_t *sums, const uint32_t *x, const uint32_t *w, uint32_t pairs)
{
    int32_t even = sums[0], odd = sums[1];
#if NC_ON_TARGET
    for (const uint32_t *end = w + (pairs & ~3U); w != end;) {
        uint32_t p, q, t, u, v;
        __asm__ volatile(NC_QUAD_1X2 NC_QUAD_1X2
                         : [s0] "+&r"(even), [s1] "+&r"(odd), [x] "+&r"(x), [w] "+&r"(w), [p] "=&r"(p), [q] "=&r"(q), [t] "=&r"(t),
                           [u] "=&r"(u), [v] "=&r"(v)
                         :
                         : "memory");
    }
    pairs &= 3U;
#endif
    for (const uint32_t *end = w + pairs; w != end; w++, x++) {
        even = nc_dot2(*x, nc_even_bytes(*w), even);
        odd = nc_dot2(*x, nc_odd_bytes(*w), odd);
    }
    sums[0] = even, sums[1] = odd;
    return w;
}

/* rows: 4 or 1, a constant */
NC_INLINE const uint32_t *nc_dot(uint32_t rows, int32_t *sums, const uint32_t *x, const uint32_t *w, uint32_t pairs)
{
    return rows == 4 ? nc_dot_4x2(sums, x, w, pairs) : nc_dot_1x2(sums, x, w, pairs);
}

NC_INLINE const uint32_t *nc_linear_rows(uint32_t rows, int32_t *y, const uint32_t *x, const uint32_t *w, uint32_t pairs, int32_t zero_point)
{
    if (rows == 4)
        return nc_linear_4x2(y, x, w, pairs, zero_point);
    y[0] = nc_signed(w[0]), y[1] = nc_signed(w[1]);
    w = nc_dot_1x2(y, x, w + 2, pairs);
    nc_requantize2(y, nc_signed(w[0]), nc_signed(w[1]), zero_point);
    return w + 2;
}

/* One row of int8 to every rows-th word from x: inputs (k, k+2), (k+1, k+3) of each four, zeros behind the last. */
NC_INLINE void nc_expand_row(uint32_t rows, uint32_t *x, const int8_t *row, uint32_t inputs)
{
    for (uint32_t quads = inputs / 4; quads > 0; quads--, row += 4, x += 2 * rows) {
        uint32_t word = nc_load4(row);
        x[0] = nc_even_bytes(word);
        x[rows] = nc_odd_bytes(word);
    }
    if (inputs % 4 != 0) {
        uint32_t word = 0;
        memcpy(&word, row, inputs % 4);
        x[0] = nc_even_bytes(word);
        x[rows] = nc_odd_bytes(word);
    }
}

NC_INLINE uint32_t nc_quads(uint32_t inputs) { return (inputs + 3) / 4; }

/* How many rows to take at once while so many are left. */
NC_INLINE uint32_t nc_block_of(uint32_t rows_left) { return rows_left >= 4 ? 4 : 1; }

/* Runs `call` with the constant ROWS that `rows` is. */
#define NC_WITH_ROWS(rows, call)                                                                                                \
    do {                                                                                                                        \
        if ((rows) == 4) {                                                                                                      \
            enum { ROWS = 4 };                                                                                                  \
            call;                                                                                                               \
        } else {                                                                                                                \
            enum { ROWS = 1 };                                                                                                  \
            call;                                                                                                               \
        }                                                                                                                       \
    } while (0)

#endif
