// Products with many tokens of one digit, blocked by 128 along the summed axis.
//
// Weights of `width` output columns are packed for one block at a time, [32 fours][width][4] bytes, which fits L1; all
// tokens then pass over it, 6 at a time, and add to f32 sums. Weights are read once for up to 256 tokens. With 6 tokens
// and 4 vectors a step of 24 multiply-adds loads 4 vectors and 6 words.

constexpr std::size_t width = tile_vectors * lanes;
constexpr std::size_t fours = block / 4;
constexpr std::size_t prefill_tokens = 6;

// A packed block: bytes as i_dot8 takes them, and for each of its columns scale and zero as floats.
struct Packed {
    std::uint8_t bytes[block * width];
    float scale[width];
    float zero[width];
};

template <class W>
inline void unpack(const std::uint8_t* from, std::uint8_t* to) {  // one block of a row, as i_dot8 takes its bytes
    if (W::is_grouped) {
        for (std::size_t c = 0; c < half; ++c) {
            to[c] = from[c] & 15;
            to[c + half] = static_cast<std::uint8_t>(from[c] >> 4);
        }
    } else {
        for (std::size_t c = 0; c < block; ++c) {
            to[c] = from[c] ^ static_cast<std::uint8_t>(W::shift);
        }
    }
}

// Block b of rows [first, first + width) of gate or up; rows from `last` on repeat the one before.
template <class W>
void pack_rows(const Matrix& a, std::size_t first, std::size_t last, std::size_t b, Packed& packed) {
    alignas(64) std::uint8_t bytes[width][block];
    for (std::size_t n = 0; n < width; ++n) {
        const std::size_t row = first + n < last ? first + n : last - 1;
        unpack<W>(a.rows + row * a.stride + b * W::block_bytes, bytes[n]);
        EDGE_PREFETCH_BLOCK(W, a.rows + row * a.stride, b + 1)
        const std::size_t entry = row * a.groups + (W::is_grouped ? b : 0);
        packed.scale[n] = f_one_f16(a.scale + entry);
        packed.zero[n] = static_cast<float>(a.zero[entry]);
    }
    for (std::size_t n = 0; n < width; n += lanes) {
        for (std::size_t c = 0; c < block; c += 4 * lanes) {
            transpose(bytes[n] + c, block, packed.bytes + c * width + 4 * n, 4 * width);
        }
    }
}

// Columns [begin, begin + width) of the 128 rows of Wdown from neuron `first`; rows from F on are 0 on the left.
template <class W>
void pack_down(const Weights& w, std::size_t first, std::size_t begin, Packed& packed) {
    const std::size_t b = begin / block, inner = begin % block;
    const std::size_t offset = b * W::block_bytes + (W::is_grouped ? inner % half : inner);
    const int shift = W::is_grouped && inner >= half ? 4 : 0;
    for (std::size_t k = 0; k < fours; ++k) {
        const std::uint8_t* rows[4];
        for (std::size_t i = 0; i < 4; ++i) {
            const std::size_t row = first + 4 * k + i < w.ffn ? first + 4 * k + i : w.ffn - 1;
            rows[i] = w.down + row * w.up.stride + offset;
            const std::size_t ahead = row + block < w.ffn ? block * w.up.stride : 0;
            EDGE_PREFETCH(rows[i] + ahead);
        }
        interleave(rows, width, W::is_grouped, shift, packed.bytes + 4 * k * width);
    }
    const std::size_t entry = (W::is_grouped ? first / block : 0) * w.columns + begin;
    for (std::size_t n = 0; n < width; n += lanes) {
        f_store(packed.scale + n, f_from_f16(w.down_scale + entry + n, lanes));
        f_store(packed.zero + n, f_from_i8(w.down_zero + entry + n, lanes));
    }
}

// Block b of a tile's rows and of those after it, as many as make `width`; tiles from `last` on repeat the one before.
template <class W>
void pack_tiles(const Tiles& a, std::size_t first, std::size_t last, std::size_t b, Packed& packed) {
    for (std::size_t t = 0; t < width / tile_rows; ++t) {
        const std::size_t tile = first + t < last ? first + t : last - 1;
        const std::uint8_t* p = a.bytes + (tile * a.blocks + b) * W::tile_bytes;
        std::uint8_t* to = packed.bytes + t * tile_rows * 4;
        for (std::size_t step = 0; step < W::steps; ++step) {
            W::template each_word<tile_parts>(
                p, step, [&](auto, std::size_t k, auto v, I words) { i_store(to + (k * width + v * lanes) * 4, words); });
        }
        for (std::size_t part = 0; part < tile_parts; ++part) {
            const std::size_t n = t * tile_rows + part * lanes;
            f_store(packed.scale + n, tile_scale(a, tile, W::is_grouped ? b : 0, part));
            f_store(packed.zero + n, tile_zero(a, tile, W::is_grouped ? b : 0, part));
        }
    }
}

// Adds the products of M tokens with one block to sums[m][n]: scale[n] * (left . packed - zero[n] * sum of left) with
// scales for each block; without, left . packed alone, and finish_rows does the rest once.
template <class W, int M>
EDGE_FLATTEN void multiply(const Tokens& left, std::size_t m0, std::size_t b, const Packed& packed, float* sums,
                           std::size_t stride) {
    I integers[M][tile_vectors];
    const std::int8_t* q = static_cast<const std::int8_t*>(left.values) + (b * left.rows + m0) * block;
    unroll<M>([&](auto m) {
        const I offset = W::shift ? i_set(left.offset[b * left.rows + m0 + m]) : i_zero();
        unroll<tile_vectors>([&](auto v) { integers[m][v] = offset; });
    });
    for (std::size_t k = 0; k < fours; ++k) {
        I bytes[tile_vectors];
        unroll<tile_vectors>([&](auto v) { bytes[v] = i_load(packed.bytes + (k * width + v * lanes) * 4); });
        unroll<M>([&](auto m) {
            const I word = i_set_word(q + m * block + 4 * k);
            unroll<tile_vectors>([&](auto v) { integers[m][v] = W::dot(integers[m][v], bytes[v], word); });
        });
    }
    unroll<M>([&](auto m) {
        const F scale = f_set(left.scale[b * left.rows + m0 + m]);
        const F sum = f_set(-left.sum[b * left.rows + m0 + m]);
        unroll<tile_vectors>([&](auto v) {
            float* to = sums + (m0 + m) * stride + v * lanes;
            F product = f_from_i32(integers[m][v]);
            if (W::is_grouped) {
                product = f_fma(product, scale, f_mul(f_load(packed.zero + v * lanes), sum));
                f_store(to, f_fma(product, f_load(packed.scale + v * lanes), f_load(to)));
            } else {
                f_store(to, f_fma(product, scale, f_load(to)));
            }
        });
    });
}

template <class W>
void multiply_all(const Tokens& left, std::size_t b, const Packed& packed, float* sums, std::size_t stride) {
    using Multiply = void (*)(const Tokens&, std::size_t, std::size_t, const Packed&, float*, std::size_t);
    static constexpr Multiply by_tokens[] = {multiply<W, 1>, multiply<W, 2>, multiply<W, 3>,
                                             multiply<W, 4>, multiply<W, 5>, multiply<W, 6>};
    for (std::size_t m = 0; m < left.rows; m += prefill_tokens) {
        const std::size_t tokens = left.rows - m < prefill_tokens ? left.rows - m : prefill_tokens;
        by_tokens[tokens - 1](left, m, b, packed, sums, stride);
    }
}

// The scales and zeros of columns that have one each: sums = scale[n] * (sums - zero[n] * sum of token m).
void finish_rows(const Tokens& left, std::size_t blocks, const Packed& packed, float* sums, std::size_t stride) {
    for (std::size_t m = 0; m < left.rows; ++m) {
        float total = 0;
        for (std::size_t b = 0; b < blocks; ++b) {
            total += left.sum[b * left.rows + m];
        }
        for (std::size_t n = 0; n < width; n += lanes) {
            float* to = sums + m * stride + n;
            const F shifted = f_fma(f_load(packed.zero + n), f_set(-total), f_load(to));
            f_store(to, f_mul(shifted, f_load(packed.scale + n)));
        }
    }
}

// out[m][n] = token m . column n of the product, for 128 columns, of which `count` exist: pack(n, b) packs block b of
// columns from n on.
template <class W, class Pack>
void multiply_blocks(const Tokens& left, std::size_t blocks, std::size_t count, Packed& packed, const Pack& pack,
                     float* out) {
    for (std::size_t i = 0; i < left.rows * block; ++i) {
        out[i] = 0;
    }
    for (std::size_t n = 0; n < block && n < count; n += width) {
        for (std::size_t b = 0; b < blocks; ++b) {
            pack(n, b);
            multiply_all<W>(left, b, packed, out + n, block);
        }
        if (!W::is_grouped) {
            finish_rows(left, blocks, packed, out + n, block);
        }
    }
}
