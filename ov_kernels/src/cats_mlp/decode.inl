// The kernels, written once over a few vector operations. A translation unit of one instruction set defines those
// operations in its own unnamed namespace and then includes this file there, so nothing leaks to other units:
//
//   F, I              vectors of `lanes` floats and of as many 32-bit integers
//   tile_rows(m)      weight rows whose dot products with m tokens fit the registers together
//   down_tokens       tokens, at most 5, whose sums of Wdown for 4 vectors of columns fit the registers together
//   tile_vectors      vectors of output columns that a prefill tile has, for up to 6 tokens
//   f_*, i_*          arithmetic, loads without alignment, f16 and integer conversions
//   i_dot16(a, x, y)  a + pairwise products of 16-bit integers;  i_dot8(a, u, s): of 8-bit, unsigned by signed, by fours
//   i_zip16           pairs of 16-bit integers from two vectors, as i_dot16 takes them; i_unzip16 undoes its order
//   i_zip8            fours of bytes from four vectors, as i_dot8 takes them; i_unzip8 undoes its order
//   transpose         lanes x lanes 32-bit words from rows of their own, to dense rows
//
// Decode is bound by memory: every live row is read once, in order where all live, and software prefetch runs one tile
// ahead, into L2, because hardware prefetchers stop at the end of a row that is followed by a dead one.

// body(0), ..., body(n - 1) with constants: registers that a loop would index stay registers, while gcc stores an array's
// elements in every step of the loop around it.
template <int n>
struct Index {
    constexpr operator int() const {
        return n;
    }
};

template <int n, class Body>
inline void unroll(const Body& body) {
    if constexpr (n > 0) {
        unroll<n - 1>(body);
        body(Index<n - 1>{});
    }
}

constexpr std::size_t half = block / 2;
constexpr std::size_t max_groups = max_columns / block;
constexpr std::size_t max_batch = 64;     // neurons whose rows of Wup and Wdown lie in L2 together
constexpr std::size_t dot_rows_at_once = 4;
constexpr std::size_t prefill_tokens = 6;
constexpr float dense_above = 0.65f;  // live share of 128 neurons above which all are read, in order

inline F exp_of(F x) {
    // 2^n * e^r with |r| <= ln 2 / 2; relative error 2e-7. The order of min and max lets NaN through.
    x = f_min(f_set(88.3f), f_max(f_set(-87.3f), x));
    const F n = f_round(f_mul(x, f_set(1.44269504f)));
    F r = f_fma(n, f_set(-0.693359375f), x);
    r = f_fma(n, f_set(2.12194440e-4f), r);
    F p = f_set(1.9875691500e-4f);
    p = f_fma(p, r, f_set(1.3981999507e-3f));
    p = f_fma(p, r, f_set(8.3334519073e-3f));
    p = f_fma(p, r, f_set(4.1665795894e-2f));
    p = f_fma(p, r, f_set(1.6666665459e-1f));
    p = f_fma(p, r, f_set(5.0000001201e-1f));
    p = f_fma(p, f_mul(r, r), f_add(r, f_set(1.0f)));
    return f_mul(p, f_power_of_2(n));
}

inline F silu(F x) {
    return f_div(x, f_add(f_set(1.0f), exp_of(f_sub(f_set(0.0f), x))));
}

inline F gelu_tanh(F x) {  // 0.5 x (1 + tanh u) = x / (1 + e^-2u)
    const F cubic = f_fma(f_mul(f_set(0.044715f), f_mul(x, x)), x, x);
    return f_div(x, f_add(f_set(1.0f), exp_of(f_mul(f_set(-1.59576912f), cubic))));
}

inline F gelu_erf(F x) {  // erf by Abramowitz and Stegun 7.1.26: absolute error below 1.5e-7
    const F z = f_mul(f_abs(x), f_set(0.70710678f));
    const F t = f_div(f_set(1.0f), f_fma(z, f_set(0.3275911f), f_set(1.0f)));
    F p = f_fma(t, f_set(1.061405429f), f_set(-1.453152027f));
    p = f_fma(t, p, f_set(1.421413741f));
    p = f_fma(t, p, f_set(-0.284496736f));
    p = f_mul(t, f_fma(t, p, f_set(0.254829592f)));
    const F tail = f_mul(p, exp_of(f_sub(f_set(0.0f), f_mul(z, z))));  // 1 - erf |z|
    return f_mul(f_mul(f_set(0.5f), x), f_add(f_set(1.0f), f_copysign(f_sub(f_set(1.0f), tail), x)));
}

void activate(Activation activation, float* values, std::size_t count) {  // count is a multiple of 16
    for (std::size_t i = 0; i < count; i += lanes) {
        const F x = f_load(values + i);
        f_store(values + i, activation == Activation::silu        ? silu(x)
                            : activation == Activation::gelu_tanh ? gelu_tanh(x)
                                                                  : gelu_erf(x));
    }
}

inline float threshold_of(const Thresholds& thresholds, std::size_t neuron) {
    return f_first(thresholds.values + (thresholds.count == 1 ? 0 : neuron));
}

// ---- weight formats. load: columns c.. and c + 64.. of a block, lanes of each; load16: twice as many, as 16 bits;
// load8: four times as many, as unsigned bytes that are `shift` too large.

struct I8 {
    static constexpr bool is_grouped = false;
    static constexpr bool has_scale = true;
    static constexpr float shift = 128;
    static constexpr std::size_t block_bytes = block;
    static void load(const std::uint8_t* p, std::size_t c, F& low, F& high) {
        low = f_from_i8(p + c);
        high = f_from_i8(p + c + half);
    }
    static void load16(const std::uint8_t* p, std::size_t c, I& low, I& high) {
        low = i_16_from_i8(p + c);
        high = i_16_from_i8(p + c + half);
    }
    static void load8(const std::uint8_t* p, std::size_t c, I& low, I& high) {
        low = load8_half(p, c, 0);
        high = load8_half(p, c, 1);
    }
    static I load8_half(const std::uint8_t* p, std::size_t c, int part) {
        return i_unsigned(i_load(p + c + (part ? half : 0)));
    }
};

struct U4 {
    static constexpr bool is_grouped = true;
    static constexpr bool has_scale = true;
    static constexpr float shift = 0;
    static constexpr std::size_t block_bytes = block / 2;
    static void load(const std::uint8_t* p, std::size_t c, F& low, F& high) {
        f_from_u4(p + c, low, high);
    }
    static void load16(const std::uint8_t* p, std::size_t c, I& low, I& high) {
        i_16_from_u4(p + c, low, high);
    }
    static void load8(const std::uint8_t* p, std::size_t c, I& low, I& high) {
        low = load8_half(p, c, 0);
        high = load8_half(p, c, 1);
    }
    static I load8_half(const std::uint8_t* p, std::size_t c, int part) {
        return part ? i_high_u4(i_load(p + c)) : i_low_u4(i_load(p + c));
    }
};

struct BF16 {
    static constexpr bool is_grouped = false;
    static constexpr bool has_scale = false;
    static constexpr float shift = 0;
    static constexpr std::size_t block_bytes = block * 2;
    static void load(const std::uint8_t* p, std::size_t c, F& low, F& high) {
        low = f_from_bf16(p + 2 * c);
        high = f_from_bf16(p + 2 * (c + half));
    }
};

// Macros: gcc takes a function that only prefetches for one without effect and drops its calls.
#define EDGE_PREFETCH(p) _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1)
#define EDGE_PREFETCH_BLOCK(W, row, b)                                       \
    for (std::size_t line = 0; line < W::block_bytes; line += 64) {          \
        EDGE_PREFETCH((row) + (b) * W::block_bytes + line);                  \
    }

// ---- tokens

float sum_of(const float* x) {
    F sum = f_set(0.0f);
    for (std::size_t c = 0; c < block; c += lanes) {
        sum = f_add(sum, f_load(x + c));
    }
    return f_sum(sum);
}

// 128 values as integers of `bits`; sets their scale and the sum of what they then stand for.
void quantise(const float* x, int bits, void* q, float& scale, float& sum) {
    scale = f_scale_of(x, bits == 16 ? 32767.0f : 127.0f);
    const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
    const std::int32_t total = bits == 16 ? i_quantise16(x, inverse, static_cast<std::int16_t*>(q))
                                          : i_quantise8(x, inverse, static_cast<std::int8_t*>(q));
    sum = scale * static_cast<float>(total);
}

void prepare(const Weights& w, const float* x, int bits, Tokens& t) {
    const std::size_t blocks = w.columns / block, block_bytes = block * static_cast<std::size_t>(bits) / 8;
    const bool is_prefill = t.rows > max_decode_rows;
    for (std::size_t m = 0; m < t.rows; ++m) {
        t.total[m] = 0;
        for (std::size_t b = 0; b < blocks; ++b) {
            float padded[block];
            for (std::size_t c = 0; c < block; ++c) {
                const std::size_t column = b * block + c;
                padded[c] = column < w.hidden ? f_first(x + m * w.hidden + column) : 0.0f;
            }
            const std::size_t entry = is_prefill ? b * t.rows + m : m * blocks + b;
            void* to = static_cast<std::uint8_t*>(t.values) + entry * block_bytes;
            if (bits == 32) {
                for (std::size_t c = 0; c < block; c += lanes) {
                    f_store(static_cast<float*>(to) + c, f_load(padded + c));
                }
                t.sum[entry] = sum_of(padded);
            } else {
                quantise(padded, bits, to, t.scale[entry], t.sum[entry]);
            }
            t.total[m] += t.sum[entry];
        }
    }
}

// ---- dot products of R weight rows with M tokens, whose values have 32, 16 or 8 bits

template <int bits>
struct ValuesOf {
    using type = float;
};
template <>
struct ValuesOf<16> {
    using type = std::int16_t;
};
template <>
struct ValuesOf<8> {
    using type = std::int8_t;
};
template <int bits>
using Values = typename ValuesOf<bits>::type;

// The scales of a row's blocks, times the tokens' where `t` has integers, and what zeros take off: the sum over blocks
// of scale * zero * sum of the token's values.
template <int bits, int M>
inline void row_scales(const Matrix& a, std::size_t row, const Tokens& t, std::size_t m0,
                       float (&scales)[M][max_groups + lanes], float (&off)[M]) {
    F taken[M];
    for (int m = 0; m < M; ++m) {
        taken[m] = f_set(0.0f);
    }
    for (std::size_t g = 0; g < a.groups; g += lanes) {
        const std::size_t count = a.groups - g < lanes ? a.groups - g : lanes;
        const F scale = f_from_f16(a.scale + row * a.groups + g, count);
        const F product = f_mul(scale, f_from_i8(a.zero + row * a.groups + g, count));
        for (int m = 0; m < M; ++m) {
            const F with_token = bits == 32 ? scale : f_mul(scale, f_load(t.scale + (m0 + m) * a.groups + g, count));
            f_store(scales[m] + g, with_token);
            taken[m] = f_fma(product, f_load(t.sum + (m0 + m) * a.groups + g, count), taken[m]);
        }
    }
    for (int m = 0; m < M; ++m) {
        off[m] = f_sum(taken[m]);
    }
}

template <class W, int R, int M>
inline void add_block16(const std::uint8_t* const* p, const std::int16_t* const* x, std::size_t b, I (&sums)[R][M]) {
    for (std::size_t c = 0; c < half; c += 2 * lanes) {
        I low[R], high[R];
        unroll<R>([&](auto r) { W::load16(p[r] + b * W::block_bytes, c, low[r], high[r]); });
        unroll<M>([&](auto m) {
            const I x_low = i_load(x[m] + b * block + c), x_high = i_load(x[m] + b * block + half + c);
            unroll<R>([&](auto r) {
                sums[r][m] = i_dot16(i_dot16(sums[r][m], low[r], x_low), high[r], x_high);
            });
        });
    }
}

template <class W, int R, int M>
inline void add_block8(const std::uint8_t* const* p, const std::int8_t* const* x, std::size_t b, I (&sums)[R][M]) {
    for (std::size_t c = 0; c < half; c += 4 * lanes) {
        I low[R], high[R];
        unroll<R>([&](auto r) { W::load8(p[r] + b * W::block_bytes, c, low[r], high[r]); });
        unroll<M>([&](auto m) {
            const I x_low = i_load(x[m] + b * block + c), x_high = i_load(x[m] + b * block + half + c);
            unroll<R>([&](auto r) {
                sums[r][m] = i_dot8(i_dot8(sums[r][m], low[r], x_low), high[r], x_high);
            });
        });
    }
}

template <class W, int R, int M>
inline void add_block32(const std::uint8_t* const* p, const float* const* x, std::size_t b, F (&sums)[R][M]) {
    for (std::size_t c = 0; c < half; c += lanes) {
        F low[R], high[R];
        unroll<R>([&](auto r) { W::load(p[r] + b * W::block_bytes, c, low[r], high[r]); });
        unroll<M>([&](auto m) {
            const F x_low = f_load(x[m] + b * block + c), x_high = f_load(x[m] + b * block + half + c);
            unroll<R>([&](auto r) { sums[r][m] = f_fma(high[r], x_high, f_fma(low[r], x_low, sums[r][m])); });
        });
    }
}

// total += scale of row and tokens * the block's dot products.
template <class W, int bits, int R, int M>
inline void add_block(const std::uint8_t* const* p, const Values<bits>* const* x, std::size_t b,
                      const float* const (&scales)[R][M], F (&total)[R][M]) {
    if constexpr (bits == 32) {
        F sums[R][M];
        unroll<R>([&](auto r) { unroll<M>([&](auto m) { sums[r][m] = f_set(0.0f); }); });
        add_block32<W, R, M>(p, x, b, sums);
        unroll<R>([&](auto r) {
            unroll<M>([&](auto m) {
                total[r][m] = W::is_grouped ? f_fma(sums[r][m], f_set(scales[r][m][b]), total[r][m])
                                            : f_add(sums[r][m], total[r][m]);
            });
        });
    } else {
        I sums[R][M];
        unroll<R>([&](auto r) { unroll<M>([&](auto m) { sums[r][m] = i_zero(); }); });
        if constexpr (bits == 16) {
            add_block16<W, R, M>(p, x, b, sums);
        } else {
            add_block8<W, R, M>(p, x, b, sums);
        }
        unroll<R>([&](auto r) {
            unroll<M>([&](auto m) {
                total[r][m] = f_fma(f_from_i32(sums[r][m]), f_set(scales[r][m][b]), total[r][m]);
            });
        });
    }
}

// out[m * stride + r] = row j[r] . token m0 + m; rows in `next` are prefetched.
template <class W, int bits, int R, int M>
void dot_tile(const Matrix& a, std::size_t blocks, const std::uint32_t* j, const std::uint8_t* const* next,
              const Tokens& t, std::size_t m0, float* out, std::size_t stride) {
    float combined[R][M][max_groups + lanes], off[R][M];
    const std::uint8_t* p[R];
    const Values<bits>* x[M];
    const float* scales[R][M];
    F total[R][M];
    unroll<R>([&](auto r) {
        p[r] = a.rows + j[r] * a.stride;
        if (W::is_grouped) {
            row_scales<bits, M>(a, j[r], t, m0, combined[r], off[r]);
        }
        unroll<M>([&](auto m) {
            total[r][m] = f_set(0.0f);
            scales[r][m] = W::is_grouped ? combined[r][m] : t.scale + (m0 + m) * blocks;
        });
    });
    unroll<M>([&](auto m) { x[m] = static_cast<const Values<bits>*>(t.values) + (m0 + m) * blocks * block; });
    for (std::size_t b = 0; b < blocks; ++b) {
        for (int r = 0; r < R; ++r) {
            EDGE_PREFETCH_BLOCK(W, next[r], b)
        }
        add_block<W, bits, R, M>(p, x, b, scales, total);
    }
    unroll<R>([&](auto r) {
        unroll<M>([&](auto m) {
            float value = f_sum(total[r][m]);
            if (W::is_grouped) {
                value -= off[r][m];
            } else if (W::has_scale) {
                const float zero = static_cast<float>(a.zero[j[r]]) + (bits == 8 ? W::shift : 0.0f);
                value = f_one_f16(a.scale + j[r]) * (value - zero * t.total[m0 + m]);
            }
            out[m * stride + r] = value;
        });
    });
}

// `count` rows (1 to 4) with M tokens; rows that fill up a tile repeat the last one.
template <class W, int bits, int M>
void dot_rows(const Matrix& a, std::size_t blocks, const std::uint32_t* j, const std::uint8_t* const* next,
              std::size_t count, const Tokens& t, std::size_t m0, float* out, std::size_t stride) {
    constexpr int R = tile_rows(M);
    for (std::size_t r = 0; r < count; r += R) {
        float tile[R * M];
        std::uint32_t rows[R];
        const std::uint8_t* ahead[R];
        for (std::size_t i = 0; i < R; ++i) {
            rows[i] = j[r + i < count ? r + i : count - 1];
            ahead[i] = next[r + i < count ? r + i : count - 1];
        }
        dot_tile<W, bits, R, M>(a, blocks, rows, ahead, t, m0, tile, R);
        for (std::size_t i = 0; i < R && r + i < count; ++i) {
            for (int m = 0; m < M; ++m) {
                out[m * stride + r + i] = tile[m * R + i];
            }
        }
    }
}

template <class W, int bits>
void dots(const Matrix& a, std::size_t blocks, const std::uint32_t* j, const std::uint8_t* const* next,
          std::size_t count, const Tokens& t, float* out, std::size_t stride) {
    using Rows = void (*)(const Matrix&, std::size_t, const std::uint32_t*, const std::uint8_t* const*, std::size_t,
                          const Tokens&, std::size_t, float*, std::size_t);
    static constexpr Rows by_tokens[] = {dot_rows<W, bits, 1>, dot_rows<W, bits, 2>, dot_rows<W, bits, 3>,
                                         dot_rows<W, bits, 4>, dot_rows<W, bits, 5>, dot_rows<W, bits, 6>};
    const std::size_t most = t.rows <= 6 ? t.rows : 4;
    for (std::size_t m = 0; m < t.rows; m += most) {
        const std::size_t tokens = t.rows - m < most ? t.rows - m : most;
        by_tokens[tokens - 1](a, blocks, j, next, count, t, m, out + m * stride, stride);
    }
}

// ---- decode

// Neurons that are computed together: their rows of Wup, then of Wdown, each while the other's next rows come to L2.
struct Batch {
    const std::uint32_t* live;
    std::size_t count;
    const std::uint8_t* down[max_batch];
    const std::uint8_t* next[max_batch];  // rows of Wup of the batch after this one
    float c[max_batch][max_decode_rows];  // activations, then coefficients of the rows of Wdown
    // Coefficients as integers in groups of n = 2 (16 bits) or 4 (8 bits) rows, [max_batch / n][8][n], and their scales
    // and sums, one for each token.
    alignas(4) std::int8_t q[2 * max_batch * max_decode_rows];
    float scale[max_decode_rows];
    float sum[max_decode_rows];
};

template <class W, int bits>
void multiply_up(const Weights& w, const Tokens& t, Batch& batch) {
    float up[max_decode_rows * max_batch];
    for (std::size_t i = 0; i < batch.count; i += dot_rows_at_once) {
        const std::size_t rows = batch.count - i < dot_rows_at_once ? batch.count - i : dot_rows_at_once;
        dots<W, bits>(w.up, w.columns / block, batch.live + i, batch.down + i, rows, t, up + i, max_batch);
    }
    for (std::size_t m = 0; m < t.rows; ++m) {
        for (std::size_t i = 0; i < batch.count; ++i) {
            batch.c[i][m] *= up[m * max_batch + i];
        }
    }
}

// Scales are NaN where a coefficient is not finite.
template <int bits>
void quantise_batch(Batch& batch, std::size_t tokens) {
    constexpr std::size_t n = 32 / bits;
    Values<bits>* to = reinterpret_cast<Values<bits>*>(batch.q);
    for (std::size_t m = 0; m < tokens; ++m) {
        float c[block] = {};
        Values<bits> q[block];
        for (std::size_t i = 0; i < batch.count; ++i) {
            c[i] = batch.c[i][m];
        }
        quantise(c, bits, q, batch.scale[m], batch.sum[m]);
        for (std::size_t i = 0; i < max_batch; ++i) {
            to[(i / n * max_decode_rows + m) * n + i % n] = q[i];
        }
    }
}

// In f32 one by one: a token's sum must not depend on how the other tokens' neurons divide it into batches.
template <int bits>
void sum_up(const Batch& batch, std::size_t tokens, float* coefficients) {
    for (std::size_t m = 0; m < tokens; ++m) {
        if (bits != 32) {
            coefficients[m] += batch.sum[m];
        } else {
            for (std::size_t i = 0; i < batch.count; ++i) {
                coefficients[m] += batch.c[i][m];
            }
        }
    }
}

// Adds the batch's rows of Wdown in f32: sums[m][column] += sum over rows of c[row][m] * q.
template <class W>
void add_down32(const Batch& batch, std::size_t b, std::size_t column, std::size_t tokens, float* sums,
                std::size_t stride) {
    for (std::size_t m = 0; m < tokens; ++m) {
        float* to = sums + m * stride + b * block + column;
        F sum_low = f_load(to), sum_high = f_load(to + half);
        for (std::size_t i = 0; i < batch.count; ++i) {
            F low, high;
            W::load(batch.down[i] + b * W::block_bytes, column, low, high);
            sum_low = f_fma(low, f_set(batch.c[i][m]), sum_low);
            sum_high = f_fma(high, f_set(batch.c[i][m]), sum_high);
        }
        f_store(to, sum_low);
        f_store(to + half, sum_high);
    }
}

// sums[lanes] += scale * integers - off.
inline void add_scaled(float* sums, I integers, F scale, F off) {
    f_store(sums, f_fma(f_from_i32(integers), scale, f_sub(f_load(sums), off)));
}

// The same with 16-bit coefficients, two rows at a time. No sum of 64 products of 16 and 8 bits exceeds 31 bits.
template <class W, int M>
void add_down16(const Batch& batch, std::size_t b, std::size_t column, std::size_t m0, float* sums,
                std::size_t stride) {
    I total[M][4];
    unroll<M>([&](auto m) { unroll<4>([&](auto v) { total[m][v] = i_zero(); }); });
    for (std::size_t i = 0; i < batch.count; i += 2) {
        I low[2], high[2], rows[4];
        W::load16(batch.down[i] + b * W::block_bytes, column, low[0], high[0]);
        W::load16(batch.down[i + 1] + b * W::block_bytes, column, low[1], high[1]);
        i_zip16(low[0], low[1], rows[0], rows[1]);
        i_zip16(high[0], high[1], rows[2], rows[3]);
        unroll<M>([&](auto m) {
            const I pair = i_set_word(batch.q + (i / 2 * max_decode_rows + m0 + m) * 4);
            unroll<4>([&](auto v) { total[m][v] = i_dot16(total[m][v], rows[v], pair); });
        });
    }
    unroll<M>([&](auto m) {
        float* to = sums + (m0 + m) * stride + b * block + column;
        const F scale = f_set(batch.scale[m0 + m]), off = f_set(0.0f);
        I ordered[4];
        i_unzip16(total[m][0], total[m][1], ordered[0], ordered[1]);
        i_unzip16(total[m][2], total[m][3], ordered[2], ordered[3]);
        add_scaled(to, ordered[0], scale, off);
        add_scaled(to + lanes, ordered[1], scale, off);
        add_scaled(to + half, ordered[2], scale, off);
        add_scaled(to + half + lanes, ordered[3], scale, off);
    });
}

// The same with 8-bit coefficients, four rows at a time: one half of a block's columns after the other.
template <class W, int M>
void add_down8(const Batch& batch, std::size_t b, std::size_t column, std::size_t m0, float* sums,
               std::size_t stride) {
    for (int part = 0; part < 2; ++part) {
        I total[M][4];
        unroll<M>([&](auto m) { unroll<4>([&](auto v) { total[m][v] = i_zero(); }); });
        for (std::size_t i = 0; i < batch.count; i += 4) {
            I rows[4];
            unroll<4>([&](auto r) {
                rows[r] = W::load8_half(batch.down[i + r] + b * W::block_bytes, column, part);
            });
            i_zip8(rows);
            unroll<M>([&](auto m) {
                const I four = i_set_word(batch.q + (i / 4 * max_decode_rows + m0 + m) * 4);
                unroll<4>([&](auto v) { total[m][v] = i_dot8(total[m][v], rows[v], four); });
            });
        }
        unroll<M>([&](auto m) {
            float* to = sums + (m0 + m) * stride + b * block + (part ? half : 0) + column;
            const F scale = f_set(batch.scale[m0 + m]), off = f_set(W::shift * batch.sum[m0 + m]);
            i_unzip8(total[m]);
            unroll<4>([&](auto v) { add_scaled(to + v * lanes, total[m][v], scale, off); });
        });
    }
}

template <class W, int bits>
void add_down(const Weights& w, const Batch& batch, std::size_t tokens, float* sums, std::size_t stride) {
    using Add = void (*)(const Batch&, std::size_t, std::size_t, std::size_t, float*, std::size_t);
    constexpr std::size_t step = lanes * 32 / bits;
    const std::size_t parts = (tokens + down_tokens - 1) / down_tokens, most = (tokens + parts - 1) / parts;
    for (std::size_t b = 0; b < w.columns / block; ++b) {
        for (std::size_t i = 0; i < batch.count; ++i) {
            EDGE_PREFETCH_BLOCK(W, batch.next[i], b)
        }
        for (std::size_t column = 0; column < half; column += step) {
            if constexpr (bits == 32) {
                add_down32<W>(batch, b, column, tokens, sums, stride);
            } else {
                static constexpr Add by_16[] = {add_down16<W, 1>, add_down16<W, 2>, add_down16<W, 3>,
                                                add_down16<W, 4>, add_down16<W, 5>};
                static constexpr Add by_8[] = {add_down8<W, 1>, add_down8<W, 2>, add_down8<W, 3>, add_down8<W, 4>,
                                               add_down8<W, 5>};
                for (std::size_t m = 0; m < tokens; m += most) {
                    const std::size_t count = tokens - m < most ? tokens - m : most;
                    (bits == 16 ? by_16 : by_8)[count - 1](batch, b, column, m, sums, stride);
                }
            }
        }
    }
}

// Clears dead activations in g [rows][stride]; writes the neurons to read, in order, and returns their number.
std::size_t live_neurons(const Thresholds& thresholds, std::size_t first, std::size_t count, std::size_t rows,
                         float* g, std::size_t stride, std::uint32_t* live) {
    std::size_t found = 0;
    for (std::size_t j = 0; j < count; ++j) {
        const float limit = threshold_of(thresholds, first + j);
        bool is_alive = false;
        for (std::size_t m = 0; m < rows; ++m) {
            float& value = g[m * stride + j];
            const bool is_dead = value <= limit && value >= -limit;
            value = is_dead ? 0.0f : value;
            is_alive |= !is_dead;
        }
        live[found] = static_cast<std::uint32_t>(first + j);
        found += is_alive;
    }
    if (static_cast<float>(found) <= dense_above * static_cast<float>(count)) {
        return found;
    }
    for (std::size_t j = 0; j < count; ++j) {
        live[j] = static_cast<std::uint32_t>(first + j);
    }
    return count;
}

// Takes a block's raw sums of Wdown to final ones: sums += scale * (raw - zero * sum of coefficients).
void fold_group(const Weights& w, std::size_t group, std::size_t rows, const float* raw, const float* coefficients,
                float* sums) {
    const std::size_t stride = sums_stride_of(w.columns);
    for (std::size_t i = 0; i < w.columns; i += lanes) {
        const F scale = f_from_f16(w.down_scale + group * w.columns + i, lanes);
        const F zero = f_from_i8(w.down_zero + group * w.columns + i, lanes);
        for (std::size_t m = 0; m < rows; ++m) {
            const F shifted = f_fma(zero, f_set(-coefficients[m]), f_load(raw + m * w.columns + i));
            f_store(sums + m * stride + i, f_fma(scale, shifted, f_load(sums + m * stride + i)));
        }
    }
}

// g[m][j] = f(gate row first + j . token m). `rows` holds the numbers of the rows.
template <class W, int bits>
void gate_of(const Weights& w, const Tokens& t, const std::uint32_t* rows, std::size_t count, float* g,
             std::size_t stride) {
    for (std::size_t j = 0; j < count; j += dot_rows_at_once) {
        const std::size_t tile = count - j < dot_rows_at_once ? count - j : dot_rows_at_once;
        const std::uint8_t* next[dot_rows_at_once];
        for (std::size_t r = 0; r < dot_rows_at_once; ++r) {
            const std::size_t ahead = j + dot_rows_at_once + r < count ? j + dot_rows_at_once + r : j;
            next[r] = w.gate.rows + rows[ahead] * w.gate.stride;
        }
        dots<W, bits>(w.gate, w.columns / block, rows + j, next, tile, t, g + j, stride);
    }
    activate(w.activation, g, t.rows * stride);
}

// The batch that begins with live[i]; in 4 bits it ends with the neurons that share their scales of Wdown.
template <class W>
void make_batch(const Weights& w, const std::uint32_t* live, std::size_t found, std::size_t i,
                Batch& batch) {
    batch.live = live + i;
    batch.count = 0;
    while (batch.count < max_batch && i + batch.count < found &&
           (!W::is_grouped || live[i + batch.count] / block == live[i] / block)) {
        ++batch.count;
    }
    for (std::size_t r = 0; r < max_batch; ++r) {
        const std::size_t ahead = i + batch.count + r;
        batch.down[r] = w.down + batch.live[r < batch.count ? r : 0] * w.up.stride;
        batch.next[r] = w.up.rows + live[ahead < found ? ahead : i] * w.up.stride;
        for (std::size_t m = 0; m < max_decode_rows; ++m) {
            batch.c[r][m] = 0;
        }
    }
}

template <class W, int bits>
std::size_t decode_range(const Weights& w, const Thresholds& thresholds, const Tokens& t, std::size_t first,
                         std::size_t last, float* sums, float* scratch) {
    const std::size_t count = last - first, padded = (count + 15) / 16 * 16;
    const std::size_t stride = W::is_grouped ? w.columns : sums_stride_of(w.columns);
    float* g = scratch;                                                    // [rows][padded]
    std::uint32_t* live = reinterpret_cast<std::uint32_t*>(g + t.rows * padded);  // [padded + 16]
    float* to = W::is_grouped ? g + (t.rows + 1) * padded + 16 : sums;     // [rows][stride]
    float coefficients[max_decode_rows] = {};
    for (std::size_t i = 0; i < t.rows * padded; ++i) {
        g[i] = 0;
    }
    for (std::size_t j = 0; j < count; ++j) {
        live[j] = static_cast<std::uint32_t>(first + j);
    }
    gate_of<W, bits>(w, t, live, count, g, padded);
    const std::size_t found = live_neurons(thresholds, first, count, t.rows, g, padded, live);
    Batch batch;
    for (std::size_t i = 0; i < found; i += batch.count) {
        make_batch<W>(w, live, found, i, batch);
        for (std::size_t r = 0; r < batch.count; ++r) {
            for (std::size_t m = 0; m < t.rows; ++m) {
                batch.c[r][m] = g[m * padded + live[i + r] - first];
            }
            for (std::size_t b = 0; i == 0 && b < w.columns / block; ++b) {
                EDGE_PREFETCH_BLOCK(W, w.up.rows + live[r] * w.up.stride, b)
            }
        }
        const bool begins_group = W::is_grouped && (i == 0 || live[i] / block != live[i - 1] / block);
        for (std::size_t k = 0; begins_group && k < t.rows * w.columns; ++k) {
            to[k] = 0;
        }
        multiply_up<W, bits>(w, t, batch);
        if constexpr (bits != 32) {
            quantise_batch<bits>(batch, t.rows);
        }
        sum_up<bits>(batch, t.rows, coefficients);
        add_down<W, bits>(w, batch, t.rows, to, stride);
        const std::size_t after = i + batch.count;
        if (W::is_grouped && (after == found || live[after] / block != live[i] / block)) {
            fold_group(w, live[i] / block, t.rows, to, coefficients, sums);
            for (float& coefficient : coefficients) {
                coefficient = 0;
            }
        }
    }
    for (std::size_t m = 0; m < t.rows; ++m) {
        sums[m * sums_stride_of(w.columns) + w.columns] = coefficients[m];
    }
    const std::size_t row = w.row_bytes + 3 * w.gate.groups, groups = W::is_grouped ? (count + block - 1) / block : 0;
    return count * row + found * (row + w.row_bytes) + groups * 3 * w.columns;
}

template <class W>
std::size_t decode_format(const Weights& w, const Thresholds& thresholds, const Tokens& t, int bits, std::size_t first,
                          std::size_t last, float* sums, float* scratch) {
    return (bits == 32   ? decode_range<W, 32>
            : bits == 16 ? decode_range<W, 16>
                         : decode_range<W, 8>)(w, thresholds, t, first, last, sums, scratch);
}

std::size_t decode(const Weights& w, const Thresholds& thresholds, const Tokens& t, int bits, std::size_t first,
                   std::size_t last, float* sums, float* scratch) {
    if (w.format == Format::bf16) {
        return decode_range<BF16, 32>(w, thresholds, t, first, last, sums, scratch);
    }
    return (w.format == Format::i8 ? decode_format<I8> : decode_format<U4>)(w, thresholds, t, bits, first, last, sums,
                                                                            scratch);
}

void finish(const Weights& w, const float* sums, std::size_t count, std::size_t rows, std::size_t begin,
            std::size_t end, float* y) {
    const std::size_t stride = sums_stride_of(w.columns);
    for (std::size_t m = 0; m < rows; ++m) {
        float coefficients = 0;
        for (std::size_t k = 0; k < count; ++k) {
            coefficients += sums[(k * rows + m) * stride + w.columns];
        }
        for (std::size_t i = begin; i < end; i += lanes) {
            F sum = f_set(0.0f);
            for (std::size_t k = 0; k < count; ++k) {
                sum = f_add(sum, f_load(sums + (k * rows + m) * stride + i));
            }
            if (w.format == Format::i8) {
                sum = f_fma(f_from_i8(w.down_zero + i, lanes), f_set(-coefficients), sum);
                sum = f_mul(sum, f_from_f16(w.down_scale + i, lanes));
            }
            f_store(y + m * w.hidden + i, sum, end - i < lanes ? end - i : lanes);
        }
    }
}
