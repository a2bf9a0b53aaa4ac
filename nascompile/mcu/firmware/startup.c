/* From reset to main: memory, floating point unit, a guard around the RAM, and the colour that shows how deep the stack went. */
#include "firmware.h"
#include "io.h"
#include "memory_map.h"

#define STACK_COLOUR 0xDEADBEEF

extern uint32_t _data_load, _data_start, _data_end, _bss_start, _bss_end, _stack_start, _stack_end;
int main(int arguments, char **argument);
void Reset_Handler(void);

static _Noreturn void __attribute__((used)) give_up(void) { io_stop(99); }

/* On a fresh stack: the fault may be that the old one has left the RAM. */
static void __attribute__((naked)) fault(void)
{
    __asm volatile("ldr sp, =_stack_end\n b give_up\n .ltorg");
}

__attribute__((section(".vectors"), used)) static void (*const vectors[16])(void) = {
    (void (*)(void))&_stack_end, Reset_Handler, fault, fault, fault, fault, fault,
};

#define CPACR (*(volatile uint32_t *)0xE000ED88)
#define MPU ((volatile uint32_t *)0xE000ED90)
enum { MPU_CONTROL = 1, MPU_NUMBER = 2, MPU_BASE = 3, MPU_SIZE = 4 };

/* The emulated board has more RAM than the device, and flash that can be written: what the device lacks must not be there. Later regions
   win over earlier ones.
   On the device itself nothing needs a guard, and there is none: beyond its RAM there is no memory. */
static void guard(void)
{
    for (uint32_t i = 0; i < 8; i++) {
        if (!guard_regions[i].log2_bytes) break;
        MPU[MPU_NUMBER] = i;
        MPU[MPU_BASE] = guard_regions[i].base;
        uint32_t no_code = guard_regions[i].access != 6;
        MPU[MPU_SIZE] = no_code << 28 | guard_regions[i].access << 24 | (guard_regions[i].log2_bytes - 1) << 1 | 1;
    }
    if (guard_regions[0].log2_bytes) MPU[MPU_CONTROL] = 5; /* on; what no region covers is as without it */
    __asm volatile("dsb\n isb");
}

void Reset_Handler(void)
{
    CPACR |= 0xFu << 20;
    __asm volatile("dsb\n isb");
    for (uint32_t *from = &_data_load, *to = &_data_start; to < &_data_end;) *to++ = *from++;
    for (uint32_t *to = &_bss_start; to < &_bss_end;) *to++ = 0;
    uint32_t top;
    __asm volatile("mov %0, sp" : "=r"(top));
    for (uint32_t *to = &_stack_start; (uint32_t)to < top - 64;) *to++ = STACK_COLOUR;
    guard();
    io_stop(main(0, 0));
}

uint32_t stack_used(void)
{
    const uint32_t *deepest = &_stack_start;
    while (deepest < &_stack_end && *deepest == STACK_COLOUR) deepest++;
    return (uint32_t)&_stack_end - (uint32_t)deepest;
}
