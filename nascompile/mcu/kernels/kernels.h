/* Integer kernels of a network on a Cortex-M4 or M7. No heap, no libc beyond memcpy and memset, no state.
 *
 * NUMBERS
 *   real = scale * (q - zero_point). Activations: int8, one scale and zero point a tensor, any zero point unless said otherwise.
 *   Weights: int8 in [-127, 127], zero point 0, one scale an output channel. Accumulators: int32.
 *   hi(a, b)   = floor((a*b + 2^31) / 2^32), exact 64-bit product: SMMULR.
 *   sat8(v)    = min(127, max(-128, v)).
 *   requantize = sat8(zero_point + hi(sum, M)), M = round(real ratio * 2^32), ratio in [0, 0.5).
 *   The input's zero point costs nothing: packing folds -zero_point * (sum of a row's weights) into the bias.
 *
 * MEMORY
 *   Activations are rows of channels: [tokens][channels], images [height][width][channels]; strides in bytes.
 *   `scratch`, packed weights, and keys and values that nc_attention or nc_matmul read are 8-byte aligned; other activations may lie
 *   anywhere. NC_..._SCRATCH gives bytes. The stack takes less than 512 bytes a call.
 *   Where input and output may be the same memory, it is said; elsewhere they may not overlap.
 *
 * SIZES: no kernel looks at them. What is said of them below keeps every sum within 32 bits whatever the bytes are;
 *   program.py (`check`) refuses a program with others before anything is written.
 *
 * COMPILING: C11 with GCC's assembly and statement expressions; on the target -O1 or more, since every register is used by name.
 *
 * PACKED WEIGHTS of one linear map (packing.py), a stream of words, for each pair of outputs (o, o+1):
 *   int32 bias[o], bias[o+1];
 *   for each four inputs k..k+3:  bytes w[o][k], w[o+1][k], w[o][k+2], w[o+1][k+2];  w[o][k+1], w[o+1][k+1], w[o][k+3], w[o+1][k+3];
 *   int32 M[o], M[o+1].
 *   Inputs are padded to a multiple of 4 and outputs to an even number with zeros.
 *   Words: ceil(outputs / 2) * (4 + 2 * ceil(inputs / 4)).
 *   ("Plain" order, for the second factor of a low-rank map: for each two inputs k, k+1: w[o][k], w[o+1][k], w[o][k+1], w[o+1][k+1],
 *   inputs padded to an even number, words: ceil(outputs / 2) * (4 + ceil(inputs / 2)).)
 */
#ifndef NC_KERNELS_H
#define NC_KERNELS_H

#include <stdint.h>

/* Where a linear map writes output channel c of token t, in bytes from y. */
enum nc_layout {
    NC_ROWS,  /* t * y_stride + c: an activation */
    NC_KEYS,  /* (t / 2) * y_stride + t % 2 + (c / 4) * 8 + {0, 4, 2, 6}[c % 4], y_stride = NC_KEY_STRIDE(width) */
    NC_VALUES /* (c / 2) * y_stride + c % 2 + t * 2, y_stride = NC_VALUE_STRIDE(all tokens) */
};
/* Keys or values of one head, ready for nc_attention. Bytes never written (the pad) are read, their values do not matter.
 * A tile that starts at token t (even for keys) starts at y + NC_KEYS_AT(t, width), y + NC_VALUES_AT(t). */
#define NC_KEY_STRIDE(width) (2U * (((width) + 3U) & ~3U))
#define NC_VALUE_STRIDE(tokens) (2U * (((tokens) + 1U) & ~1U))
#define NC_KEYS_AT(token, width) ((token) / 2U * NC_KEY_STRIDE(width))
#define NC_VALUES_AT(token) (2U * (token))
#define NC_KEYS_BYTES(tokens, width) (((tokens) + 1U) / 2U * NC_KEY_STRIDE(width))
#define NC_VALUES_BYTES(tokens, width) (((width) + 1U) / 2U * NC_VALUE_STRIDE(tokens))

/* y = requantize(W x + b).
 * table: NULL, or 256 outputs indexed by (uint8_t)y, looked up after requantizing (GELU and the like).
 * residual_multiplier != 0: y = sat8((sum * M + 256 * residual * residual_multiplier + residual_constant) >> 32), one rounding, with
 *   residual_multiplier = round(residual scale / y scale * 2^24) and
 *   residual_constant = (zero_point << 32) - 256 * residual zero point * residual_multiplier + 2^31; layout NC_ROWS, table NULL. */
typedef struct {
    const uint32_t *weights; /* packed */
    const int8_t *table;
    int64_t residual_constant;
    int32_t residual_multiplier;
    int32_t zero_point;
    uint32_t inputs, outputs;
    uint32_t x_stride, y_stride; /* residual rows lie y_stride apart as well */
    uint32_t layout;             /* enum nc_layout */
} nc_linear_t;

#define NC_LINEAR_SCRATCH(inputs) (8U * (((inputs) + 3U) & ~3U))
/* residual: NULL or the rows to add; may be y itself. x and y may not overlap.
 * inputs <= 32768: products of 127 * 255 each, and a bias of at most 2^30. The same holds for every linear map below. */
void nc_linear(const nc_linear_t *op, const int8_t *x, uint32_t tokens, const int8_t *residual, int8_t *y, void *scratch);

/* y = second(first(x)), four tokens at a time. first: packed as above, bias 0 or not, its results kept as 13 bits,
 * mid = clamp(hi(sum, M), -4096, 4095): zero point 0, scale = largest |mid| / 4095; zero_point, table, layout and y_stride unused.
 * second: packed in plain order, inputs = first.outputs <= 2048, all its other fields as in nc_linear, x_stride unused. */
typedef struct {
    nc_linear_t first, second;
} nc_low_rank_t;

#define NC_LOW_RANK_SCRATCH(inputs, rank) (NC_LINEAR_SCRATCH(inputs) + 8U * (((rank) + 1U) & ~1U))
void nc_low_rank(const nc_low_rank_t *op, const int8_t *x, uint32_t tokens, const int8_t *residual, int8_t *y, void *scratch);

/* Attention of one head for a tile of query rows; any tile gives the same bytes.
 * q: zero point 0 (queries are quantized symmetrically). keys: NC_KEYS, any zero point. values: NC_VALUES.
 *   s_j = clamp(hi(sum_c q_c k_jc, score_multiplier), -16384, 16383), in 1/64: score_multiplier = round(q scale * k scale / sqrt(width) * 64 * 2^32),
 *         below 2^31: pass smaller scales (never larger) where it is not
 *   e_j = exp_table[min(1023, max_j s_j - s_j)], exp_table[i] = round(16384 * exp(-i / 64)), constant
 *   total = sum_j e_j, a = sum_j e_j (v_jc - value_zero), shift = bit length(total) - 15, d = total >> shift
 *   y_c = sat8(zero_point + hi(a >> shift, floor((ratio + d / 2) / d) * 16)), floor shifts, d / 2 rounded down,
 *   ratio = round(v scale / y scale * 2^28), v scale / y scale < 8.
 * y may be q. tokens <= 512. */
typedef struct {
    const uint16_t *exp_table; /* 1024 entries */
    int32_t score_multiplier;
    uint32_t ratio;
    int32_t value_zero, zero_point;
    uint32_t tokens, width; /* keys and values, channels of the head */
    uint32_t q_stride, y_stride;
} nc_attention_t;

#define NC_ATTENTION_SCRATCH(tokens, width) (8U * (((width) + 3U) & ~3U) + 8U * (((tokens) + 1U) & ~1U))
void nc_attention(const nc_attention_t *op, const int8_t *q, const int8_t *keys, const int8_t *values, int8_t *y, uint32_t rows,
                  void *scratch);

/* The parts of attention on their own, for a plan that keeps whole score matrices (other numbers than nc_attention's):
 * y[r][j] = requantize(sum_k x[r][k] (w[j][k] - w_zero)), x zero point 0, inputs <= 32768.
 * w: NC_KEYS with inputs channels and outputs tokens (of_values 0, x int8), or
 *    NC_VALUES with inputs tokens and outputs channels (of_values 1, x uint8: nc_softmax's). */
typedef struct {
    int32_t multiplier, w_zero, zero_point;
    uint32_t inputs, outputs, x_stride, y_stride, of_values;
} nc_matmul_t;

#define NC_MATMUL_SCRATCH(inputs) NC_LINEAR_SCRATCH(inputs)
void nc_matmul(const nc_matmul_t *op, const void *x, const int8_t *w, int8_t *y, uint32_t rows, void *scratch);

/* Rows of int8 to uint8 (scale 1/256, zero point 0): e_j = table[255 - max x + x_j], table[255 - i] = round(32768 * exp(-i * scale));
 * total = sum e_j; inverse = floor((2^31 + total / 2) / total); y_j = min(255, floor((e_j * inverse + 2^22) / 2^23)).
 * y may be x. 1 <= width <= 65535. Rows lie width apart. */
void nc_softmax(const uint16_t *table, const int8_t *x, uint8_t *y, uint32_t rows, uint32_t width);

/* Layer normalization of rows (input scale and zero point cancel), n = width in [2, 1024]:
 *   V = max(1, n * sum x^2 - (sum x)^2 + epsilon),  epsilon = round(n^2 * eps / x scale^2) (at most 2^40)
 *   V = m * 4^q with 2^30 <= m < 2^32 (m = floor(V / 4^q), exact for q <= 0), root = floor(sqrt(m)), R = floor((2^32 - 1) / root) * 2^14
 *   v_c = hi((n x_c - sum x) * 2^(9 - q), R)                       (about 2^23 times the normalized value)
 *   y_c = sat8(floor((shift_c + hi(v_c, gain_c)) / 256)),  gain = round(gamma / y scale * 2^17),
 *   shift = round((beta / y scale + y zero point) * 256) + 128.
 * affine: gain_0, shift_0, gain_1, shift_1, ... y may be x. Rows lie x_stride and y_stride apart. */
typedef struct {
    const int32_t *affine;
    uint64_t epsilon;
    uint32_t width, x_stride, y_stride;
} nc_layer_norm_t;
void nc_layer_norm(const nc_layer_norm_t *op, const int8_t *x, int8_t *y, uint32_t rows);

/* y_i = table[(uint8_t)x_i]: GELU or any other function of one value. y may be x. */
void nc_lookup(const int8_t *table, const int8_t *x, int8_t *y, uint32_t count);

/* y_i = sat8((a_i * a_multiplier + b_i * b_multiplier + constant) >> 20), multiplier = round(scale / y scale * 2^20),
 * constant = (y zero << 20) - a zero * a_multiplier - b zero * b_multiplier + 2^19. y may be a or b.
 * Scale ratios < 3.7: two differences of 255 and a zero point of 128 are then below 2^11, so that the sum fits. */
typedef struct {
    int32_t a_multiplier, b_multiplier, constant;
} nc_add_t;
void nc_add(const nc_add_t *op, const int8_t *a, const int8_t *b, int8_t *y, uint32_t count);

/* Mean over rows: y_c = sat8(zero_point + hi((sum_t x_tc - rows * x_zero) * 256, multiplier)),
 * multiplier = round(x scale / (rows * y scale) * 2^24). rows <= 16384. Cls pooling is a row of x and needs no kernel. */
typedef struct {
    int32_t multiplier, x_zero, zero_point;
    uint32_t rows, channels, x_stride;
} nc_mean_t;
void nc_mean(const nc_mean_t *op, const int8_t *x, int8_t *y);

/* Class scores of one row, int32 of one scale: y_o = hi(sum, M[o]). Weights packed as for nc_linear (its zero_point, table, layout,
 * strides unused), M[o] = round(ratio to the scores' scale * 2^32). scratch: NC_LINEAR_SCRATCH(inputs). */
void nc_head(const nc_linear_t *op, const int8_t *x, int32_t *y, void *scratch);

/* Patch embedding, one band of `patch` image rows at a time: linear over patches in (row, column, channel) order.
 * Pixels are int8 (a camera's byte - 128); normalization by mean and deviation is folded into weights and bias.
 * linear: inputs = patch * patch * channels, x_stride unused, residual = position embedding of the band's patches or NULL. */
typedef struct {
    nc_linear_t linear;
    uint32_t patch, channels, columns; /* columns: patches in a row; a band's row is columns * patch * channels bytes */
} nc_patch_embed_t;

/* Puts the image's rows first .. first + rows - 1 into band, packed. */
typedef void (*nc_row_source)(void *context, uint32_t first, uint32_t rows, int8_t *band);

/* One band to `columns` tokens. */
void nc_patch_band(const nc_patch_embed_t *op, const int8_t *band, const int8_t *residual, int8_t *y, void *scratch);
/* All bands of an image: reads it through source, one band (patch rows) at a time. */
void nc_patch_embed(const nc_patch_embed_t *op, uint32_t bands, nc_row_source source, void *context, int8_t *band, const int8_t *residual,
                    int8_t *y, void *scratch);

/* Convolution kernel x kernel, any stride, symmetric zero padding (the pad is the input's zero point, so it adds nothing):
 * linear over the window in (row, column, channel) order, rows out_height * out_width. linear: inputs = kernel^2 * channels, x_stride
 * unused, layout NC_ROWS, y_stride >= outputs. pad < kernel, and at least one window. Pointwise convolution is nc_linear with tokens =
 * height * width. */
typedef struct {
    nc_linear_t linear;
    int32_t x_zero;
    uint32_t height, width, channels; /* of the input */
    uint32_t kernel, stride, pad;
} nc_conv_t;
#define NC_CONV_OUT(size, kernel, stride, pad) (((size) + 2U * (pad) - (kernel)) / (stride) + 1U)
/* scratch: NC_LINEAR_SCRATCH(kernel^2 * channels) + ceil8(kernel^2 * channels) bytes */
#define NC_CONV_SCRATCH(inputs) (NC_LINEAR_SCRATCH(inputs) + (((inputs) + 7U) & ~7U))
void nc_conv(const nc_conv_t *op, const int8_t *x, const int8_t *residual, int8_t *y, void *scratch);

/* Depthwise convolution 3x3: sum = bias_c + sum over the window inside the image of w_c (x_c - x_zero), then requantize, then table.
 * weights: for each four channels (padded with zeros): int32 bias[4]; for each of the nine taps, row by row, bytes w of the four channels;
 * int32 M[4]. Words: ceil(channels / 4) * 17. The bias is the layer's own: nothing is folded into it.
 * pad < 3, and at least one window. */
typedef struct {
    const uint32_t *weights;
    const int8_t *table; /* NULL or 256 entries as in nc_linear */
    int32_t x_zero, zero_point;
    uint32_t height, width, channels;
    uint32_t stride, pad;
} nc_depthwise_t;
#define NC_DEPTHWISE_SCRATCH(width, pad) (24U * ((width) + 2U * (pad)))
void nc_depthwise(const nc_depthwise_t *op, const int8_t *x, int8_t *y, void *scratch);

/* Average of kernel x kernel windows without padding: y = sat8(zero_point + hi((sum - kernel^2 * x_zero) * 256, multiplier)),
 * multiplier = round(x scale / (kernel^2 * y scale) * 2^24), kernel^2 <= 16384. Over the whole image: nc_mean with rows = height * width.
 */
typedef struct {
    int32_t multiplier, x_zero, zero_point;
    uint32_t height, width, channels;
    uint32_t kernel, stride;
} nc_average_pool_t;
void nc_average_pool(const nc_average_pool_t *op, const int8_t *x, int8_t *y);

#endif
