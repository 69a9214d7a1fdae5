// Products of matrices in tiles with up to 16 tokens: a lane is a row, and a matrix is read from end to end, which two
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

// Sums of products of V vectors of a tile's block, which begin at p, with M tokens of integers.
template <class W, int digits, int M, int V>
inline void multiply_words(const std::uint8_t* p, const Tokens& x, std::size_t b, F (&product)[V][M]) {
    constexpr int R = M * digits, chains = 2 * R * V <= tile_sums ? 2 : 1;
    const std::int8_t* q = static_cast<const std::int8_t*>(x.values) + b * x.rows * digits * block;
    I sums[V][R];
    unroll<V * M>([&](auto i) {
        unroll<digits>([&](auto d) { sums[i / M][i % M * digits + d] = i_zero(); });
        sums[i / M][i % M * digits + digits - 1] = W::shift ? i_set(x.offset[b * x.rows + i % M]) : i_zero();
    });
    for (std::size_t step = 0; step < W::steps; ++step) {
        I parts[chains][V][R];
        unroll<chains * V * R>([&](auto i) { parts[i / R / V][i / R % V][i % R] = i_zero(); });
        W::template each_word<V>(p, step, [&](auto visit, std::size_t k, auto v, I weights) {
            if constexpr (v == 0 && visit * W::tile_bytes % (64 * 32) == 0) {  // once for each line
                EDGE_PREFETCH(p + tile_ahead + k * 64);
            }
            EDGE_KEEP(weights);
            unroll<R>([&](auto r) {
                I& to = parts[visit % chains][v][r];
                to = W::add(to, weights, i_set_word(q + r * block + 4 * k));
                EDGE_KEEP(to);  // or gcc puts off adding up until it runs out of registers
            });
        });
        unroll<chains * V * R>([&](auto i) {
            I& to = sums[i / R % V][i % R];
            to = i_add(to, W::whole(parts[i / R / V][i / R % V][i % R]));
        });
    }
    unroll<V * M>([&](auto i) {
        const I whole = i_whole<digits>(sums[i / M] + i % M * digits);
        product[i / M][i % M] = f_mul(f_from_i32(whole), f_set(x.scale[b * x.rows + i % M]));
    });
}

// The same with floats.
template <class W, int M, int V>
inline void multiply_floats(const std::uint8_t* p, const Tokens& x, std::size_t b, F (&product)[V][M]) {
    const float* values = static_cast<const float*>(x.values) + b * x.rows * block;
    unroll<V * M>([&](auto i) { product[i / M][i % M] = f_set(0.0f); });
    for (std::size_t k = 0; k < W::tile_bytes / 64; ++k) {
        EDGE_PREFETCH(p + tile_ahead + k * 64);
        unroll<V>([&](auto v) {
            W::each_column(i_load(p + k * 64 + v * bytes_in), k, [&](std::size_t column, F weights) {
                unroll<M>([&](auto m) {
                    F& to = product[v][m];
                    to = f_fma(weights, f_set(values[m * block + column]), to);
                });
            });
        });
    }
}

// out[m * stride + i] = row i of the tile . token m.
template <class W, int digits, int M>
EDGE_FLATTEN void multiply_tile(const Tiles& a, std::size_t tile, const Tokens& x, float* out, std::size_t stride) {
    constexpr int parts = tile_parts, V = digits > 0 && parts * M * digits <= tile_sums ? parts : 1;
    const std::uint8_t* p = a.bytes + tile * a.blocks * W::tile_bytes;
    F total[parts][M];
    float sum[M] = {};
    unroll<parts * M>([&](auto i) { total[i / M][i % M] = f_set(0.0f); });
    for (std::size_t b = 0; b < a.blocks; ++b, p += W::tile_bytes) {
        for (int part = 0; part < parts; part += V) {
            F product[V][M];
            if constexpr (digits > 0) {
                multiply_words<W, digits>(p + part * bytes_in, x, b, product);
            } else {
                multiply_floats<W>(p + part * bytes_in, x, b, product);
            }
            unroll<V * M>([&](auto i) {
                constexpr int v = i / M, m = i % M;
                F& to = total[part + v][m];
                to = W::is_grouped ? add_group(a, tile, b, part + v, product[v][m], x.sum[b * x.rows + m], to)
                                   : f_add(to, product[v][m]);
            });
        }
        unroll<M>([&](auto m) { sum[m] += x.sum[b * x.rows + m]; });
    }
    unroll<parts * M>([&](auto i) {
        F y = total[i / M][i % M];
        if (W::has_scale && !W::is_grouped) {
            y = finish_tile(a, tile, i / M, y, sum[i % M]);
        }
        f_store(out + i % M * stride + i / M * lanes, y);
    });
}

// The tokens from m on.
inline Tokens from_token(const Tokens& x, std::size_t m, int digits) {
    Tokens rest = x;
    const std::size_t bytes = static_cast<std::size_t>(digits == 0 ? 4 : digits) * block;
    rest.values = static_cast<std::uint8_t*>(x.values) + m * bytes;
    rest.scale = x.scale + m;
    rest.offset = x.offset + m;
    rest.sum = x.sum + m;
    return rest;
}

// out[m * stride + i] = row 16 * first + i . token m, for `count` tiles. More than 8 tokens are two groups, whose sums
// fit the registers; the second one finds the tile in a cache.
template <class W, int digits>
void multiply_tiles(const Tiles& a, std::size_t first, std::size_t count, const Tokens& x, float* out,
                    std::size_t stride) {
    using Multiply = void (*)(const Tiles&, std::size_t, const Tokens&, float*, std::size_t);
    const std::size_t group = x.rows > max_decode_rows ? (x.rows + 1) / 2 : x.rows;
    const auto choose = [](std::size_t rows) -> Multiply {
        if constexpr (digits == 2) {
            static constexpr Multiply by_tokens[] = {multiply_tile<W, 2, 1>, multiply_tile<W, 2, 2>};
            return by_tokens[rows - 1];
        } else {
            static constexpr Multiply by_tokens[] = {multiply_tile<W, digits, 1>, multiply_tile<W, digits, 2>,
                                                     multiply_tile<W, digits, 3>, multiply_tile<W, digits, 4>,
                                                     multiply_tile<W, digits, 5>, multiply_tile<W, digits, 6>,
                                                     multiply_tile<W, digits, 7>, multiply_tile<W, digits, 8>};
            return by_tokens[rows - 1];
        }
    };
    const Multiply one = choose(group), other = choose(x.rows > group ? x.rows - group : group);
    const Tokens rest = from_token(x, group, digits);
    for (std::size_t tile = 0; tile < count; ++tile, out += tile_rows) {
        one(a, first + tile, x, out, stride);
        if (x.rows > group) {
            other(a, first + tile, rest, out + group * stride, stride);
        }
    }
}
