// Dot products of R weight rows with M tokens, whose values have 32, 16 or 8 bits.

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
            unroll<R>([&](auto r) { sums[r][m] = i_dot16(i_dot16(sums[r][m], low[r], x_low), high[r], x_high); });
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
            unroll<R>([&](auto r) { sums[r][m] = i_dot8(i_dot8(sums[r][m], low[r], x_low), high[r], x_high); });
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
            unroll<M>(
                [&](auto m) { total[r][m] = f_fma(f_from_i32(sums[r][m]), f_set(scales[r][m][b]), total[r][m]); });
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
