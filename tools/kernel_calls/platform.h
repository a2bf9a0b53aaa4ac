/* What driver.c needs of the machine it runs on. */
#ifndef PLATFORM_H
#define PLATFORM_H

#include <stdint.h>

#include "port.h"

void platform_open(void);
void platform_close(void);
void platform_read(void *to, uint32_t bytes);
void platform_write(const void *from, uint32_t bytes);
void *platform_memory(uint32_t bytes); /* 8-byte aligned */
void platform_free(void *block);
uint32_t platform_ticks(void);
uint32_t platform_instructions(uint32_t ticks);

#define COUNT(call)                                                                                                             \
    do {                                                                                                                        \
        uint32_t before = platform_ticks();                                                                                     \
        call;                                                                                                                   \
        instructions = platform_instructions(platform_ticks() - before);                                                       \
    } while (0)

#endif
