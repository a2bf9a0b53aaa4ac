/* The DSP instructions the kernels use: one instruction each on Cortex-M4 and M7, the same integers in plain C anywhere else.
 * Nothing overflows a signed type or is read unaligned: the plain C is clean under UBSan. Right shifts of negative numbers are floors,
 * as in every compiler that has this target. */
#ifndef NC_PORT_H
#define NC_PORT_H

#include <stddef.h>
#include <stdint.h>

#if defined(__ARM_FEATURE_DSP) && defined(__thumb2__)
#define NC_ON_TARGET 1
#else
#define NC_ON_TARGET 0
#endif

#define NC_INLINE static inline __attribute__((always_inline, unused))
#define NC_OPERATOR __attribute__((noinline, noclone)) /* keeps an operator one symbol, so that it can be counted */

/* A value the compiler knows nothing of: keeps `next = last + step` a running sum where it would hold every multiple of step. */
#define NC_OPAQUE(value)                                                                                                        \
    __extension__({                                                                                                             \
        __typeof__(value) nc_value = (value);                                                                                   \
        __asm__("" : "+r"(nc_value));                                                                                           \
        nc_value;                                                                                                               \
    })

void *memcpy(void *restrict to, const void *restrict from, size_t bytes);
void *memset(void *to, int value, size_t bytes);

/* Four bytes from any address, the first in the low byte (little-endian hosts only, as the target is). */
NC_INLINE uint32_t nc_load4(const void *from)
{
    uint32_t word;
    __builtin_memcpy(&word, from, 4); /* one load, -ffreestanding or not */
    return word;
}

NC_INLINE void nc_store4(void *to, uint32_t word) { __builtin_memcpy(to, &word, 4); }

NC_INLINE int32_t nc_signed(uint32_t word) { return (int32_t)word; } /* modulo 2^32, in every compiler that has this target */
NC_INLINE int32_t nc_low(uint32_t word) { return (int32_t)(int16_t)(uint16_t)(word & 0xFFFFU); }
NC_INLINE int32_t nc_signed_byte(uint32_t word) { return (int32_t)(int8_t)(uint8_t)(word & 0xFFU); }
NC_INLINE int32_t nc_high(uint32_t word) { return (int32_t)(int16_t)(uint16_t)(word >> 16); }

#if NC_ON_TARGET

#define NC_ASM2(name, operands)                                                                                                 \
    NC_INLINE uint32_t nc_##name(uint32_t a, uint32_t b)                                                                        \
    {                                                                                                                           \
        uint32_t r;                                                                                                             \
        __asm__(operands : "=r"(r) : "r"(a), "r"(b));                                                                           \
        return r;                                                                                                               \
    }

/* halves of the result: low a, low b  |  high a, high b (both in this order, low half first) */
NC_ASM2(pack_low, "pkhbt %0, %1, %2, lsl #16")
NC_ASM2(pack_high, "pkhtb %0, %2, %1, asr #16")
/* a - b in each signed half, wrapping */
NC_ASM2(sub16, "ssub16 %0, %1, %2")

/* The larger signed half of each: SSUB16 sets the GE flags that SEL reads. */
NC_INLINE uint32_t nc_max16(uint32_t a, uint32_t b)
{
    uint32_t r;
    __asm__("ssub16 %0, %1, %2\n\tsel %0, %1, %2" : "=&r"(r) : "r"(a), "r"(b) : "cc");
    return r;
}

/* bytes 0 and 2, sign-extended to halves */
NC_INLINE uint32_t nc_even_bytes(uint32_t word)
{
    uint32_t r;
    __asm__("sxtb16 %0, %1" : "=r"(r) : "r"(word));
    return r;
}

/* bytes 1 and 3, sign-extended to halves */
NC_INLINE uint32_t nc_odd_bytes(uint32_t word)
{
    uint32_t r;
    __asm__("sxtb16 %0, %1, ror #8" : "=r"(r) : "r"(word));
    return r;
}

/* The larger signed byte of each. */
NC_INLINE uint32_t nc_max8(uint32_t a, uint32_t b)
{
    uint32_t r;
    __asm__("ssub8 %0, %1, %2\n\tsel %0, %1, %2" : "=&r"(r) : "r"(a), "r"(b) : "cc");
    return r;
}

/* each signed half clamped to [0, 1023] */
NC_INLINE uint32_t nc_clamp16_1023(uint32_t word)
{
    uint32_t r;
    __asm__("usat16 %0, #10, %1" : "=r"(r) : "r"(word));
    return r;
}

/* sum + low a * low b + high a * high b, modulo 2^32 */
NC_INLINE int32_t nc_dot2(uint32_t a, uint32_t b, int32_t sum)
{
    int32_t r;
    __asm__("smlad %0, %1, %2, %3" : "=r"(r) : "r"(a), "r"(b), "r"(sum));
    return r;
}

/* a * b + c, modulo 2^32: GCC would part the sum to share pieces of it, at an instruction each */
NC_INLINE int32_t nc_mul_add(int32_t a, int32_t b, int32_t c)
{
    int32_t r;
    __asm__("mla %0, %1, %2, %3" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}

/* (a * b + 2^31) >> 32: the product's high word, rounded half up */
NC_INLINE int32_t nc_mul_high(int32_t a, int32_t b)
{
    int32_t r;
    __asm__("smmulr %0, %1, %2" : "=r"(r) : "r"(a), "r"(b));
    return r;
}

/* c + ((a * b + 2^31) >> 32), modulo 2^32 */
NC_INLINE int32_t nc_mul_high_add(int32_t a, int32_t b, int32_t c)
{
    int32_t r;
    __asm__("smmlar %0, %1, %2, %3" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}

/* clamp(value >> shift, -2^(bits-1), 2^(bits-1) - 1), constants only */
#define nc_saturate(bits, value, shift)                                                                                         \
    __extension__({                                                                                                             \
        int32_t nc_r;                                                                                                           \
        __asm__("ssat %0, %1, %2, asr %3" : "=r"(nc_r) : "I"(bits), "r"(value), "I"(shift));                                    \
        nc_r;                                                                                                                   \
    })
#define nc_saturate8(value) __extension__({ int32_t nc_r; __asm__("ssat %0, #8, %1" : "=r"(nc_r) : "r"(value)); nc_r; })

/* The next three hold several instructions, and `volatile`, so that GCC does not spread them over a block until registers run out. */

/* sums[i] = clamp(zero_point + nc_mul_high(sums[i], m_i)) to 8 bits */
NC_INLINE void nc_requantize2(int32_t *sums, int32_t m0, int32_t m1, int32_t zero_point)
{
    int32_t even = sums[0], odd = sums[1];
    __asm__ volatile("smmlar %0, %0, %2, %4\n\tsmmlar %1, %1, %3, %4\n\tssat %0, #8, %0\n\tssat %1, #8, %1"
                     : "+&r"(even), "+&r"(odd)
                     : "r"(m0), "r"(m1), "r"(zero_point));
    sums[0] = even, sums[1] = odd;
}

/* clamp((sum * m + addend * n + constant) >> 32) to 8 bits */
NC_INLINE int32_t nc_requantize_onto(int32_t sum, int32_t m, int32_t addend, int32_t n, int64_t constant)
{
    int64_t r = constant;
    __asm__ volatile("smlal %Q0, %R0, %1, %2\n\tsmlal %Q0, %R0, %3, %4\n\tssat %R0, #8, %R0"
                     : "+&r"(r)
                     : "r"(sum), "r"(m), "r"(addend), "r"(n));
    return (int32_t)(r >> 32);
}

/* halves clamp(nc_mul_high(a, m0)), clamp(nc_mul_high(b, m1)) of `bits` bits, a constant */
#define nc_narrow2(a, b, m0, m1, bits)                                                                                          \
    __extension__({                                                                                                             \
        int32_t nc_a = (a), nc_b = (b);                                                                                         \
        __asm__ volatile("smmulr %0, %0, %2\n\tsmmulr %1, %1, %3\n\tssat %0, %4, %0\n\tssat %1, %4, %1\n\t"                        \
                         "pkhbt %0, %0, %1, lsl #16"                                                                            \
                         : "+&r"(nc_a), "+&r"(nc_b)                                                                             \
                         : "r"(m0), "r"(m1), "I"(bits));                                                                        \
        (uint32_t)nc_a;                                                                                                         \
    })

#else

NC_INLINE uint32_t nc_pack_low(uint32_t a, uint32_t b) { return (a & 0xFFFFU) | (b << 16); }
NC_INLINE uint32_t nc_pack_high(uint32_t a, uint32_t b) { return (a >> 16) | (b & 0xFFFF0000U); }
NC_INLINE uint32_t nc_pair(int32_t low, int32_t high) { return ((uint32_t)low & 0xFFFFU) | ((uint32_t)high << 16); }
NC_INLINE uint32_t nc_sub16(uint32_t a, uint32_t b) { return nc_pair(nc_low(a) - nc_low(b), nc_high(a) - nc_high(b)); }

NC_INLINE uint32_t nc_max16(uint32_t a, uint32_t b)
{
    return nc_pair(nc_low(a) >= nc_low(b) ? nc_low(a) : nc_low(b), nc_high(a) >= nc_high(b) ? nc_high(a) : nc_high(b));
}

NC_INLINE uint32_t nc_max8(uint32_t a, uint32_t b)
{
    uint32_t r = 0;
    for (uint32_t bit = 0; bit < 32; bit += 8)
        r |= (nc_signed_byte(a >> bit) >= nc_signed_byte(b >> bit) ? a : b) & UINT32_C(0xFF) << bit;
    return r;
}
NC_INLINE uint32_t nc_even_bytes(uint32_t word) { return nc_pair(nc_signed_byte(word), nc_signed_byte(word >> 16)); }
NC_INLINE uint32_t nc_odd_bytes(uint32_t word) { return nc_pair(nc_signed_byte(word >> 8), nc_signed_byte(word >> 24)); }

NC_INLINE int32_t nc_clamp(int64_t value, int32_t low, int32_t high)
{
    return value < low ? low : value > high ? high : (int32_t)value;
}

NC_INLINE uint32_t nc_clamp16_1023(uint32_t word) { return nc_pair(nc_clamp(nc_low(word), 0, 1023), nc_clamp(nc_high(word), 0, 1023)); }

NC_INLINE int32_t nc_dot2(uint32_t a, uint32_t b, int32_t sum)
{
    return nc_signed((uint32_t)sum + (uint32_t)(nc_low(a) * nc_low(b)) + (uint32_t)(nc_high(a) * nc_high(b)));
}

NC_INLINE int32_t nc_mul_add(int32_t a, int32_t b, int32_t c) { return nc_signed((uint32_t)a * (uint32_t)b + (uint32_t)c); }
NC_INLINE int32_t nc_mul_high(int32_t a, int32_t b) { return (int32_t)(((int64_t)a * b + (INT64_C(1) << 31)) >> 32); }
NC_INLINE int32_t nc_mul_high_add(int32_t a, int32_t b, int32_t c) { return nc_signed((uint32_t)nc_mul_high(a, b) + (uint32_t)c); }

NC_INLINE int32_t nc_saturate(uint32_t bits, int32_t value, uint32_t shift)
{
    int32_t top = (int32_t)(UINT32_C(1) << (bits - 1));
    return nc_clamp(value >> shift, -top, top - 1);
}
NC_INLINE int32_t nc_saturate8(int32_t value) { return nc_clamp(value, -128, 127); }

NC_INLINE void nc_requantize2(int32_t *sums, int32_t m0, int32_t m1, int32_t zero_point)
{
    sums[0] = nc_saturate8(nc_mul_high_add(sums[0], m0, zero_point));
    sums[1] = nc_saturate8(nc_mul_high_add(sums[1], m1, zero_point));
}

NC_INLINE int32_t nc_requantize_onto(int32_t sum, int32_t m, int32_t addend, int32_t n, int64_t constant)
{
    return nc_saturate8((int32_t)((constant + (int64_t)sum * m + (int64_t)addend * n) >> 32));
}

NC_INLINE uint32_t nc_narrow2(int32_t a, int32_t b, int32_t m0, int32_t m1, uint32_t bits)
{
    return nc_pair(nc_saturate(bits, nc_mul_high(a, m0), 0), nc_saturate(bits, nc_mul_high(b, m1), 0));
}

#endif

/* zeros above the highest one; word > 0 */
NC_INLINE uint32_t nc_leading_zeros(uint32_t word) { return (uint32_t)__builtin_clz(word); }

#endif
