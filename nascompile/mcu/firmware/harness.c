/* Runs the model on the reference sample and says in words what it took, or on many samples and writes records.

   Records: a header of eight words (magic, operators, bytes of an input, bytes of an output, RAM used, flash used, bytes of stack, 0),
   then for each sample the output, the count of every operator (a word each) and the stack used so far. */
#include "firmware.h"
#include "io.h"
#include "model.h"

#define MAGIC 0x314D434E /* "NCM1" */

static uint32_t counts[MODEL_OPERATORS + 1]; /* the last one takes what is before the first operator and after the last */
static uint32_t current, carried, overhead;
static uint32_t taken; /* bytes of the sample that were read */

void nc_mark(uint32_t operator)
{
    counts[current] += carried + io_counter() - overhead;
    current = operator;
    carried = 0;
    io_restart_counter();
}

/* Reading samples is not the model's work and is not counted. */
static void read_input(void *context, void *to, uint32_t bytes)
{
    (void)context;
    carried += io_counter();
    if (io_input(to, bytes) != bytes) io_stop(taken ? 95 : 0);
    taken += bytes;
    io_restart_counter();
}

static const int8_t *run(void)
{
    for (uint32_t i = 0; i <= MODEL_OPERATORS; i++) counts[i] = 0;
    taken = 0;
    current = MODEL_OPERATORS;
    carried = overhead = 0;
    io_restart_counter();
    nc_mark(MODEL_OPERATORS);
    nc_mark(MODEL_OPERATORS);
    overhead = counts[MODEL_OPERATORS] - carried; /* of two marks */
    counts[MODEL_OPERATORS] = 0;
    nc_mark(MODEL_OPERATORS);
    nc_mark(MODEL_OPERATORS);
    overhead = counts[MODEL_OPERATORS] / 2;
    return model_run(read_input, 0);
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
    for (uint32_t i = 0; i < MODEL_OPERATORS; i++) {
        const char *name = model_operator_names[i];
        uint32_t length = 0;
        while (name[length]) length++;
        put(name);
        while (length++ < 44) put(" ");
        put_number(counts[i], 16);
        put("\n");
        total += counts[i];
    }
    put("total                                       ");
    put_number((int64_t)total, 16);
    put("\n");
}

static void put_outputs(const int8_t *output)
{
    put("outputs:");
    for (uint32_t i = 0; i < MODEL_OUTPUT_BYTES; i++) {
        put(i % 20 ? " " : "\n ");
        put_number(output[i], 4);
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
    put_number(MODEL_ARENA_BYTES, 0);
    put(" bytes\nstack: ");
    put_number(stack_used(), 0);
    put(" of ");
    put_number((int64_t)(uint32_t)_stack_size, 0);
    put(" bytes were used\n");
}

static void put_header(void)
{
    const uint32_t header[8] = {
        MAGIC, MODEL_OPERATORS, MODEL_INPUT_BYTES, MODEL_OUTPUT_BYTES, (uint32_t)_ram_used, (uint32_t)_flash_used, (uint32_t)_stack_size, 0,
    };
    io_output(header, sizeof header);
}
#else
uint32_t stack_used(void) { return 0; }
static void put_memory(void) {}

static void put_header(void)
{
    const uint32_t header[8] = {MAGIC, MODEL_OPERATORS, MODEL_INPUT_BYTES, MODEL_OUTPUT_BYTES, 0, 0, 0, 0};
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
        put(MODEL_COUNTS_REMARK);
        return 0;
    }
    put_header();
    for (;;) { /* read_input stops it */
        const int8_t *output = run();
        nc_mark(MODEL_OPERATORS);
        const uint32_t deepest = stack_used();
        io_output(output, MODEL_OUTPUT_BYTES);
        io_output(counts, MODEL_OPERATORS * sizeof *counts);
        io_output(&deepest, sizeof deepest);
    }
}
