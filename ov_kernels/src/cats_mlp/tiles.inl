// Products of matrices in tiles with up to 8 tokens: a lane is a row, and a matrix is read from end to end, which two
// cores do at 44 of the 46 GB/s that they can read at most; rows of records give 37.

constexpr std::size_t tile_parts = tile_rows / lanes;  // vectors of rows
constexpr std::size_t tile_ahead = 8192;               // bytes from a word to one that is prefetched with it

inline F tile_scale(const Tiles& a, std::size_t tile, std::size_t group, std::size_t part) {
    return f_from_f16(a.scale + (tile * a.groups + group) * tile_rows + part * lanes, lanes);
}

inline F tile_zero(const Tiles& a, std::size_t tile, std::size_t group, std::size_t part) {
    return f_from_i8(a.zero + (tile * a.groups + group) * tile_rows + part * lanes, lanes);
}

// Scales and zeros of rows that have one each: scale * (sum - zero * sum of the token).
inline F finish_tile(const Tiles& a, std::size_t tile, std::size_t part, F sum, float token) {
    return f_mul(tile_scale(a, tile, 0, part), f_fma(tile_zero(a, tile, 0, part), f_set(-token), sum));
}

// The same of a block with its own: total + scale * (sum - zero * sum of the token).
inline F add_group(const Tiles& a, std::size_t tile, std::size_t group, std::size_t part, F sum, float token, F total) {
    const F shifted = f_fma(tile_zero(a, tile, group, part), f_set(-token), sum);
    return f_fma(tile_scale(a, tile, group, part), shifted, total);
}

// Sums of products of part of a tile's block, which begins at p, with M tokens of integers.
template <class W, int digits, int M>
inline void multiply_words(const std::uint8_t* p, std::size_t part, const Tokens& x, std::size_t b, F (&product)[M]) {
    constexpr int R = M * digits, chains = 2 * R <= tile_sums ? 2 : 1;
    const std::int8_t* q = static_cast<const std::int8_t*>(x.values) + b * R * block;
    I sums[chains][R];
    unroll<M>([&](auto m) {
        unroll<chains * digits>([&](auto i) { sums[i / digits][m * digits + i % digits] = i_zero(); });
        sums[0][m * digits + digits - 1] = W::shift ? i_set(x.offset[b * M + m]) : i_zero();
    });
    W::each_word(p + part * bytes_in, [&](auto visit, std::size_t k, I weights) {
        if constexpr (visit * W::tile_bytes % (64 * 32) == 0) {  // once for each line
            EDGE_PREFETCH(p + tile_ahead + k * 64);
        }
        EDGE_KEEP(weights);
        constexpr int chain = visit % chains;
        unroll<R>([&](auto r) { sums[chain][r] = W::dot(sums[chain][r], weights, i_set_word(q + r * block + 4 * k)); });
    });
    unroll<M>([&](auto m) {
        I both[digits];
        unroll<digits>([&](auto d) {
            both[d] = sums[0][m * digits + d];
            if constexpr (chains == 2) {
                both[d] = i_add(both[d], sums[1][m * digits + d]);
            }
        });
        product[m] = f_mul(f_from_i32(i_whole<digits>(both)), f_set(x.scale[b * M + m]));
    });
}

// The same with floats.
template <class W, int M>
inline void multiply_floats(const std::uint8_t* p, std::size_t part, const Tokens& x, std::size_t b, F (&product)[M]) {
    const float* values = static_cast<const float*>(x.values) + b * M * block;
    unroll<M>([&](auto m) { product[m] = f_set(0.0f); });
    for (std::size_t k = 0; k < W::tile_bytes / 64; ++k) {
        EDGE_PREFETCH(p + tile_ahead + k * 64);
        W::each_column(i_load(p + k * 64 + part * bytes_in), k, [&](std::size_t column, F weights) {
            unroll<M>([&](auto m) { product[m] = f_fma(weights, f_set(values[m * block + column]), product[m]); });
        });
    }
}

// out[m * stride + i] = row i of the tile . token m.
template <class W, int digits, int M>
EDGE_FLATTEN void multiply_tile(const Tiles& a, std::size_t tile, const Tokens& x, float* out, std::size_t stride) {
    const std::uint8_t* p = a.bytes + tile * a.blocks * W::tile_bytes;
    F total[tile_parts][M];
    float sum[M] = {};
    unroll<tile_parts * M>([&](auto i) { total[i / M][i % M] = f_set(0.0f); });
    for (std::size_t b = 0; b < a.blocks; ++b, p += W::tile_bytes) {
        for (std::size_t part = 0; part < tile_parts; ++part) {
            F product[M];
            if constexpr (digits > 0) {
                multiply_words<W, digits, M>(p, part, x, b, product);
            } else {
                multiply_floats<W, M>(p, part, x, b, product);
            }
            unroll<M>([&](auto m) {
                F& to = total[part][m];
                to = W::is_grouped ? add_group(a, tile, b, part, product[m], x.sum[b * M + m], to)
                                   : f_add(to, product[m]);
            });
        }
        unroll<M>([&](auto m) { sum[m] += x.sum[b * M + m]; });
    }
    unroll<tile_parts * M>([&](auto i) {
        F y = total[i / M][i % M];
        if (W::has_scale && !W::is_grouped) {
            y = finish_tile(a, tile, i / M, y, sum[i % M]);
        }
        f_store(out + i % M * stride + i / M * lanes, y);
    });
}

// out[m * stride + i] = row 16 * first + i . token m, for `count` tiles.
template <class W, int digits>
void multiply_tiles(const Tiles& a, std::size_t first, std::size_t count, const Tokens& x, float* out,
                    std::size_t stride) {
    using Multiply = void (*)(const Tiles&, std::size_t, const Tokens&, float*, std::size_t);
    Multiply multiply;
    if constexpr (digits == 2) {
        static constexpr Multiply by_tokens[] = {multiply_tile<W, 2, 1>, multiply_tile<W, 2, 2>};
        multiply = by_tokens[x.rows - 1];
    } else {
        static constexpr Multiply by_tokens[] = {multiply_tile<W, digits, 1>, multiply_tile<W, digits, 2>,
                                                 multiply_tile<W, digits, 3>, multiply_tile<W, digits, 4>,
                                                 multiply_tile<W, digits, 5>, multiply_tile<W, digits, 6>,
                                                 multiply_tile<W, digits, 7>, multiply_tile<W, digits, 8>};
        multiply = by_tokens[x.rows - 1];
    }
    for (std::size_t tile = 0; tile < count; ++tile) {
        multiply(a, first + tile, x, out + tile * tile_rows, stride);
    }
}
