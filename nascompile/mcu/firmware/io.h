/* What the harness needs from where it runs. One of io_semihosting.c, io_uart.c and io_host.c is linked. */
#ifndef NC_IO_H
#define NC_IO_H
#include <stdint.h>

void io_start(int arguments, char **argument);
/* The next bytes of the samples; 0 if there are no more, else `bytes`. */
uint32_t io_input(void *to, uint32_t bytes);
void io_output(const void *from, uint32_t bytes);
/* Whether results are for a person to read; else they are records for a program. */
int io_is_text(void);
_Noreturn void io_stop(int status);

/* Start counting at zero, and what was counted since. */
void io_restart_counter(void);
uint32_t io_counter(void);
/* "instructions", "cycles", or "" where nothing is counted. */
const char *io_counter_unit(void);
#endif
