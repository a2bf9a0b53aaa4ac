/* A board on a serial line. The computer sends 'S' until it reads the word below. From then on the board asks for what it needs, so that a
   line without flow control loses nothing: 'I' and a length: send so many bytes of samples ('N' if there are no more, else 'Y' and the
   bytes); 'O', a length and bytes: results; 'E' and a status: the end. Lengths are four bytes, the lowest first. */
#include "board.h"
#include "io.h"

static void send(const void *from, uint32_t bytes)
{
    for (const uint8_t *c = from; bytes; bytes--) board_send(*c++);
}

static void send_frame(uint8_t kind, uint32_t value)
{
    board_send(kind);
    send(&value, sizeof value);
}

void io_start(int arguments, char **argument)
{
    (void)arguments, (void)argument;
    board_start();
    while (board_receive() != 'S') {}
    send("nascompile\n", 11);
}

uint32_t io_input(void *to, uint32_t bytes)
{
    uint8_t *c = to;
    uint8_t answer;
    send_frame('I', bytes);
    do answer = board_receive(); while (answer == 'S'); /* sent before the word arrived */
    if (answer != 'Y') return 0;
    for (uint32_t i = 0; i < bytes; i++) c[i] = board_receive();
    return bytes;
}

void io_output(const void *from, uint32_t bytes)
{
    send_frame('O', bytes);
    send(from, bytes);
}

int io_is_text(void) { return 0; }

_Noreturn void io_stop(int status)
{
    send_frame('E', (uint32_t)status);
    for (;;) {}
}

void io_restart_counter(void) { board_restart_counter(); }
uint32_t io_counter(void) { return board_counter(); }
const char *io_counter_unit(void) { return board_counter_unit(); }
