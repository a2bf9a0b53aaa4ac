/* A PC: cases on standard input, results on standard output, every buffer its own allocation so that ASan sees its ends. */
#include <stdio.h>
#include <stdlib.h>

#include "platform.h"

void platform_open(void) {}
void platform_close(void) { fflush(stdout); }
void platform_read(void *to, uint32_t bytes)
{
    if (fread(to, 1, bytes, stdin) != bytes)
        exit(3);
}
void platform_write(const void *from, uint32_t bytes) { fwrite(from, 1, bytes, stdout); }
void *platform_memory(uint32_t bytes) { return malloc(bytes); }
void platform_free(void *block) { free(block); }
uint32_t platform_ticks(void) { return 0; }
uint32_t platform_instructions(uint32_t ticks) { return ticks; }
