/* What start-up and linker script know and the harness prints. */
#ifndef NC_FIRMWARE_H
#define NC_FIRMWARE_H
#include <stdint.h>

/* Bytes of stack used at most since reset. */
uint32_t stack_used(void);

#ifdef __arm__
/* Addresses whose values are sizes, from the linker script. */
extern const uint8_t _ram_used[], _ram_size[], _flash_used[], _flash_size[], _stack_size[];
#endif
#endif
