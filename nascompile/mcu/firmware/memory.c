/* The part of the C library that compilers call by themselves. */
#include <stddef.h>
#include <stdint.h>

void *memcpy(void *restrict to, const void *restrict from, size_t bytes);
void *memset(void *to, int value, size_t bytes);
typedef uint32_t __attribute__((may_alias)) word;

void *memcpy(void *restrict to, const void *restrict from, size_t bytes)
{
    uint8_t *d = to;
    const uint8_t *s = from;
    if ((((uintptr_t)d | (uintptr_t)s) & 3) == 0)
        for (; bytes >= 4; bytes -= 4, d += 4, s += 4) *(word *)d = *(const word *)s;
    while (bytes--) *d++ = *s++;
    return to;
}

void *memset(void *to, int value, size_t bytes)
{
    uint8_t *d = to;
    while (bytes--) *d++ = (uint8_t)value;
    return to;
}
