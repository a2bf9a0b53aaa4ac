/* The model, as an application sees it:

     static void rows(void *context, uint32_t first, uint32_t count, int8_t *to) { ... camera's bytes minus 128 ... }
     const int32_t *scores = model_run(rows, 0);      (model.output_bytes of them, good until the next run)

   All its memory is one static block (model.arena_bytes); it keeps nothing else between runs and calls nothing but its kernels. */
#ifndef NC_MODEL_H
#define NC_MODEL_H
#include "kernels.h"
#include "port.h"

typedef struct {
    uint32_t input_bytes, row_bytes; /* of a sample, and of one of its rows */
    uint32_t output_bytes, arena_bytes;
    uint32_t output_word; /* bytes of one output: 1 (int8_t) or 4 (int32_t) */
    uint32_t operators;   /* that are counted */
    const char *names;    /* theirs, each ended by a zero */
    uint32_t *counts;     /* operators + 1 */
    const char *remark;   /* what counts are, in words */
} nc_model_t;

extern const nc_model_t model;
const void *model_run(nc_row_source image, void *context);

#ifdef NC_PROFILE
void nc_mark(uint32_t operator); /* what follows is this operator's work */
#define NC_MARK(operator) nc_mark(operator)
#else
#define NC_MARK(operator) ((void)0)
#endif
#endif
