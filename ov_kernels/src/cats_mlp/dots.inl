// Dot products of a weight row with M tokens, whose values are floats or integers of one or two digits. Several rows at
// once would load the tokens' values less often, but a core reads rows in turns 15 to 25 % slower from memory than one
// after another.
//
// A last span may have fewer blocks than others: the token's integers and scales are 0 beyond, and what is read there
// of the weights is another part of the blob, which has enough behind every row.

constexpr std::size_t max_groups = max_columns / block;

// Scales of a row's blocks, and total[m] -= the sum over blocks of scale * zero * sum of the token's values.
template <int M>
inline void row_scales(const Matrix& a, std::size_t row, const Tokens& t, float* scales, F (&total)[M]) {
    for (std::size_t g = 0; g < a.groups; g += lanes) {
        const std::size_t count = a.groups - g < lanes ? a.groups - g : lanes;
        const F scale = f_from_f16(a.scale + row * a.groups + g, count);
        const F product = f_mul(scale, f_from_i8(a.zero + row * a.groups + g, count));
        f_store(scales + g, scale);
        unroll<M>([&](auto m) { total[m] = f_sub(total[m], f_mul(product, f_load(t.sum + m * a.groups + g, count))); });
    }
}

// Adds the block's dot products with f32 tokens.
template <class W, int M>
inline void add_block(const std::uint8_t* p, const float* x, std::size_t stride, const float* scale, F (&total)[M]) {
    F sums[M];
    unroll<M>([&](auto m) { sums[m] = f_set(0.0f); });
    for (std::size_t c = 0; c < half; c += lanes) {
        F low, high;
        W::load(p, c, low, high);
        unroll<M>([&](auto m) {
            const F x_low = f_load(x + m * stride + c), x_high = f_load(x + m * stride + half + c);
            sums[m] = f_fma(high, x_high, f_fma(low, x_low, sums[m]));
        });
    }
    unroll<M>(
        [&](auto m) { total[m] = W::is_grouped ? f_fma(sums[m], f_set(*scale), total[m]) : f_add(sums[m], total[m]); });
}

// total[m] += scale of the token and `scale` of the row * products of span s, which begins at p. Each vector of weights
// is preceded by a prefetch of its place in `next`.
template <class W, int digits, int M>
inline void add_span(const std::uint8_t* p, const std::uint8_t* next, std::size_t s, const Tokens& t, F scale,
                     F (&total)[M]) {
    constexpr int R = M * digits, vectors_of_a_line = 8 * 64 / (span / block * W::block_bytes);
    const std::int8_t* x = static_cast<const std::int8_t*>(t.values) + s * R * span;
    I sums[R];
    unroll<M>([&](auto m) {
        sums[m * digits] = i_zero();
        sums[m * digits + digits - 1] = W::shift ? i_load(t.offset + (s * M + m) * lanes) : i_zero();
    });
    W::each_vector(p, [&](auto visit, std::size_t v, I weights) {
        if constexpr (visit % vectors_of_a_line == 0) {
            EDGE_PREFETCH(next + v / vectors_of_a_line * 64);
        }
        EDGE_KEEP(weights);
        unroll<R>([&](auto r) { sums[r] = W::dot(sums[r], weights, i_load(x + r * span + v * bytes_in)); });
    });
    unroll<M>([&](auto m) {
        const F own = f_load(t.scale + (s * M + m) * lanes);
        const F whole = f_from_i32(i_whole<digits>(sums + m * digits));
        total[m] = f_fma(whole, W::is_grouped ? f_mul(own, scale) : own, total[m]);
    });
}

template <class W, int digits, int M>
inline void add_row(const Weights& w, std::size_t row, const std::uint8_t* next, const Tokens& t, F (&total)[M]) {
    const Matrix& a = w.up;
    constexpr std::size_t n = span / block;
    const std::size_t blocks = w.columns / block;
    const std::uint8_t* p = a.rows + row * a.stride;
    for (std::size_t g = 0; g < blocks; g += lanes) {
        const std::size_t count = blocks - g < lanes ? blocks - g : lanes;
        F scale{};
        if constexpr (W::is_grouped) {
            scale = f_from_f16(a.scale + row * blocks + g, count);
            const F product = f_mul(scale, f_from_i8(a.zero + row * blocks + g, count));
            unroll<M>([&](auto m) { total[m] = f_sub(total[m], f_mul(product, f_load(t.sum + g * M + m * lanes))); });
        }
        for (std::size_t b = 0; b < count; b += n) {
            const std::size_t offset = (g + b) * W::block_bytes;
            F spread = scale;
            if constexpr (W::is_grouped) {
                spread = f_spread(scale, static_cast<int>(b));
            }
            add_span<W, digits, M>(p + offset, next + offset, (g + b) / n, t, spread, total);
        }
    }
}

// out[m * stride] = row j of Wup . token m, while the row `next` is prefetched.
template <class W, int digits, int M>
inline void dot_row(const Weights& w, std::size_t j, const std::uint8_t* next, const Tokens& t, float* out,
                    std::size_t stride) {
    const Matrix& a = w.up;
    F total[M];
    unroll<M>([&](auto m) { total[m] = f_set(0.0f); });
    if constexpr (digits > 0) {
        add_row<W, digits, M>(w, j, next, t, total);
    } else {
        float scales[max_groups + lanes];
        if constexpr (W::is_grouped) {
            row_scales<M>(a, j, t, scales, total);
        }
        for (std::size_t b = 0; b < w.columns / block; ++b) {
            EDGE_PREFETCH_BLOCK(W, next, b)
            const float* x = static_cast<const float*>(t.values) + b * block;
            add_block<W, M>(a.rows + j * a.stride + b * W::block_bytes, x, w.columns, scales + b, total);
        }
    }
    float values[(M + 3) / 4 * 4];
    unroll<(M + 3) / 4>([&](auto q) {
        F four[4];
        unroll<4>([&](auto k) { four[k] = 4 * q + k < M ? total[(4 * q + k) % M] : f_set(0.0f); });
        f_sum4(four, values + 4 * q);
    });
    unroll<M>([&](auto m) {
        float value = values[m];
        if (W::has_scale && !W::is_grouped) {
            value = f_one_f16(a.scale + j) * (value - static_cast<float>(a.zero[j]) * t.total[m]);
        }
        out[m * stride] = value;
    });
}

template <class W, int digits, int M>
EDGE_FLATTEN void dots_of(const Weights& w, std::size_t count, const std::uint32_t* rows,
                          const std::uint8_t* const* next, const Tokens& t, float* out, std::size_t stride) {
    for (std::size_t i = 0; i < count; ++i) {
        dot_row<W, digits, M>(w, rows[i], next[i], t, out + i, stride);
    }
}

// out[m * stride + i] = row rows[i] of Wup . token m, for `count` rows and all tokens, while the row at next[i] is
// prefetched.
template <class W, int digits>
void dots(const Weights& w, std::size_t count, const std::uint32_t* rows, const std::uint8_t* const* next,
          const Tokens& t, float* out, std::size_t stride) {
    using Dots = void (*)(const Weights&, std::size_t, const std::uint32_t*, const std::uint8_t* const*, const Tokens&,
                          float*, std::size_t);
    if constexpr (digits == 2) {
        static constexpr Dots by_tokens[max_rows_of_two_digits] = {dots_of<W, 2, 1>, dots_of<W, 2, 2>};
        by_tokens[t.rows - 1](w, count, rows, next, t, out, stride);
    } else {
        static constexpr Dots by_tokens[max_decode_rows] = {
            dots_of<W, digits, 1>, dots_of<W, digits, 2>, dots_of<W, digits, 3>, dots_of<W, digits, 4>,
            dots_of<W, digits, 5>, dots_of<W, digits, 6>, dots_of<W, digits, 7>, dots_of<W, digits, 8>};
        by_tokens[t.rows - 1](w, count, rows, next, t, out, stride);
    }
}
