/* QEMU's mps2-an500 (M7) or mps2-an386 (M4): files cases.bin and results.bin by semihosting; `-icount shift=6` and the CMSDK timer
 * count instructions: 25 MHz, 64 ns an instruction, 1.6 ticks each. */
#include "platform.h"

extern uint32_t stack_top, heap_start, bss_start, bss_end;
int main(void);
void reset(void);
void fault(void);

static int semihost(int operation, const void *block)
{
    register int r0 __asm__("r0") = operation;
    register const void *r1 __asm__("r1") = block;
    __asm__ volatile("bkpt 0xAB" : "+r"(r0) : "r"(r1) : "memory");
    return r0;
}

static void leave(uint32_t code)
{
    uint32_t block[2] = {0x20026, code};
    semihost(0x20, block);
    for (;;) {
    }
}

void fault(void) { leave(99); }

__attribute__((section(".vectors"), used)) static void (*const vectors[16])(void) = {(void (*)(void))(uintptr_t)&stack_top, reset, fault,
                                                                                     fault, fault, fault, fault};

static volatile uint32_t *const timer = (volatile uint32_t *)0x40000000;

void reset(void)
{
    *(volatile uint32_t *)0xE000ED88 |= 0xFU << 20; /* floating-point registers on */
    __asm__ volatile("dsb\n\tisb");
    memset(&bss_start, 0, (size_t)((uintptr_t)&bss_end - (uintptr_t)&bss_start));
    timer[2] = 0xFFFFFFFF, timer[1] = 0xFFFFFFFF, timer[0] = 1;
    leave((uint32_t)main());
}

uint32_t platform_ticks(void) { return ~timer[1]; }
uint32_t platform_instructions(uint32_t ticks) { return (uint32_t)((uint64_t)ticks * 5 / 8); }

static uint32_t handles[2];
static uint32_t open_file(const char *name, uint32_t length, uint32_t mode)
{
    uint32_t block[3] = {(uint32_t)(uintptr_t)name, mode, length};
    int handle = semihost(1, block);
    if (handle < 0)
        leave(4);
    return (uint32_t)handle;
}

void platform_open(void)
{
    handles[0] = open_file("cases.bin", 9, 1);
    handles[1] = open_file("results.bin", 11, 5);
}

void platform_close(void)
{
    for (int i = 0; i < 2; i++)
        semihost(2, handles + i);
}

static void transfer(int operation, uint32_t handle, const void *at, uint32_t bytes)
{
    uint32_t block[3] = {handle, (uint32_t)(uintptr_t)at, bytes};
    if (bytes > 0 && semihost(operation, block) != 0)
        leave(5);
}

void platform_read(void *to, uint32_t bytes) { transfer(6, handles[0], to, bytes); }
void platform_write(const void *from, uint32_t bytes) { transfer(5, handles[1], from, bytes); }

/* A stack of blocks: freed in any order, empty again after each case. */
static uint32_t *next, live;
void *platform_memory(uint32_t bytes)
{
    if (live++ == 0)
        next = &heap_start;
    void *block = next;
    next += (bytes + 7) / 8 * 2;
    if ((uintptr_t)next > 0x20380000)
        leave(6);
    return block;
}

void platform_free(void *block)
{
    if (block != NULL)
        live--;
}

void *memcpy(void *restrict to, const void *restrict from, size_t bytes)
{
    uint8_t *t = to;
    const uint8_t *f = from;
    while (bytes-- > 0)
        *t++ = *f++;
    return to;
}

void *memset(void *to, int value, size_t bytes)
{
    for (uint8_t *t = to; bytes > 0; bytes--)
        *t++ = (uint8_t)value;
    return to;
}
