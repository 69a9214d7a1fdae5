// Decode: up to 8 tokens and a range of neurons. Gate rows give the activations, those name the live neurons, and the
// records of these, a row of Wup and then one of Wdown, are read in batches.
//
// Bound by memory: every live row is read once, one after another. Software prefetch runs two rows of the gate or a batch
// of Wup or Wdown ahead, each of these while the other is computed, because hardware prefetchers stop at the end of a
// record that a dead one follows. Even then live records are read faster than all of them, however few are dead.

// Neurons that are computed together. With more, the first caches no longer hold their rows; with fewer, sums of Wdown
// are loaded and stored too often.
template <class W, int bits>
constexpr std::size_t batch_rows = (bits == 8 ? 16 : 8) * block / W::block_bytes;
constexpr std::size_t max_batch = 32;
static_assert(batch_rows<U4, 8> == max_batch, "the smallest rows make the largest batches");
constexpr std::size_t gate_rows_ahead = 2;

// Its rows of Wup give the coefficients of its rows of Wdown.
struct Batch {
    const std::uint32_t* live;
    std::size_t count;
    const std::uint8_t* down[max_batch];
    const std::uint8_t* next[max_batch];  // rows of Wup of the neurons after it, `num_next` of them
    std::size_t num_next;
    float c[max_batch][max_decode_rows];  // activations, then coefficients of the rows of Wdown
    // Coefficients as integers in groups of n = 2 (16 bits) or 4 (8 bits) rows, [max_batch / n][8][n], and their scales
    // and sums, one for each token.
    alignas(4) std::int8_t q[2 * max_batch * max_decode_rows];
    float scale[max_decode_rows];
    float sum[max_decode_rows];
};

template <class W, int bits>
void multiply_up(const Weights& w, const Tokens& t, Batch& batch) {
    for (std::size_t i = 0; i < batch.count; ++i) {
        float up[max_decode_rows];
        dots<W, bits>(w.up, w.columns / block, batch.live[i], batch.down[i], t, up, 1);
        for (std::size_t m = 0; m < t.rows; ++m) {
            batch.c[i][m] *= up[m];
        }
    }
}

// Scales are NaN where a coefficient is not finite.
template <class W, int bits>
void quantise_batch(Batch& batch, std::size_t tokens) {
    constexpr std::size_t n = 32 / bits, count = (batch_rows<W, bits> + 15) / 16 * 16;
    Values<bits>* to = reinterpret_cast<Values<bits>*>(batch.q);
    for (std::size_t m = 0; m < tokens; ++m) {
        float c[count] = {};
        Values<bits> q[count];
        for (std::size_t i = 0; i < batch.count; ++i) {
            c[i] = batch.c[i][m];
        }
        quantise(c, count, bits, q, batch.scale[m], batch.sum[m]);
        for (std::size_t i = 0; i < count; ++i) {
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

// sums[lanes] += scale * integers.
inline void add_scaled(float* sums, I integers, F scale) {
    f_store(sums, f_fma(f_from_i32(integers), scale, f_load(sums)));
}

// The same with 16-bit coefficients, two rows at a time; the sums of each two vectors of columns stay in the order that
// i_zip16 gives, see order_sums().
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
        const F scale = f_set(batch.scale[m0 + m]);
        add_scaled(to, total[m][0], scale);
        add_scaled(to + lanes, total[m][1], scale);
        add_scaled(to + half, total[m][2], scale);
        add_scaled(to + half + lanes, total[m][3], scale);
    });
}

// The same with 8-bit coefficients, four rows at a time, one half of a block's columns after the other: sums over unsigned
// bytes, each four vectors in the order that i_zip8 gives.
template <class W, int M>
void add_down8(const Batch& batch, std::size_t b, std::size_t column, std::size_t m0, float* sums, std::size_t stride) {
    for (int part = 0; part < 2; ++part) {
        I total[M][4];
        unroll<M>([&](auto m) { unroll<4>([&](auto v) { total[m][v] = i_zero(); }); });
        for (std::size_t i = 0; i < batch.count; i += 4) {
            I rows[4];
            unroll<4>([&](auto r) { rows[r] = W::load8_half(batch.down[i + r] + b * W::block_bytes, column, part); });
            i_zip8(rows);
            unroll<M>([&](auto m) {
                const I four = i_set_word(batch.q + (i / 4 * max_decode_rows + m0 + m) * 4);
                unroll<4>([&](auto v) { total[m][v] = i_dot8(total[m][v], rows[v], four); });
            });
        }
        unroll<M>([&](auto m) {
            float* to = sums + (m0 + m) * stride + b * block + (part ? half : 0) + column;
            const F scale = f_set(batch.scale[m0 + m]);
            unroll<4>([&](auto v) { add_scaled(to + v * lanes, total[m][v], scale); });
        });
    }
}

template <class W, int bits>
void add_down(const Weights& w, const Batch& batch, std::size_t tokens, float* sums, std::size_t stride) {
    using Add = void (*)(const Batch&, std::size_t, std::size_t, std::size_t, float*, std::size_t);
    constexpr std::size_t step = lanes * 32 / bits;
    const std::size_t parts = (tokens + down_tokens - 1) / down_tokens, most = (tokens + parts - 1) / parts;
    for (std::size_t b = 0; b < w.columns / block; ++b) {
        for (std::size_t i = 0; i < batch.num_next; ++i) {
            EDGE_PREFETCH_BLOCK(W, batch.next[i], b)
        }
        for (std::size_t column = 0; column < half; column += step) {
            if constexpr (bits == 32) {
                add_down32<W>(batch, b, column, tokens, sums, stride);
            } else {
                static constexpr Add by_16[] = {add_down16<W, 1>, add_down16<W, 2>, add_down16<W, 3>, add_down16<W, 4>,
                                                add_down16<W, 5>};
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

// Brings raw sums, [rows][stride], into the order of columns, and takes off what unsigned bytes had too much.
template <class W, int bits>
void order_sums(std::size_t columns, std::size_t rows, const float* coefficients, float* sums, std::size_t stride) {
    constexpr std::size_t zipped = bits == 8 ? 4 : 2;
    for (std::size_t m = 0; m < rows; ++m) {
        const F off = f_set(bits == 8 ? W::shift * coefficients[m] : 0.0f);
        for (float* p = sums + m * stride; p < sums + m * stride + columns; p += zipped * lanes) {
            I x[4];
            unroll<zipped>([&](auto v) { x[v] = i_load(p + v * lanes); });
            if constexpr (bits == 8) {
                i_unzip8(x);
            } else {
                i_unzip16(x[0], x[1], x[0], x[1]);
            }
            unroll<zipped>([&](auto v) {
                i_store(p + v * lanes, x[v]);
                f_store(p + v * lanes, f_sub(f_load(p + v * lanes), off));
            });
        }
    }
}

// Clears dead activations in g [rows][stride]; writes the live neurons in order and returns their number. Without
// branches, which nobody could predict, with SSE, which every unit has.
std::size_t live_neurons(const Thresholds& thresholds, std::size_t first, std::size_t count, std::size_t rows, float* g,
                         std::size_t stride, std::uint32_t* live) {
    const __m128 sign = _mm_set_ss(-0.0f);
    std::size_t found = 0;
    for (std::size_t j = 0; j < count; ++j) {
        const __m128 limit = _mm_set_ss(threshold_of(thresholds, first + j));
        int is_alive = 0;
        for (std::size_t m = 0; m < rows; ++m) {
            const __m128 value = _mm_load_ss(g + m * stride + j);
            const __m128 is_kept = _mm_cmpnle_ss(_mm_andnot_ps(sign, value), limit);  // true for NaN
            _mm_store_ss(g + m * stride + j, _mm_and_ps(value, is_kept));
            is_alive |= _mm_movemask_ps(is_kept) & 1;
        }
        live[found] = static_cast<std::uint32_t>(first + j);
        found += static_cast<std::size_t>(is_alive);
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

// g[m][j] = f(gate row first + j . token m).
template <class W, int bits>
void gate_of(const Weights& w, const Tokens& t, std::size_t first, std::size_t count, float* g, std::size_t stride) {
    for (std::size_t j = 0; j < count; ++j) {
        const std::size_t ahead = j + gate_rows_ahead < count ? j + gate_rows_ahead : j;
        const std::uint8_t* next = w.gate.rows + (first + ahead) * w.gate.stride;
        dots<W, bits>(w.gate, w.columns / block, first + j, next, t, g + j, stride);
    }
    activate(w.activation, g, t.rows * stride);
}

// Neurons of the batch that begins with live[i]; in 4 bits they share their scales of Wdown.
template <class W, int bits>
std::size_t batch_size(const std::uint32_t* live, std::size_t found, std::size_t i) {
    std::size_t count = 0;
    while (count < batch_rows<W, bits> && i + count < found &&
           (!W::is_grouped || live[i + count] / block == live[i] / block)) {
        ++count;
    }
    return count;
}

// The batch that begins with live[i], without its activations.
template <class W, int bits>
void make_batch(const Weights& w, const std::uint32_t* live, std::size_t found, std::size_t i, Batch& batch) {
    constexpr std::size_t most = batch_rows<W, bits>;
    const std::size_t after = i + batch_size<W, bits>(live, found, i);
    batch.live = live + i;
    batch.count = after - i;
    batch.num_next = found - after < most ? found - after : most;
    for (std::size_t r = 0; r < batch.num_next; ++r) {
        batch.next[r] = w.up.rows + live[after + r] * w.up.stride;
    }
    for (std::size_t r = 0; r < most; ++r) {  // those that fill up fours of rows have coefficients of 0
        batch.down[r] = w.down + live[r < batch.count ? i + r : i] * w.up.stride;
        for (std::size_t m = 0; m < max_decode_rows; ++m) {
            batch.c[r][m] = 0;
        }
    }
}

// From g, [tokens][stride], which begins with neuron `first`.
inline void take_activations(const float* g, std::size_t stride, std::size_t first, std::size_t tokens, Batch& batch) {
    for (std::size_t r = 0; r < batch.count; ++r) {
        for (std::size_t m = 0; m < tokens; ++m) {
            batch.c[r][m] = g[m * stride + batch.live[r] - first];
        }
    }
}

template <class W, int bits>
std::size_t decode_range(const Weights& w, const Thresholds& thresholds, const Tokens& t, std::size_t first,
                         std::size_t last, float* sums, float* scratch) {
    const std::size_t count = last - first, padded = (count + 15) / 16 * 16;
    const std::size_t stride = W::is_grouped ? w.columns : sums_stride_of(w.columns);
    float* g = scratch;                                                           // [rows][padded]
    std::uint32_t* live = reinterpret_cast<std::uint32_t*>(g + t.rows * padded);  // [padded + 16]
    float* to = W::is_grouped ? g + (t.rows + 1) * padded + 16 : sums;            // [rows][stride]
    float coefficients[max_decode_rows] = {};
    for (std::size_t i = 0; i < t.rows * padded; ++i) {
        g[i] = 0;
    }
    gate_of<W, bits>(w, t, first, count, g, padded);
    const std::size_t found = live_neurons(thresholds, first, count, t.rows, g, padded, live);
    for (std::size_t i = 0; i < found && i < batch_rows<W, bits>; ++i) {
        for (std::size_t b = 0; b < w.columns / block; ++b) {
            EDGE_PREFETCH_BLOCK(W, w.up.rows + live[i] * w.up.stride, b)
        }
    }
    Batch batch;
    for (std::size_t i = 0; i < found; i += batch.count) {
        make_batch<W, bits>(w, live, found, i, batch);
        take_activations(g, padded, first, t.rows, batch);
        const bool begins_group = W::is_grouped && (i == 0 || live[i] / block != live[i - 1] / block);
        for (std::size_t k = 0; begins_group && k < t.rows * w.columns; ++k) {
            to[k] = 0;
        }
        multiply_up<W, bits>(w, t, batch);
        if constexpr (bits != 32) {
            quantise_batch<W, bits>(batch, t.rows);
        }
        sum_up<bits>(batch, t.rows, coefficients);
        add_down<W, bits>(w, batch, t.rows, to, stride);
        const std::size_t after = i + batch.count;
        const bool ends_group = W::is_grouped && (after == found || live[after] / block != live[i] / block);
        if constexpr (bits != 32) {
            if (ends_group || after == found) {
                order_sums<W, bits>(w.columns, t.rows, coefficients, to, stride);
            }
        }
        if (ends_group) {
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
