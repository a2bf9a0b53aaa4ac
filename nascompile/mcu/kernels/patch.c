/* Patch embedding: a band of image rows is all of the image that has to be in memory. */
#include "dot.h"
#include "linear.h"

/* Words of one patch: its rows are `run` bytes each, `pitch` apart. Four bytes may straddle two rows. */
NC_INLINE void expand_patch(uint32_t rows, uint32_t *x, const int8_t *patch, uint32_t patch_rows, uint32_t run, uint32_t pitch)
{
    if (run % 4 == 0) {
        for (uint32_t r = 0; r < patch_rows; r++, patch += pitch, x += run / 2 * rows)
            nc_expand_row(rows, x, patch, run);
        return;
    }
    uint32_t word = 0, filled = 0;
    for (uint32_t r = 0; r < patch_rows; r++, patch += pitch)
        for (uint32_t k = 0; k < run; k++) {
            word |= (uint32_t)(uint8_t)patch[k] << (8 * filled);
            if (++filled < 4)
                continue;
            x[0] = nc_even_bytes(word);
            x[rows] = nc_odd_bytes(word);
            x += 2 * rows;
            word = 0, filled = 0;
        }
    if (filled > 0) {
        x[0] = nc_even_bytes(word);
        x[rows] = nc_odd_bytes(word);
    }
}

NC_OPERATOR void nc_patch_band(const nc_patch_embed_t *op, const int8_t *band, const int8_t *residual, int8_t *y, void *scratch)
{
    uint32_t rows, run = op->patch * op->channels, pitch = op->columns * run, *words = scratch;
    for (uint32_t t = 0; t < op->columns; t += rows) {
        rows = nc_block_of(op->columns - t);
        for (uint32_t r = 0; r < rows; r++, band += run)
            NC_WITH_ROWS(rows, expand_patch(ROWS, words + r, band, op->patch, run, pitch));
        nc_linear_block(&op->linear, rows, words, 2 * nc_quads(op->linear.inputs), t, residual, y);
    }
}

NC_OPERATOR void nc_patch_embed(const nc_patch_embed_t *op, uint32_t bands, nc_row_source source, void *context, int8_t *band,
                                const int8_t *residual, int8_t *y, void *scratch)
{
    for (uint32_t b = 0; b < bands; b++) {
        uint32_t at = b * op->columns * op->linear.y_stride;
        source(context, b * op->patch, op->patch, band);
        nc_patch_band(op, band, residual == NULL ? NULL : residual + at, y + at, scratch);
    }
}
