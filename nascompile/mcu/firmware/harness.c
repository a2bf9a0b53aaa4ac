/* Runs the model on the reference sample and says in words what it took, or on many samples and writes records.

   Records: a header of eight words (magic, operators, bytes of an input, bytes of an output, RAM used, flash used, bytes of stack, what is counted:
   0 nothing, 1 instructions, 2 cycles),
   then for each sample the output, the count of every operator (a word each) and the stack used so far. */
#include "firmware.h"
#include "io.h"
#include "model.h"

#define MAGIC 0x314D434E /* "NCM1" */

/* The last of model.counts takes what is before the first operator and after the last. */
static uint32_t current, carried, overhead;
static int reading; /* whether a part of this sample was read */

NC_OPERATOR void nc_mark(uint32_t operator)
{
    model.counts[current] += carried + io_counter() - overhead;
    current = operator;
    carried = 0;
    io_restart_counter();
}

/* Reading samples is not the model's work and is not counted. Rows come in order. */
static void read_rows(void *context, uint32_t first, uint32_t rows, int8_t *to)
{
    const uint32_t bytes = rows * model.row_bytes;
    (void)context, (void)first;
    carried += io_counter();
    if (io_input(to, bytes) != bytes) io_stop(reading ? 95 : 0);
    reading = 1;
    io_restart_counter();
}

/* What a mark itself counts: two with nothing between them. */
static uint32_t empty_mark(void)
{
    overhead = 0;
    nc_mark(model.operators);
    uint32_t before = model.counts[model.operators];
    nc_mark(model.operators);
    nc_mark(model.operators);
    return (model.counts[model.operators] - before) / 2;
}

static const int8_t *run(void)
{
    carried = 0;
    current = model.operators;
    /* The emulator counts one less where it meets code for the first time, and a board's caches are cold. */
    for (uint32_t i = 0; i < 3; i++) overhead = empty_mark();
    for (uint32_t i = 0; i <= model.operators; i++) model.counts[i] = 0;
    reading = 0;
    const void *output = model_run(read_rows, 0);
    nc_mark(model.operators);
    return output;
}

static void put(const char *text)
{
    uint32_t length = 0;
    while (text[length]) length++;
    io_output(text, length);
}

static void put_number(int64_t number, uint32_t width)
{
    char digits[24];
    uint32_t n = sizeof digits;
    uint64_t rest = number < 0 ? (uint64_t)-number : (uint64_t)number;
    do {
        digits[--n] = (char)('0' + rest % 10);
        rest /= 10;
    } while (rest);
    if (number < 0) digits[--n] = '-';
    while (n && sizeof digits - n < width) digits[--n] = ' ';
    io_output(digits + n, sizeof digits - n);
}

static void put_operators(void)
{
    uint64_t total = 0;
    put("\noperator                                        ");
    put(io_counter_unit());
    put("\n");
    const char *name = model.names;
    for (uint32_t i = 0; i < model.operators; i++, name++) {
        uint32_t length = 0;
        put(name);
        for (; *name; name++) length++;
        while (length++ < 44) put(" ");
        put_number(model.counts[i], 16);
        put("\n");
        total += model.counts[i];
    }
    put("total                                       ");
    put_number((int64_t)total, 16);
    put("\n");
}

static void put_outputs(const int8_t *output)
{
    put("outputs:");
    for (uint32_t i = 0; i * model.output_word < model.output_bytes; i++) {
        put(i % 8 ? " " : "\n ");
        put_number(model.output_word == 4 ? ((const int32_t *)(const void *)output)[i] : output[i], 10);
    }
    put("\n");
}

#ifdef __arm__
static void put_memory(void)
{
    static const struct { const char *what; const uint8_t *used, *size; } lines[] = {
        {"RAM", _ram_used, _ram_size}, {"flash", _flash_used, _flash_size},
    };
    put("\n");
    for (uint32_t i = 0; i < 2; i++) {
        put(lines[i].what);
        put(": ");
        put_number((int64_t)(uint32_t)lines[i].used, 0);
        put(" of ");
        put_number((int64_t)(uint32_t)lines[i].size, 0);
        put(" bytes\n");
    }
    put("arena: ");
    put_number(model.arena_bytes, 0);
    put(" bytes\nstack: ");
    put_number(stack_used(), 0);
    put(" of ");
    put_number((int64_t)(uint32_t)_stack_size, 0);
    put(" bytes were used\n");
}

static void put_header(void)
{
    const uint32_t header[8] = {
        MAGIC, model.operators, model.input_bytes, model.output_bytes, (uint32_t)_ram_used, (uint32_t)_flash_used, (uint32_t)_stack_size,
        *io_counter_unit() == 'c' ? 2 : 1,
    };
    io_output(header, sizeof header);
}
#else
uint32_t stack_used(void) { return 0; }
static void put_memory(void) {}

static void put_header(void)
{
    const uint32_t header[8] = {MAGIC, model.operators, model.input_bytes, model.output_bytes, 0, 0, 0, 0};
    io_output(header, sizeof header);
}
#endif

int main(int arguments, char **argument)
{
    io_start(arguments, argument);
    if (io_is_text()) {
        put_outputs(run());
        if (*io_counter_unit()) put_operators();
        put_memory();
        if (*io_counter_unit()) put(model.remark);
        return 0;
    }
    put_header();
    for (;;) { /* read_rows stops it */
        const int8_t *output = run();
        const uint32_t deepest = stack_used();
        io_output(output, model.output_bytes);
        io_output(model.counts, model.operators * sizeof *model.counts);
        io_output(&deepest, sizeof deepest);
    }
}
