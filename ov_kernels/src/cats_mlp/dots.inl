// Dot products of a weight row with M tokens, whose values have 32, 16 or 8 bits. Several rows at once would load the
// tokens' values less often, but a core reads rows in turns 15 to 25 % slower from memory than one after another.

constexpr std::size_t max_groups = max_columns / block;

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
inline void row_scales(const Matrix& a, std::size_t row, const Tokens& t,
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
            const F with_token = bits == 32 ? scale : f_mul(scale, f_load(t.scale + m * a.groups + g, count));
            f_store(scales[m] + g, with_token);
            taken[m] = f_fma(product, f_load(t.sum + m * a.groups + g, count), taken[m]);
        }
    }
    for (int m = 0; m < M; ++m) {
        off[m] = f_sum(taken[m]);
    }
}

template <class W, int M>
inline void add_block16(const std::uint8_t* p, const std::int16_t* const* x, std::size_t b, I (&sums)[M]) {
    for (std::size_t c = 0; c < half; c += 2 * lanes) {
        I low, high;
        W::load16(p + b * W::block_bytes, c, low, high);
        unroll<M>([&](auto m) {
            const I x_low = i_load(x[m] + b * block + c), x_high = i_load(x[m] + b * block + half + c);
            sums[m] = i_dot16(i_dot16(sums[m], low, x_low), high, x_high);
        });
    }
}

template <class W, int M>
inline void add_block8(const std::uint8_t* p, const std::int8_t* const* x, std::size_t b, I (&sums)[M]) {
    for (std::size_t c = 0; c < half; c += 4 * lanes) {
        I low, high;
        W::load8(p + b * W::block_bytes, c, low, high);
        unroll<M>([&](auto m) {
            const I x_low = i_load(x[m] + b * block + c), x_high = i_load(x[m] + b * block + half + c);
            sums[m] = i_dot8(i_dot8(sums[m], low, x_low), high, x_high);
        });
    }
}

template <class W, int M>
inline void add_block32(const std::uint8_t* p, const float* const* x, std::size_t b, F (&sums)[M]) {
    for (std::size_t c = 0; c < half; c += lanes) {
        F low, high;
        W::load(p + b * W::block_bytes, c, low, high);
        unroll<M>([&](auto m) {
            const F x_low = f_load(x[m] + b * block + c), x_high = f_load(x[m] + b * block + half + c);
            sums[m] = f_fma(high, x_high, f_fma(low, x_low, sums[m]));
        });
    }
}

// total += scale of row and tokens * the block's dot products.
template <class W, int bits, int M>
inline void add_block(const std::uint8_t* p, const Values<bits>* const* x, std::size_t b,
                      const float* const (&scales)[M], F (&total)[M]) {
    if constexpr (bits == 32) {
        F sums[M];
        unroll<M>([&](auto m) { sums[m] = f_set(0.0f); });
        add_block32<W, M>(p, x, b, sums);
        unroll<M>([&](auto m) {
            total[m] = W::is_grouped ? f_fma(sums[m], f_set(scales[m][b]), total[m]) : f_add(sums[m], total[m]);
        });
    } else {
        I sums[M];
        unroll<M>([&](auto m) { sums[m] = i_zero(); });
        if constexpr (bits == 16) {
            add_block16<W, M>(p, x, b, sums);
        } else {
            add_block8<W, M>(p, x, b, sums);
        }
        unroll<M>([&](auto m) { total[m] = f_fma(f_from_i32(sums[m]), f_set(scales[m][b]), total[m]); });
    }
}

template <class W, int bits, int M>
void dot_row(const Matrix& a, std::size_t blocks, std::size_t j, const std::uint8_t* next, const Tokens& t, float* out,
             std::size_t stride) {
    float combined[M][max_groups + lanes], off[M];
    const std::uint8_t* p = a.rows + j * a.stride;
    const Values<bits>* x[M];
    const float* scales[M];
    F total[M];
    if (W::is_grouped) {
        row_scales<bits, M>(a, j, t, combined, off);
    }
    unroll<M>([&](auto m) {
        x[m] = static_cast<const Values<bits>*>(t.values) + m * blocks * block;
        scales[m] = W::is_grouped ? combined[m] : t.scale + m * blocks;
        total[m] = f_set(0.0f);
    });
    for (std::size_t b = 0; b < blocks; ++b) {
        EDGE_PREFETCH_BLOCK(W, next, b)
        add_block<W, bits, M>(p, x, b, scales, total);
    }
    unroll<M>([&](auto m) {
        float value = f_sum(total[m]);
        if (W::is_grouped) {
            value -= off[m];
        } else if (W::has_scale) {
            const float zero = static_cast<float>(a.zero[j]) + (bits == 8 ? W::shift : 0.0f);
            value = f_one_f16(a.scale + j) * (value - zero * t.total[m]);
        }
        out[m * stride] = value;
    });
}

// out[m * stride] = row j . token m, for all tokens, while the row `next` is prefetched.
template <class W, int bits>
void dots(const Matrix& a, std::size_t blocks, std::size_t j, const std::uint8_t* next, const Tokens& t, float* out,
          std::size_t stride) {
    using Row = void (*)(const Matrix&, std::size_t, std::size_t, const std::uint8_t*, const Tokens&, float*,
                         std::size_t);
    static constexpr Row by_tokens[max_decode_rows] = {dot_row<W, bits, 1>, dot_row<W, bits, 2>, dot_row<W, bits, 3>,
                                                       dot_row<W, bits, 4>, dot_row<W, bits, 5>, dot_row<W, bits, 6>,
                                                       dot_row<W, bits, 7>, dot_row<W, bits, 8>};
    by_tokens[t.rows - 1](a, blocks, j, next, t, out, stride);
}
