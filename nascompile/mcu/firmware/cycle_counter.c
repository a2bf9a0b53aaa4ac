/* The cycle counter that every Cortex-M4 and M7 has (QEMU does not emulate it). */
#include "board.h"

#define DEMCR (*(volatile uint32_t *)0xE000EDFC)
#define DWT_CTRL (*(volatile uint32_t *)0xE0001000)
#define DWT_CYCCNT (*(volatile uint32_t *)0xE0001004)
#define DWT_LAR (*(volatile uint32_t *)0xE0001FB0)

void board_restart_counter(void)
{
    DEMCR |= 1u << 24; /* trace on */
    DWT_LAR = 0xC5ACCE55; /* the M7 locks its registers */
    DWT_CTRL |= 1;
    DWT_CYCCNT = 0;
}

uint32_t board_counter(void) { return DWT_CYCCNT; }
const char *board_counter_unit(void) { return "cycles"; }
