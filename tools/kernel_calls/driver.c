/* Runs kernel calls written by run.py: cases in, outputs and instruction counts out. The same program on a PC and in QEMU. */
#include "platform.h"

#include "kernels.h"

enum { LINEAR, LOW_RANK, HEAD, ATTENTION, MATMUL, SOFTMAX, LAYER_NORM, LOOKUP, ADD, MEAN, PATCH_EMBED, CONV, DEPTHWISE, AVERAGE_POOL, PEER };

/* Another compiler's linear map, where one is linked in; it takes as many of the last arguments as it needs. */
int linear_compute_(const int8_t *x, const void *weight, void *y, void *b2, void *b3, void *b4) __attribute__((weak));


#define MOST 8
static uint32_t take(void)
{
    uint32_t word;
    platform_read(&word, 4);
    return word;
}

static int8_t *image;
static uint32_t image_pitch;
static void copy_rows(void *context, uint32_t first, uint32_t rows, int8_t *band)
{
    (void)context;
    memcpy(band, image + first * image_pitch, rows * image_pitch);
}

/* Sixteen parameter words in the order of nc_linear_t's numbers: see run.py's linear_parameters. */
static nc_linear_t linear_of(const uint32_t *p, void *weights, void *table)
{
    return (nc_linear_t){.weights = weights, .table = table, .residual_constant = (int64_t)((uint64_t)p[1] << 32 | p[0]),
                         .residual_multiplier = (int32_t)p[2], .zero_point = (int32_t)p[3], .inputs = p[4], .outputs = p[5],
                         .x_stride = p[6], .y_stride = p[7], .layout = p[8]};
}

int main(void)
{
    platform_open();
    for (uint32_t cases = take(); cases > 0; cases--) {
        uint32_t kernel = take(), p[32] = {0}, count = take(), instructions, sizes[MOST];
        void *b[MOST] = {0}, *blocks[MOST] = {0};
        for (uint32_t i = 0; i < count; i++)
            p[i] = take();
        uint32_t buffers = take();
        for (uint32_t i = 0; i < buffers; i++) { /* bytes, offset from an aligned address, content; 0 bytes: NULL */
            uint32_t offset;
            sizes[i] = take(), offset = take();
            if (sizes[i] == 0)
                continue;
            blocks[i] = platform_memory(sizes[i] + offset);
            b[i] = (uint8_t *)blocks[i] + offset;
            platform_read(b[i], sizes[i]);
        }
        uint32_t bytes = take(), alias = take(), offset = take(), scratch_bytes = take();
        void *scratch = platform_memory(scratch_bytes + 1), *block = NULL, *y;
        if (alias < MOST)
            y = b[alias];
        else {
            block = platform_memory(bytes + offset), y = (uint8_t *)block + offset;
            memset(y, 0x55, bytes);
        }
        memset(scratch, 0x33, scratch_bytes);
        switch (kernel) {
        case LINEAR: { /* weights, table, x, residual */
            nc_linear_t op = linear_of(p, b[0], b[1]);
            const int8_t *residual = alias < MOST && alias == 3 ? y : b[3];
            COUNT(nc_linear(&op, b[2], p[16], residual, y, scratch));
            break;
        }
        case LOW_RANK: { /* weights, table, x, residual, second weights */
            nc_low_rank_t op = {linear_of(p, b[0], NULL), linear_of(p + 16, b[4], b[1])};
            COUNT(nc_low_rank(&op, b[2], p[15], b[3], y, scratch));
            break;
        }
        case HEAD: {
            nc_linear_t op = linear_of(p, b[0], NULL);
            COUNT(nc_head(&op, b[2], y, scratch));
            break;
        }
        case ATTENTION: { /* table, q, keys, values */
            nc_attention_t op = {b[0], (int32_t)p[0], p[1], (int32_t)p[2], (int32_t)p[3], p[4], p[5], p[6], p[7]};
            COUNT(nc_attention(&op, b[1], b[2], b[3], y, p[8], scratch));
            break;
        }
        case MATMUL: {
            nc_matmul_t op = {(int32_t)p[0], (int32_t)p[1], (int32_t)p[2], p[3], p[4], p[5], p[6], p[7]};
            COUNT(nc_matmul(&op, b[0], b[1], y, p[8], scratch));
            break;
        }
        case SOFTMAX:
            COUNT(nc_softmax(b[0], b[1], y, p[0], p[1]));
            break;
        case LAYER_NORM: {
            nc_layer_norm_t op = {b[0], (uint64_t)p[1] << 32 | p[0], p[2], p[3], p[4]};
            COUNT(nc_layer_norm(&op, b[1], y, p[5]));
            break;
        }
        case LOOKUP:
            COUNT(nc_lookup(b[0], b[1], y, p[0]));
            break;
        case ADD: {
            nc_add_t op = {(int32_t)p[0], (int32_t)p[1], (int32_t)p[2]};
            COUNT(nc_add(&op, b[0], b[1], y, p[3]));
            break;
        }
        case MEAN: {
            nc_mean_t op = {(int32_t)p[0], (int32_t)p[1], (int32_t)p[2], p[3], p[4], p[5]};
            COUNT(nc_mean(&op, b[0], y));
            break;
        }
        case PATCH_EMBED: { /* weights, table, image, residual, band */
            nc_patch_embed_t op = {linear_of(p, b[0], b[1]), p[16], p[17], p[18]};
            image = b[2], image_pitch = p[16] * p[17] * p[18];
            COUNT(nc_patch_embed(&op, p[19], copy_rows, NULL, b[4], b[3], y, scratch));
            break;
        }
        case CONV: {
            nc_conv_t op = {linear_of(p, b[0], b[1]), (int32_t)p[16], p[17], p[18], p[19], p[20], p[21], p[22]};
            COUNT(nc_conv(&op, b[2], b[3], y, scratch));
            break;
        }
        case DEPTHWISE: {
            nc_depthwise_t op = {b[0], b[1], (int32_t)p[0], (int32_t)p[1], p[2], p[3], p[4], p[5], p[6]};
            COUNT(nc_depthwise(&op, b[2], y, scratch));
            break;
        }
        case AVERAGE_POOL: {
            nc_average_pool_t op = {(int32_t)p[0], (int32_t)p[1], (int32_t)p[2], p[3], p[4], p[5], p[6], p[7]};
            COUNT(nc_average_pool(&op, b[0], y));
            break;
        }
        case PEER: {
            if (linear_compute_ == NULL)
                return 2;
            COUNT(linear_compute_(b[0], b[1], y, b[2], b[3], b[4]));
            break;
        }
        default:
            return 2;
        }
        platform_write(&instructions, 4);
        platform_write(y, bytes);
        for (uint32_t i = buffers; i > 0; i--)
            platform_free(blocks[i - 1]);
        platform_free(block);
        platform_free(scratch);
    }
    platform_close();
    return 0;
}
