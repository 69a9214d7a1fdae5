// The kernels, written once over a few vector operations. A translation unit of one instruction set defines those
// operations in its own unnamed namespace and then includes this file there, so nothing leaks to other units:
//
//   F, I              vectors of `lanes` floats and of as many 32-bit integers
//   tile_rows(m)      weight rows whose dot products with m tokens fit the registers together
//   tile_vectors      vectors of output columns that a prefill tile has, for up to 6 tokens
//   f_*, i_*          arithmetic, loads without alignment, f16 and integer conversions
//   i_dot16(a, x, y)  a + pairwise products of 16-bit integers;  i_dot8(a, u, s): of 8-bit, unsigned by signed, by fours
//   transpose         lanes x lanes 32-bit words from rows of their own, to dense rows
//
// Decode is bound by memory: every live row is read once, in order where all live, and software prefetch runs one tile
// ahead, into L2, because hardware prefetchers stop at the end of a row that is followed by a dead one.

constexpr std::size_t half = block / 2;
constexpr std::size_t max_groups = max_columns / block;
constexpr std::size_t axpy_rows = 4;
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

// ---- weight formats. load: columns c.. and c + 64.. of a block, lanes of each; load16: twice as many, as 16 bits.

struct I8 {
    static constexpr bool is_grouped = false;
    static constexpr bool has_scale = true;
    static constexpr std::size_t block_bytes = block;
    static void load(const std::uint8_t* p, std::size_t c, F& low, F& high) {
        low = f_from_i8(p + c);
        high = f_from_i8(p + c + half);
    }
    static void load16(const std::uint8_t* p, std::size_t c, I& low, I& high) {
        low = i_16_from_i8(p + c);
        high = i_16_from_i8(p + c + half);
    }
};

struct U4 {
    static constexpr bool is_grouped = true;
    static constexpr bool has_scale = true;
    static constexpr std::size_t block_bytes = block / 2;
    static void load(const std::uint8_t* p, std::size_t c, F& low, F& high) {
        f_from_u4(p + c, low, high);
    }
    static void load16(const std::uint8_t* p, std::size_t c, I& low, I& high) {
        i_16_from_u4(p + c, low, high);
    }
};

struct BF16 {
    static constexpr bool is_grouped = false;
    static constexpr bool has_scale = false;
    static constexpr std::size_t block_bytes = block * 2;
    static void load(const std::uint8_t* p, std::size_t c, F& low, F& high) {
        low = f_from_bf16(p + 2 * c);
        high = f_from_bf16(p + 2 * (c + half));
    }
};

template <class W>
inline void prefetch_block(const std::uint8_t* row, std::size_t b) {
    for (std::size_t line = 0; line < W::block_bytes; line += 64) {
        prefetch(row + b * W::block_bytes + line);
    }
}

// ---- tokens

void quantise16(const float* x, Tokens& t, std::size_t index, std::size_t b) {
    const float scale = f_scale_of(x, 32767.0f);
    t.scale[b] = scale;
    t.sum[b] = scale * static_cast<float>(i_quantise16(x, scale > 0 ? 1.0f / scale : 0.0f, t.q16 + index));
}

void quantise8(const float* x, std::int8_t* q, float& scale, float& sum) {
    scale = f_scale_of(x, 127.0f);
    sum = scale * static_cast<float>(i_quantise8(x, scale > 0 ? 1.0f / scale : 0.0f, q));
}

void prepare(const Weights& w, const float* x, int bits, Tokens& t) {
    const std::size_t blocks = w.columns / block;
    for (std::size_t m = 0; m < t.rows; ++m) {
        float total = 0;
        for (std::size_t b = 0; b < blocks; ++b) {
            float padded[block];
            for (std::size_t c = 0; c < block; ++c) {
                const std::size_t column = b * block + c;
                padded[c] = column < w.hidden ? f_first(x + m * w.hidden + column) : 0.0f;
            }
            const std::size_t entry = m * blocks + b, index = entry * block;
            if (bits == 16) {
                quantise16(padded, t, index, entry);
            } else if (bits == 8) {
                quantise8(padded, t.q8 + index, t.scale[entry], t.sum[entry]);
            } else {
                F sum = f_set(0.0f);
                for (std::size_t c = 0; c < block; c += lanes) {
                    f_store(t.x + index + c, f_load(padded + c));
                    sum = f_add(sum, f_load(padded + c));
                }
                t.sum[entry] = f_sum(sum);
            }
            total += t.sum[entry];
        }
        t.total[m] = total;
    }
}

// ---- dot products of R weight rows with M tokens

// The scales of a row's blocks as floats, and what zeros take off: sum over blocks of scale * zero * sum of tokens.
template <int M>
inline void row_scales(const Matrix& a, std::size_t row, const Tokens& t, std::size_t m0, float* scales, float* off) {
    F taken[M];
    for (int m = 0; m < M; ++m) {
        taken[m] = f_set(0.0f);
    }
    for (std::size_t g = 0; g < a.groups; g += lanes) {
        const std::size_t count = a.groups - g < lanes ? a.groups - g : lanes;
        const F scale = f_from_f16(a.scale + row * a.groups + g, count);
        f_store(scales + g, scale);
        const F product = f_mul(scale, f_from_i8(a.zero + row * a.groups + g, count));
        for (int m = 0; m < M; ++m) {
            taken[m] = f_fma(product, f_load(t.sum + (m0 + m) * a.groups + g, count), taken[m]);
        }
    }
    for (int m = 0; m < M; ++m) {
        off[m] = f_sum(taken[m]);
    }
}

template <class W, int R, int M>
inline void add_block16(const std::uint8_t* const* p, const std::int16_t* const* x, std::size_t b, I (*sums)[M]) {
    for (std::size_t c = 0; c < half; c += 2 * lanes) {
        I low[R], high[R];
        for (int r = 0; r < R; ++r) {
            W::load16(p[r] + b * W::block_bytes, c, low[r], high[r]);
        }
        for (int m = 0; m < M; ++m) {
            const I x_low = i_load(x[m] + b * block + c), x_high = i_load(x[m] + b * block + half + c);
            for (int r = 0; r < R; ++r) {
                sums[r][m] = i_dot16(i_dot16(sums[r][m], low[r], x_low), high[r], x_high);
            }
        }
    }
}

template <class W, int R, int M>
inline void add_block32(const std::uint8_t* const* p, const float* const* x, std::size_t b, F (*sums)[M]) {
    for (std::size_t c = 0; c < half; c += lanes) {
        F low[R], high[R];
        for (int r = 0; r < R; ++r) {
            W::load(p[r] + b * W::block_bytes, c, low[r], high[r]);
        }
        for (int m = 0; m < M; ++m) {
            const F x_low = f_load(x[m] + b * block + c), x_high = f_load(x[m] + b * block + half + c);
            for (int r = 0; r < R; ++r) {
                sums[r][m] = f_fma(high[r], x_high, f_fma(low[r], x_low, sums[r][m]));
            }
        }
    }
}

// out[m * stride + r] = row j[r] . token m0 + m; rows in `next` are prefetched.
template <class W, bool exact, int R, int M>
void dot_tile(const Matrix& a, std::size_t blocks, const std::size_t* j, const std::uint8_t* const* next,
              const Tokens& t, std::size_t m0, float* out, std::size_t stride) {
    float scales[R][W::is_grouped ? max_groups + lanes : 1], off[R][M];
    const std::uint8_t* p[R];
    const float* x[M];
    const std::int16_t* q[M];
    F total[R][M];
    for (int r = 0; r < R; ++r) {
        p[r] = a.rows + j[r] * a.stride;
        if (W::is_grouped) {
            row_scales<M>(a, j[r], t, m0, scales[r], off[r]);
        }
        for (int m = 0; m < M; ++m) {
            total[r][m] = f_set(0.0f);
        }
    }
    for (int m = 0; m < M; ++m) {
        x[m] = exact ? t.x + (m0 + m) * blocks * block : nullptr;
        q[m] = exact ? nullptr : t.q16 + (m0 + m) * blocks * block;
    }
    for (std::size_t b = 0; b < blocks; ++b) {
        for (int r = 0; r < R; ++r) {
            prefetch_block<W>(next[r], b);
        }
        F sums[R][M];
        if constexpr (exact) {
            for (int r = 0; r < R; ++r) {
                for (int m = 0; m < M; ++m) {
                    sums[r][m] = f_set(0.0f);
                }
            }
            add_block32<W, R, M>(p, x, b, sums);
        } else {
            I integers[R][M];
            for (int r = 0; r < R; ++r) {
                for (int m = 0; m < M; ++m) {
                    integers[r][m] = i_zero();
                }
            }
            add_block16<W, R, M>(p, q, b, integers);
            for (int r = 0; r < R; ++r) {
                for (int m = 0; m < M; ++m) {
                    sums[r][m] = f_mul(f_from_i32(integers[r][m]), f_set(t.scale[(m0 + m) * blocks + b]));
                }
            }
        }
        for (int r = 0; r < R; ++r) {
            const F scale = f_set(W::is_grouped ? scales[r][b] : 1.0f);
            for (int m = 0; m < M; ++m) {
                total[r][m] = W::is_grouped ? f_fma(sums[r][m], scale, total[r][m]) : f_add(total[r][m], sums[r][m]);
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int m = 0; m < M; ++m) {
            float value = f_sum(total[r][m]);
            if (W::is_grouped) {
                value -= off[r][m];
            } else if (W::has_scale) {
                value = f_one_f16(a.scale + j[r]) * (value - static_cast<float>(a.zero[j[r]]) * t.total[m0 + m]);
            }
            out[m * stride + r] = value;
        }
    }
}

// `count` rows (1 to 4) with M tokens; rows that fill up a tile repeat the last one.
template <class W, bool exact, int M>
void dot_rows(const Matrix& a, std::size_t blocks, const std::size_t* j, const std::uint8_t* const* next,
              std::size_t count, const Tokens& t, std::size_t m0, float* out, std::size_t stride) {
    constexpr int R = tile_rows(M);
    for (std::size_t r = 0; r < count; r += R) {
        float tile[R * M];
        std::size_t rows[R];
        const std::uint8_t* ahead[R];
        for (std::size_t i = 0; i < R; ++i) {
            rows[i] = j[r + i < count ? r + i : count - 1];
            ahead[i] = next[r + i < count ? r + i : count - 1];
        }
        dot_tile<W, exact, R, M>(a, blocks, rows, ahead, t, m0, tile, R);
        for (std::size_t i = 0; i < R && r + i < count; ++i) {
            for (int m = 0; m < M; ++m) {
                out[m * stride + r + i] = tile[m * R + i];
            }
        }
    }
}

template <class W, bool exact>
void dots(const Matrix& a, std::size_t blocks, const std::size_t* j, const std::uint8_t* const* next,
          std::size_t count, const Tokens& t, float* out, std::size_t stride) {
    using Rows = void (*)(const Matrix&, std::size_t, const std::size_t*, const std::uint8_t* const*, std::size_t,
                          const Tokens&, std::size_t, float*, std::size_t);
    static constexpr Rows by_tokens[] = {dot_rows<W, exact, 1>, dot_rows<W, exact, 2>, dot_rows<W, exact, 3>,
                                         dot_rows<W, exact, 4>, dot_rows<W, exact, 5>, dot_rows<W, exact, 6>};
    const std::size_t most = t.rows <= 6 ? t.rows : 4;
    for (std::size_t m = 0; m < t.rows; m += most) {
        const std::size_t tokens = t.rows - m < most ? t.rows - m : most;
        by_tokens[tokens - 1](a, blocks, j, next, count, t, m, out + m * stride, stride);
    }
}

// ---- decode

// sums[m][column] += sum over 4 rows of c[r][m] * q of row r; rows in `next` are prefetched.
template <class W>
void add_rows(const std::uint8_t* const* p, const std::uint8_t* const* next, const float (*c)[max_decode_rows],
              std::size_t blocks, std::size_t tokens, float* sums, std::size_t stride) {
    for (std::size_t b = 0; b < blocks; ++b) {
        for (std::size_t r = 0; r < axpy_rows; ++r) {
            prefetch_block<W>(next[r], b);
        }
        for (std::size_t column = 0; column < half; column += lanes) {
            F low[axpy_rows], high[axpy_rows];
            for (std::size_t r = 0; r < axpy_rows; ++r) {
                W::load(p[r] + b * W::block_bytes, column, low[r], high[r]);
            }
            for (std::size_t m = 0; m < tokens; ++m) {
                float* to = sums + m * stride + b * block + column;
                F sum_low = f_load(to), sum_high = f_load(to + half);
                for (std::size_t r = 0; r < axpy_rows; ++r) {
                    const F coefficient = f_set(c[r][m]);
                    sum_low = f_fma(low[r], coefficient, sum_low);
                    sum_high = f_fma(high[r], coefficient, sum_high);
                }
                f_store(to, sum_low);
                f_store(to + half, sum_high);
            }
        }
    }
}

// Clears dead activations in g [rows][128]; writes the neurons to read, in order, and returns their number.
std::size_t live_neurons(const Thresholds& thresholds, std::size_t first, std::size_t count, std::size_t rows,
                         float* g, std::size_t* live) {
    std::size_t found = 0;
    for (std::size_t j = 0; j < count; ++j) {
        const float limit = threshold_of(thresholds, first + j);
        bool is_alive = false;
        for (std::size_t m = 0; m < rows; ++m) {
            float& value = g[m * block + j];
            const bool is_dead = value <= limit && value >= -limit;
            value = is_dead ? 0.0f : value;
            is_alive |= !is_dead;
        }
        live[found] = first + j;
        found += is_alive;
    }
    if (static_cast<float>(found) > dense_above * static_cast<float>(count)) {
        for (std::size_t j = 0; j < count; ++j) {
            live[j] = first + j;
        }
        return count;
    }
    return found;
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

// One chunk of at most 128 neurons.
template <class W, bool exact>
std::size_t decode_chunk(const Weights& w, const Thresholds& thresholds, const Tokens& t, std::size_t first,
                         std::size_t count, float* sums, float* scratch) {
    const std::size_t blocks = w.columns / block, stride = W::is_grouped ? w.columns : sums_stride_of(w.columns);
    float* g = scratch;                                              // [rows][128]
    float* to = W::is_grouped ? scratch + t.rows * block : sums;     // [rows][stride]
    float coefficients[max_decode_rows] = {};
    std::size_t all[block + axpy_rows], live[block + axpy_rows];
    for (std::size_t i = 0; i < t.rows * block; ++i) {
        g[i] = 0;
    }
    if (W::is_grouped) {
        for (std::size_t i = 0; i < t.rows * w.columns; ++i) {
            to[i] = 0;
        }
    }
    for (std::size_t j = 0; j < count; ++j) {
        all[j] = first + j;
    }
    for (std::size_t j = 0; j < count; j += axpy_rows) {
        const std::size_t rows = count - j < axpy_rows ? count - j : axpy_rows;
        const std::uint8_t* next[axpy_rows];
        for (std::size_t r = 0; r < axpy_rows; ++r) {
            const std::size_t ahead = j + axpy_rows + r < count ? j + axpy_rows + r : j;
            next[r] = w.gate.rows + (first + ahead) * w.gate.stride;
        }
        dots<W, exact>(w.gate, blocks, all + j, next, rows, t, g + j, block);
    }
    activate(w.activation, g, t.rows * block);
    const std::size_t found = live_neurons(thresholds, first, count, t.rows, g, live);
    for (std::size_t i = 0; i < found; i += axpy_rows) {
        const std::size_t rows = found - i < axpy_rows ? found - i : axpy_rows;
        float c[axpy_rows][max_decode_rows] = {}, up[max_decode_rows * axpy_rows];
        const std::uint8_t *down[axpy_rows], *next[axpy_rows];
        for (std::size_t r = 0; r < axpy_rows; ++r) {
            down[r] = w.down + live[i + (r < rows ? r : 0)] * w.up.stride;
            next[r] = w.up.rows + live[i + axpy_rows + r < found ? i + axpy_rows + r : i] * w.up.stride;
        }
        dots<W, exact>(w.up, blocks, live + i, down, rows, t, up, axpy_rows);
        for (std::size_t r = 0; r < rows; ++r) {
            for (std::size_t m = 0; m < t.rows; ++m) {
                c[r][m] = g[m * block + live[i + r] - first] * up[m * axpy_rows + r];
                coefficients[m] += c[r][m];
            }
        }
        add_rows<W>(down, next, c, blocks, t.rows, to, stride);
    }
    if (W::is_grouped) {
        fold_group(w, first / block, t.rows, to, coefficients, sums);
    } else {
        for (std::size_t m = 0; m < t.rows; ++m) {
            sums[m * stride + w.columns] += coefficients[m];
        }
    }
    const std::size_t row = w.row_bytes + 3 * w.gate.groups;
    return count * row + found * (row + w.row_bytes) + (W::is_grouped ? 3 * w.columns : 0);
}

template <class W, bool exact>
std::size_t decode_range(const Weights& w, const Thresholds& thresholds, const Tokens& t, std::size_t first,
                         std::size_t last, float* sums, float* scratch) {
    std::size_t bytes = 0;
    for (std::size_t j = first; j < last; j += block) {
        bytes += decode_chunk<W, exact>(w, thresholds, t, j, last - j < block ? last - j : block, sums, scratch);
    }
    return bytes;
}

std::size_t decode(const Weights& w, const Thresholds& thresholds, const Tokens& t, std::size_t first,
                   std::size_t last, float* sums, float* scratch) {
    if (w.format == Format::bf16) {
        return decode_range<BF16, true>(w, thresholds, t, first, last, sums, scratch);
    }
    if (w.format == Format::i8) {
        return t.x ? decode_range<I8, true>(w, thresholds, t, first, last, sums, scratch)
                   : decode_range<I8, false>(w, thresholds, t, first, last, sums, scratch);
    }
    return t.x ? decode_range<U4, true>(w, thresholds, t, first, last, sums, scratch)
               : decode_range<U4, false>(w, thresholds, t, first, last, sums, scratch);
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
