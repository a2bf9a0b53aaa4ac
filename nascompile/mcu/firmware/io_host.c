/* A PC: files by stdio. Nothing is counted: what an instruction is there says nothing about the microcontroller. */
#include "io.h"

#include <stdio.h>
#include <stdlib.h>

static FILE *inputs, *outputs;

void io_start(int arguments, char **argument)
{
    int text = arguments != 3;
    inputs = fopen(text ? "sample_input.bin" : argument[1], "rb");
    outputs = text ? stdout : fopen(argument[2], "wb");
    if (!inputs || !outputs) {
        perror(!inputs ? "inputs" : "outputs");
        exit(98);
    }
}

uint32_t io_input(void *to, uint32_t bytes) { return fread(to, 1, bytes, inputs) == bytes ? bytes : 0; }

void io_output(const void *from, uint32_t bytes)
{
    if (fwrite(from, 1, bytes, outputs) != bytes) exit(96);
}

int io_is_text(void) { return outputs == stdout; }

_Noreturn void io_stop(int status) { exit(fclose(outputs) ? 96 : status); }

void io_restart_counter(void) {}
uint32_t io_counter(void) { return 0; }
const char *io_counter_unit(void) { return ""; }
