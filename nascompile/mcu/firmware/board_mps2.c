/* The MPS2 boards that QEMU emulates: CMSDK UART 0, and the timer as in io_semihosting.c. */
#include "board.h"

#define UART ((volatile uint32_t *)0x40004000)
#define TIMER ((volatile uint32_t *)0x40000000)

void board_start(void)
{
    UART[4] = 16; /* divider: the least that the UART takes */
    UART[2] = 3;  /* send and receive */
}

void board_send(uint8_t byte)
{
    while (UART[1] & 1) {}
    UART[0] = byte;
}

uint8_t board_receive(void)
{
    while (!(UART[1] & 2)) {}
    return (uint8_t)UART[0];
}

void board_restart_counter(void)
{
    TIMER[2] = 0xFFFFFFFF;
    TIMER[1] = 0xFFFFFFFF;
    TIMER[0] = 1;
}

uint32_t board_counter(void)
{
    uint32_t ticks = 0xFFFFFFFF - TIMER[1];
    return (uint32_t)(((uint64_t)ticks * 5 + 7) / 8);
}

const char *board_counter_unit(void) { return "instructions"; }
