// Prefill over the same vector operations: two 8-bit matrix products, blocked by 128 along the summed axis.
//
// A tile of `width` output columns is packed for one block at a time, [32 fours][width][4] bytes, which fits L1; all
// tokens then pass over it, 6 at a time, and add to f32 sums. Weights are read once for up to 256 tokens. With 6 tokens
// and 4 vectors a step of 24 multiply-adds loads 4 vectors and 6 words.

constexpr std::size_t width = tile_vectors * lanes;
constexpr std::size_t fours = block / 4;
constexpr std::size_t prefill_tokens = 6;

// One block of a tile: bytes, and for each of its columns scale and zero as floats.
struct Packed {
    std::uint8_t bytes[block * width];
    float scale[width];
    float zero[width];
};

// The 8-bit left operand, [blocks][rows][128], with scale and sum for each 128: a pass reads it in order.
struct Left {
    const std::int8_t* q;
    const float* scale;
    const float* sum;
    std::size_t blocks;
    std::size_t rows;
};

template <class W>
inline void unpack(const std::uint8_t* from, std::uint8_t* to) {  // one block of a row as 128 unsigned bytes
    if (W::is_grouped) {
        for (std::size_t c = 0; c < half; ++c) {
            to[c] = from[c] & 15;
            to[c + half] = static_cast<std::uint8_t>(from[c] >> 4);
        }
    } else {
        for (std::size_t c = 0; c < block; ++c) {
            to[c] = from[c] ^ 0x80;
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
        packed.zero[n] = static_cast<float>(a.zero[entry]) + W::shift;
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
        f_store(packed.zero + n, f_add(f_from_i8(w.down_zero + entry + n, lanes), f_set(W::shift)));
    }
}

// Adds the products of M tokens with one block to sums[m][n]: scale[n] * (left . packed - zero[n] * sum of left) with
// scales for each block; without, left . packed alone, and finish_rows does the rest once.
template <bool is_grouped, int M>
void multiply(const Left& left, std::size_t m0, std::size_t b, const Packed& packed, float* sums, std::size_t stride) {
    I integers[M][tile_vectors];
    const std::int8_t* q[M];
    unroll<M>([&](auto m) {
        q[m] = left.q + (b * left.rows + m0 + m) * block;
        unroll<tile_vectors>([&](auto v) { integers[m][v] = i_zero(); });
    });
    for (std::size_t k = 0; k < fours; ++k) {
        I bytes[tile_vectors];
        unroll<tile_vectors>([&](auto v) { bytes[v] = i_load(packed.bytes + (k * width + v * lanes) * 4); });
        unroll<M>([&](auto m) {
            const I word = i_set_word(q[m] + 4 * k);
            unroll<tile_vectors>([&](auto v) { integers[m][v] = i_dot8(integers[m][v], bytes[v], word); });
        });
    }
    unroll<M>([&](auto m) {
        const F scale = f_set(left.scale[b * left.rows + m0 + m]);
        const F sum = f_set(-left.sum[b * left.rows + m0 + m]);
        unroll<tile_vectors>([&](auto v) {
            float* to = sums + (m0 + m) * stride + v * lanes;
            F product = f_from_i32(integers[m][v]);
            if (is_grouped) {
                product = f_fma(product, scale, f_mul(f_load(packed.zero + v * lanes), sum));
                f_store(to, f_fma(product, f_load(packed.scale + v * lanes), f_load(to)));
            } else {
                f_store(to, f_fma(product, scale, f_load(to)));
            }
        });
    });
}

template <bool is_grouped>
void multiply_all(const Left& left, std::size_t b, const Packed& packed, float* sums, std::size_t stride) {
    using Multiply = void (*)(const Left&, std::size_t, std::size_t, const Packed&, float*, std::size_t);
    static constexpr Multiply by_tokens[] = {multiply<is_grouped, 1>, multiply<is_grouped, 2>, multiply<is_grouped, 3>,
                                             multiply<is_grouped, 4>, multiply<is_grouped, 5>, multiply<is_grouped, 6>};
    for (std::size_t m = 0; m < left.rows; m += prefill_tokens) {
        const std::size_t tokens = left.rows - m < prefill_tokens ? left.rows - m : prefill_tokens;
        by_tokens[tokens - 1](left, m, b, packed, sums, stride);
    }
}

// The scales and zeros of columns that have one each: sums = scale[n] * (sums - zero[n] * sum of token m).
void finish_rows(const Left& left, const Packed& packed, float* sums, std::size_t stride) {
    for (std::size_t m = 0; m < left.rows; ++m) {
        float total = 0;
        for (std::size_t b = 0; b < left.blocks; ++b) {
            total += left.sum[b * left.rows + m];
        }
        for (std::size_t n = 0; n < width; n += lanes) {
            float* to = sums + m * stride + n;
            const F shifted = f_fma(f_load(packed.zero + n), f_set(-total), f_load(to));
            f_store(to, f_mul(shifted, f_load(packed.scale + n)));
        }
    }
}

// out[m][n] = token m . row first + n of gate or up, for 128 rows.
template <class W>
void multiply_rows(const Matrix& a, std::size_t first, std::size_t last, const Left& left, Packed& packed, float* out) {
    for (std::size_t i = 0; i < left.rows * block; ++i) {
        out[i] = 0;
    }
    for (std::size_t n = 0; n < block && first + n < last; n += width) {
        for (std::size_t b = 0; b < left.blocks; ++b) {
            pack_rows<W>(a, first + n, last, b, packed);
            multiply_all<W::is_grouped>(left, b, packed, out + n, block);
        }
        if (!W::is_grouped) {
            finish_rows(left, packed, out + n, block);
        }
    }
}

template <class W>
void hidden_of(const Weights& w, const Thresholds& thresholds, const Tokens& t, std::size_t first, Hidden& hidden,
               float* scratch) {
    float *g = scratch, *up = g + t.rows * block;
    Packed packed;
    const Left left{static_cast<const std::int8_t*>(t.values), t.scale, t.sum, w.columns / block, t.rows};
    multiply_rows<W>(w.gate, first, w.ffn, left, packed, g);
    multiply_rows<W>(w.up, first, w.ffn, left, packed, up);
    activate(w.activation, g, t.rows * block);
    const std::size_t count = w.ffn - first < block ? w.ffn - first : block;
    for (std::size_t m = 0; m < t.rows; ++m) {
        float values[block] = {};
        for (std::size_t j = 0; j < count; ++j) {
            const float limit = threshold_of(thresholds, first + j), a = g[m * block + j];
            values[j] = a <= limit && a >= -limit ? 0.0f : a * up[m * block + j];
        }
        const std::size_t entry = first / block * t.rows + m;
        quantise(values, block, 8, hidden.q + entry * block, hidden.scale[entry], hidden.sum[entry]);
    }
}

void prefill_hidden(const Weights& w, const Thresholds& thresholds, const Tokens& t, std::size_t first, Hidden& hidden,
                    float* scratch) {
    (w.format == Format::u4 ? hidden_of<U4> : hidden_of<I8>)(w, thresholds, t, first, hidden, scratch);
}

template <class W>
void output_of(const Weights& w, const Left& left, std::size_t begin, float* y, float* sums) {
    Packed packed;
    for (std::size_t i = 0; i < left.rows * block; ++i) {
        sums[i] = 0;
    }
    for (std::size_t n = 0; n < block; n += width) {
        for (std::size_t b = 0; b < left.blocks; ++b) {
            pack_down<W>(w, b * block, begin + n, packed);
            multiply_all<W::is_grouped>(left, b, packed, sums + n, block);
        }
        if (!W::is_grouped) {
            finish_rows(left, packed, sums + n, block);
        }
    }
    const std::size_t count = w.hidden - begin < block ? w.hidden - begin : block;
    for (std::size_t m = 0; m < left.rows; ++m) {
        for (std::size_t n = 0; n < count; n += lanes) {
            f_store(y + m * w.hidden + begin + n, f_load(sums + m * block + n), count - n < lanes ? count - n : lanes);
        }
    }
}

void prefill_output(const Weights& w, const Hidden& hidden, std::size_t rows, std::size_t begin, float* y,
                    float* scratch) {
    const Left left{hidden.q, hidden.scale, hidden.sum, (w.ffn + block - 1) / block, rows};
    (w.format == Format::u4 ? output_of<U4> : output_of<I8>)(w, left, begin, y, scratch);
}
