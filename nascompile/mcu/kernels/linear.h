/* What linear maps of any input share: from rows expanded for nc_dot to requantized outputs. */
#ifndef NC_LINEAR_H
#define NC_LINEAR_H

#include "kernels.h"
#include "port.h"

/* Tokens first .. first + rows - 1 (rows 4 or 1, first a multiple of rows) from words x (see dot.h), `pairs` pairs of inputs each. */
void nc_linear_block(const nc_linear_t *op, uint32_t rows, const uint32_t *x, uint32_t pairs, uint32_t first, const int8_t *residual,
                     int8_t *y);

#endif
