// Decode with skipping: up to 8 tokens and a range of neurons. The gate's tiles give the activations, those name the
// live neurons, and the records of these, a row of Wup and then one of Wdown, are read in batches.
//
// Bound by memory: every live row is read once, one after another. Software prefetch runs a batch of Wup or Wdown
// ahead, each of these while the other is computed, because hardware prefetchers stop at the end of a record that a
// dead one follows. Even then live records are read faster than all of them, however few are dead.

// Neurons that are computed together, in fours. With more, the first caches no longer hold their rows; with fewer, sums
// of Wdown are loaded and stored too often.
template <int digits>
constexpr std::size_t batch_rows = digits == 1 ? 16 : 8;
constexpr std::size_t max_batch = 16;

// Its rows of Wup give the coefficients of its rows of Wdown.
struct Batch {
    const std::uint32_t* live;
    std::size_t count;
    const std::uint8_t* down[max_batch];
    const std::uint8_t* next[max_batch];  // rows of Wup of the neurons after it, `num_next` of them
    std::size_t num_next;
    float c[max_decode_rows][max_batch];  // activations, then coefficients of the rows of Wdown
    // Coefficients as integers in fours of rows, [max_batch / 4][digits of tokens][4]; for each token their scale and
    // what sums begin with.
    alignas(4) std::int8_t q[max_batch / 4][max_decode_rows][4];
    float scale[max_decode_rows];
    std::int32_t offset[max_decode_rows];
};

template <class W, int digits>
void multiply_up(const Weights& w, const Tokens& t, Batch& batch) {
    float up[max_decode_rows][max_batch];
    dots<W, digits>(w, batch.count, batch.live, batch.down, t, up[0], max_batch);
    for (std::size_t m = 0; m < t.rows; ++m) {
        for (std::size_t i = 0; i < batch.count; ++i) {
            batch.c[m][i] *= up[m][i];
        }
    }
}

// Scales are NaN where a coefficient is not finite. Adds the coefficients to `sums`.
template <class W, int digits>
void quantise_batch(Batch& batch, std::size_t tokens, float* sums) {
    for (std::size_t m = 0; m < tokens; ++m) {
        std::int8_t q[2][max_batch];
        const std::int32_t total = quantise(batch.c[m], max_batch, digits, q[0], max_batch, batch.scale[m]);
        sums[m] += batch.scale[m] * static_cast<float>(total);
        batch.offset[m] = -W::shift * total;
        for (std::size_t i = 0; i < max_batch; i += 4) {
            for (std::size_t d = 0; d < digits; ++d) {
                std::memcpy(batch.q[i / 4][m * digits + d], q[d] + i, 4);
            }
        }
    }
}

// In f32 one by one: a token's sum must not depend on how the other tokens' neurons divide it into batches.
inline void sum_up(const Batch& batch, std::size_t tokens, float* sums) {
    for (std::size_t m = 0; m < tokens; ++m) {
        for (std::size_t i = 0; i < batch.count; ++i) {
            sums[m] += batch.c[m][i];
        }
    }
}

// Adds the batch's rows of Wdown in f32 for M tokens from m0 on: sums[m][column] += sum over rows of c[m][row] * q.
template <class W, int M>
void add_down_floats(const Batch& batch, std::size_t b, std::size_t m0, float* sums, std::size_t stride) {
    for (std::size_t column = 0; column < half; column += lanes) {
        float* to = sums + m0 * stride + b * block + column;
        F low_sums[M], high_sums[M];
        unroll<M>([&](auto m) {
            low_sums[m] = f_load(to + m * stride);
            high_sums[m] = f_load(to + m * stride + half);
        });
        for (std::size_t i = 0; i < batch.count; ++i) {
            F low, high;
            W::load(batch.down[i] + b * W::block_bytes, column, low, high);
            unroll<M>([&](auto m) {
                const F c = f_set(batch.c[m0 + m][i]);
                low_sums[m] = f_fma(low, c, low_sums[m]);
                high_sums[m] = f_fma(high, c, high_sums[m]);
            });
        }
        unroll<M>([&](auto m) {
            f_store(to + m * stride, low_sums[m]);
            f_store(to + m * stride + half, high_sums[m]);
        });
    }
}

template <class W>
inline void prefetch_next(const Batch& batch, std::size_t b) {
    for (std::size_t i = 0; i < batch.num_next; ++i) {
        EDGE_PREFETCH_BLOCK(W, batch.next[i], b)
    }
}

// The same with integers for a quarter of a block's columns (AVX-512: a half), four rows at a time; the sums of each
// four vectors of columns stay in the order that i_zip8 gives, see order_sums(). Each row is preceded by a prefetch of
// `ahead` in one of the next rows of Wup, if there is something to prefetch.
template <class W, int digits, int M, bool does_prefetch>
inline void add_columns(const Batch& batch, std::size_t offset, int part, std::size_t ahead, const std::int8_t* q,
                        const float* scale, const std::int32_t* begin, float* sums, std::size_t stride) {
    constexpr int R = M * digits;
    I total[R][4];
    unroll<M>([&](auto m) {
        const I first = i_set(begin[m]);
        unroll<4>([&](auto v) {
            total[m * digits][v] = i_zero();
            total[m * digits + digits - 1][v] = first;
        });
    });
    for (std::size_t k = 0; k < batch_rows<digits> / 4; ++k) {
        I rows[4];
        unroll<4>([&](auto r) {
            if constexpr (does_prefetch) {
                EDGE_PREFETCH(batch.next[4 * k + r] + ahead);
            }
            rows[r] = W::bytes(batch.down[4 * k + r] + offset, 0, part);
            EDGE_KEEP(rows[r]);
        });
        i_zip8(rows);
        unroll<R>([&](auto r) {
            const I four = i_set_word(q + (k * max_decode_rows + r) * 4);
            unroll<4>([&](auto v) { total[r][v] = W::dot(total[r][v], rows[v], four); });
        });
    }
    unroll<M>([&](auto m) {
        float* to = sums + m * stride;
        const F by = f_set(scale[m]);
        unroll<4>([&](auto v) {
            const I sums_of[2] = {total[m * digits][v], total[m * digits + digits - 1][v]};
            const F whole = f_from_i32(i_whole<digits>(sums_of));
            f_store(to + v * lanes, f_fma(whole, by, f_load(to + v * lanes)));
        });
    });
}

// All columns for M tokens from m0 on.
template <class W, int digits, int M>
EDGE_FLATTEN void add_down_integers(const Batch& batch, std::size_t blocks, std::size_t m0, float* sums,
                                    std::size_t stride) {
    for (std::size_t b = 0; b < blocks; ++b) {
        unroll<block / bytes_in>([&](auto step) {
            constexpr std::size_t column = step * bytes_in, line = column * W::block_bytes / block;
            add_columns<W, digits, M, line % 64 == 0>(batch, b * W::block_bytes + column % half, column >= half,
                                                      b * W::block_bytes + line, batch.q[0][m0 * digits],
                                                      batch.scale + m0, batch.offset + m0,
                                                      sums + m0 * stride + b * block + column, stride);
        });
    }
}

template <class W, int digits>
void add_down(const Weights& w, const Batch& batch, std::size_t tokens, float* sums, std::size_t stride) {
    using Add = void (*)(const Batch&, std::size_t, std::size_t, float*, std::size_t);
    constexpr std::size_t limit = digits == 0 ? 4 : down_tokens / digits;
    const std::size_t parts = (tokens + limit - 1) / limit, most = (tokens + parts - 1) / parts;
    const std::size_t blocks = w.columns / block;
    if constexpr (digits == 0) {
        static constexpr Add by_floats[] = {add_down_floats<W, 1>, add_down_floats<W, 2>, add_down_floats<W, 3>,
                                            add_down_floats<W, 4>};
        for (std::size_t b = 0; b < blocks; ++b) {
            prefetch_next<W>(batch, b);
            for (std::size_t m = 0; m < tokens; m += most) {
                const std::size_t count = tokens - m < most ? tokens - m : most;
                by_floats[count - 1](batch, b, m, sums, stride);
            }
        }
    } else {
        Add by_tokens[limit];
        unroll<limit>([&](auto m) { by_tokens[m] = add_down_integers<W, digits, m + 1>; });
        for (std::size_t m = 0; m < tokens; m += most) {
            const std::size_t count = tokens - m < most ? tokens - m : most;
            by_tokens[count - 1](batch, blocks, m, sums, stride);
        }
    }
}

// Brings raw sums, [rows][stride], into the order of columns.
void order_sums(std::size_t columns, std::size_t rows, float* sums, std::size_t stride) {
    for (std::size_t m = 0; m < rows; ++m) {
        for (float* p = sums + m * stride; p < sums + m * stride + columns; p += bytes_in) {
            I x[4];
            unroll<4>([&](auto v) { x[v] = i_load(p + v * lanes); });
            i_unzip8(x);
            unroll<4>([&](auto v) { i_store(p + v * lanes, x[v]); });
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

// Neurons of the batch that begins with live[i]; in 4 bits they share their scales of Wdown.
template <class W, int digits>
std::size_t batch_size(const std::uint32_t* live, std::size_t found, std::size_t i) {
    std::size_t count = 0;
    while (count < batch_rows<digits> && i + count < found &&
           (!W::is_grouped || live[i + count] / block == live[i] / block)) {
        ++count;
    }
    return count;
}

// The batch that begins with live[i], without its activations.
template <class W, int digits>
void make_batch(const Weights& w, const std::uint32_t* live, std::size_t found, std::size_t i, Batch& batch) {
    constexpr std::size_t most = batch_rows<digits>;
    const std::size_t after = i + batch_size<W, digits>(live, found, i);
    batch.live = live + i;
    batch.count = after - i;
    batch.num_next = found - after < most ? found - after : most;
    for (std::size_t r = 0; r < batch.num_next; ++r) {
        batch.next[r] = w.up.rows + live[after + r] * w.up.stride;
    }
    for (std::size_t r = 0; r < most; ++r) {
        batch.down[r] = w.down + live[r < batch.count ? i + r : i] * w.up.stride;
        batch.next[r] = r < batch.num_next ? batch.next[r] : batch.down[r];
    }
}

// From g, [tokens][stride], which begins with neuron `first`.
inline void take_activations(const float* g, std::size_t stride, std::size_t first, std::size_t tokens, Batch& batch) {
    for (std::size_t m = 0; m < tokens; ++m) {
        for (std::size_t r = 0; r < max_batch; ++r) {  // rows that only fill it up have coefficients of 0
            batch.c[m][r] = r < batch.count ? g[m * stride + batch.live[r] - first] : 0.0f;
        }
    }
}

template <class W, int digits>
std::size_t decode_range(const Weights& w, const Thresholds& thresholds, const Tokens& t, const Tokens& blocks,
                         std::size_t first, std::size_t last, float* sums, float* scratch) {
    const std::size_t count = last - first, padded = (count + tile_rows - 1) / tile_rows * tile_rows;
    const std::size_t stride = W::is_grouped ? w.columns : sums_stride_of(w.columns);
    float* g = scratch;                                                           // [rows][padded]
    std::uint32_t* live = reinterpret_cast<std::uint32_t*>(g + t.rows * padded);  // [padded + 16]
    float* to = W::is_grouped ? g + (t.rows + 1) * padded + 16 : sums;            // [rows][stride]
    float coefficients[max_decode_rows] = {};
    multiply_tiles<W, digits>(w.gate_tiles, first / tile_rows, padded / tile_rows, blocks, g, padded);
    activate(w.activation, g, t.rows * padded);
    const std::size_t found = live_neurons(thresholds, first, count, t.rows, g, padded, live);
    for (std::size_t i = 0; i < found && i < batch_rows<digits>; ++i) {
        for (std::size_t b = 0; b < w.columns / block; ++b) {
            EDGE_PREFETCH_BLOCK(W, w.up.rows + live[i] * w.up.stride, b)
        }
    }
    Batch batch;
    for (std::size_t i = 0; i < found; i += batch.count) {
        make_batch<W, digits>(w, live, found, i, batch);
        take_activations(g, padded, first, t.rows, batch);
        const bool begins_group = W::is_grouped && (i == 0 || live[i] / block != live[i - 1] / block);
        for (std::size_t k = 0; begins_group && k < t.rows * w.columns; ++k) {
            to[k] = 0;
        }
        multiply_up<W, digits>(w, t, batch);
        if constexpr (digits > 0) {
            quantise_batch<W, digits>(batch, t.rows, coefficients);
        } else {
            sum_up(batch, t.rows, coefficients);
        }
        add_down<W, digits>(w, batch, t.rows, to, stride);
        const std::size_t after = i + batch.count;
        const bool ends_group = W::is_grouped && (after == found || live[after] / block != live[i] / block);
        if (digits > 0 && (ends_group || after == found)) {
            order_sums(w.columns, t.rows, to, stride);
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
    const std::size_t row = w.row_bytes + 3 * w.up.groups, groups = W::is_grouped ? (count + block - 1) / block : 0;
    return count * row + found * (row + w.row_bytes) + groups * 3 * w.columns;
}

template <class W>
std::size_t decode_format(const Weights& w, const Thresholds& thresholds, const Tokens& t, const Tokens& blocks,
                          int digits, std::size_t first, std::size_t last, float* sums, float* scratch) {
    return (digits == 0   ? decode_range<W, 0>
            : digits == 1 ? decode_range<W, 1>
                          : decode_range<W, 2>)(w, thresholds, t, blocks, first, last, sums, scratch);
}

std::size_t decode(const Weights& w, const Thresholds& thresholds, const Tokens& t, const Tokens& blocks, int digits,
                   std::size_t first, std::size_t last, float* sums, float* scratch) {
    if (w.format == Format::bf16) {
        return decode_range<BF16, 0>(w, thresholds, t, blocks, first, last, sums, scratch);
    }
    return (w.format == Format::i8 ? decode_format<I8> : decode_format<U4>)(w, thresholds, t, blocks, digits, first,
                                                                            last, sums, scratch);
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
