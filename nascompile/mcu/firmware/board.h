/* What a board has to offer for measuring over its serial line; board_mps2.c is that of QEMU's board. */
#ifndef NC_BOARD_H
#define NC_BOARD_H
#include <stdint.h>

/* Clocks, caches and the serial line. Called once, before anything else here. */
void board_start(void);
void board_send(uint8_t byte);
uint8_t board_receive(void); /* waits */

/* Of a board itself cycle_counter.c has these. */
void board_restart_counter(void);
uint32_t board_counter(void);
const char *board_counter_unit(void);
#endif
