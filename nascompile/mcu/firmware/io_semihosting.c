/* QEMU: files and text by semihosting, instructions by the CMSDK timer of the MPS2 boards under `-icount shift=6`. */
#include "io.h"

enum { SYS_OPEN = 0x01, SYS_CLOSE = 0x02, SYS_WRITE = 0x05, SYS_READ = 0x06, SYS_GET_CMDLINE = 0x15, SYS_EXIT_EXTENDED = 0x20 };
enum { READ_BINARY = 1, WRITE_TEXT = 4, WRITE_BINARY = 5 };

static uint32_t inputs, outputs;
static int text;

static int call(int operation, void *block)
{
    register int r0 __asm("r0") = operation;
    register void *r1 __asm("r1") = block;
    __asm volatile("bkpt 0xAB" : "+r"(r0) : "r"(r1) : "memory");
    return r0;
}

static uint32_t open_file(const char *name, uint32_t mode)
{
    uint32_t length = 0;
    while (name[length]) length++;
    uint32_t block[3] = {(uint32_t)name, mode, length};
    int handle = call(SYS_OPEN, block);
    if (handle < 0) io_stop(98);
    return (uint32_t)handle;
}

/* The command line is `firmware [INPUTS OUTPUTS]`; without files, the reference sample is run and reported in words. */
void io_start(int arguments, char **argument)
{
    (void)arguments, (void)argument;
    static char line[512];
    char *word[3] = {0, 0, 0};
    uint32_t block[2] = {(uint32_t)line, sizeof line}, words = 0;
    if (call(SYS_GET_CMDLINE, block) != 0) io_stop(97);
    for (char *c = line; *c; c++) {
        if (*c == ' ') *c = 0;
        else if ((c == line || c[-1] == 0) && words < 3) word[words++] = c;
    }
    text = words < 3;
    inputs = open_file(text ? "sample_input.bin" : word[1], READ_BINARY);
    outputs = open_file(text ? ":tt" : word[2], text ? WRITE_TEXT : WRITE_BINARY);
}

uint32_t io_input(void *to, uint32_t bytes)
{
    uint32_t block[3] = {inputs, (uint32_t)to, bytes};
    return call(SYS_READ, block) ? 0 : bytes; /* the call returns how many bytes are missing */
}

void io_output(const void *from, uint32_t bytes)
{
    uint32_t block[3] = {outputs, (uint32_t)from, bytes};
    if (call(SYS_WRITE, block) != 0) io_stop(96);
}

int io_is_text(void) { return text; }

_Noreturn void io_stop(int status)
{
    uint32_t close[1] = {outputs}, block[2] = {0x20026, (uint32_t)status};
    if (outputs) call(SYS_CLOSE, close);
    call(SYS_EXIT_EXTENDED, block);
    for (;;) {}
}

/* 25 ticks a microsecond, 64 ns an instruction: 1.6 ticks, rounded down, so that 5/8 of them rounded up are the instructions. */
#define TIMER ((volatile uint32_t *)0x40000000)
enum { CONTROL = 0, VALUE = 1, RELOAD = 2 };

void io_restart_counter(void)
{
    TIMER[RELOAD] = 0xFFFFFFFF;
    TIMER[VALUE] = 0xFFFFFFFF;
    TIMER[CONTROL] = 1;
}

uint32_t io_counter(void)
{
    uint32_t ticks = 0xFFFFFFFF - TIMER[VALUE];
    return (uint32_t)(((uint64_t)ticks * 5 + 7) / 8);
}

const char *io_counter_unit(void) { return "instructions"; }
