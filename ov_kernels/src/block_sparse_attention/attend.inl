// The kernels, written once over a few vector operations (cpu/*_vectors.inl, cpu/*_dots.inl, cpu/vector_math.inl). A
// translation unit of one instruction set includes them and this file in its own unnamed namespace, and defines:
//
//   tile_vectors               vectors of results that a tile of 4 rows has; lanes * tile_vectors is 16 or a multiple
//   f_keep(x, i, s, other)     x in the lanes whose index, from i on, a row sees; else `other`
//
// Scores are K^T q and results V^T p: one product, rows by depth times depth by width, for both. Its right side is a block
// as it lies in the cache; with 8 rows or more it is unpacked once, to 16 bits or f32, and read by all of them.
//
// Bound by memory up to some 8 rows: a block's bytes are read once, in order, and the next block's are prefetched along.
// Bound by integer products beyond (2 a lane and instruction; 15-bit queries and probabilities cost what 8 bits would).

// Numbers for each row, at the end of the scratch memory.
struct RowFacts {
    float scale[max_rows];   // of scores: softmax's, times the query's where it is quantised
    float weight[max_rows];  // of the probabilities in 16 bits
    float top[max_rows];     // the largest score so far
    float factor[max_rows];  // by which earlier results shrink
    Seen seen[max_rows];
    bool is_blind[max_rows];
};

struct Parts {
    void* queries;  // i16 or f32 [rows][D]
    float* scores;  // [rows][S]
    std::int16_t* probabilities;  // [rows][S]
    std::uint8_t* unpacked;
    RowFacts* facts;
};

inline Parts parts_of(const Layout& layout, void* scratch) {
    std::uint8_t* next = static_cast<std::uint8_t*>(scratch);
    Parts parts{};
    parts.queries = next;
    next += max_rows * layout.key_dim * 4;
    parts.scores = reinterpret_cast<float*>(next);
    next += max_rows * layout.block_size * 4;
    parts.probabilities = reinterpret_cast<std::int16_t*>(next);
    next += max_rows * layout.block_size * 4;
    parts.unpacked = next;
    next += layout.block_size * (layout.key_dim + layout.value_dim) * 4;
    parts.facts = reinterpret_cast<RowFacts*>(next);
    return parts;
}

// How the right side of a product lies, and how it is multiplied: `step` of the depth in one instruction.
struct Packed8 {
    using A = std::int16_t;
    using Sum = I;
    static constexpr std::size_t step = 2, bytes = 2;
    static I zero() { return i_zero(); }
    static I load(const std::uint8_t* b) { return i_16_from_i8(b); }
    static I set(const A* a) { return i_set_word(a); }
    static I fma(I sum, I a, I b) { return i_dot16(sum, a, b); }
    static F result(I sum) { return f_from_i32(sum); }
};

struct Packed16 : Packed8 {
    static constexpr std::size_t bytes = 4;
    static I load(const std::uint8_t* b) { return i_load(b); }
};

struct Floats {
    using A = float;
    using Sum = F;
    static constexpr std::size_t step = 1, bytes = 4;
    static F zero() { return f_set(0.0f); }
    static F load(const std::uint8_t* b) { return f_load(reinterpret_cast<const float*>(b)); }
    static F set(const A* a) { return f_set(*a); }
    static F fma(F sum, F a, F b) { return f_fma(a, b, sum); }
    static F result(F sum) { return sum; }
};

struct Halves : Floats {
    static constexpr std::size_t bytes = 2;
    static F load(const std::uint8_t* b) { return f_from_bf16(b); }
};

// A product: rows of `a` by `b`, [depth / step][width][step]. `next` is where the block after this one has the same part.
template <class W>
struct Product {
    const typename W::A* a;
    std::size_t a_stride;
    const std::uint8_t* b;
    const std::uint8_t* next;
    std::size_t depth, width;
};

// One tile: `rows` rows from `row` on, `vectors` vectors from column n on. take(row, column, F) gets the results.
template <class W, int rows, int vectors, bool prefetches, class Take>
inline void tile(const Product<W>& x, std::size_t row, std::size_t n, const Take& take) {
    typename W::Sum sums[rows * vectors];
    unroll<rows * vectors>([&](auto i) { sums[i] = W::zero(); });
    const std::size_t line = x.width * W::bytes;
    std::size_t at = n * W::bytes;
    for (std::size_t k = 0; k < x.depth; k += W::step, at += line) {
        typename W::Sum b[vectors];
        unroll<vectors>([&](auto v) { b[v] = W::load(x.b + at + v * lanes * W::bytes); });
        if constexpr (prefetches) {
            for (std::size_t ahead = 0; ahead < vectors * lanes * W::bytes; ahead += 64) {
                EDGE_PREFETCH(x.next + at + ahead);
            }
        }
        unroll<rows>([&](auto r) {
            const typename W::Sum a = W::set(x.a + (row + r) * x.a_stride + k);
            unroll<vectors>([&](auto v) { sums[r * vectors + v] = W::fma(sums[r * vectors + v], a, b[v]); });
        });
    }
    unroll<rows * vectors>([&](auto i) {
        take(row + i / vectors, n + i % vectors * lanes, W::result(sums[i]));
    });
}

template <class W, int vectors, bool prefetches, class Take>
inline void columns(const Product<W>& x, std::size_t count, std::size_t n, const Take& take) {
    std::size_t row = 0;
    if (count >= 4) {
        tile<W, 4, vectors, prefetches>(x, 0, n, take);
        for (row = 4; row + 4 <= count; row += 4) {
            tile<W, 4, vectors, false>(x, row, n, take);
        }
    } else if (count >= 2) {
        tile<W, 2, vectors, prefetches>(x, 0, n, take);
        row = 2;
    } else {
        tile<W, 1, vectors, prefetches>(x, 0, n, take);
        row = 1;
    }
    if (row + 2 <= count) {
        tile<W, 2, vectors, false>(x, row, n, take);
        row += 2;
    }
    if (row < count) {
        tile<W, 1, vectors, false>(x, row, n, take);
    }
}

template <class W, bool prefetches, class Take>
inline void multiply(const Product<W>& x, std::size_t count, const Take& take) {
    constexpr std::size_t wide = lanes * tile_vectors;
    std::size_t n = 0;
    for (; n + wide <= x.width; n += wide) {
        columns<W, tile_vectors, prefetches>(x, count, n, take);
    }
    for (; n < x.width; n += 16) {
        columns<W, 16 / lanes, prefetches>(x, count, n, take);
    }
}

void store(const Layout& layout, std::uint8_t* block, std::size_t slot, const float* key, const float* value) {
    if (layout.format != Format::i8) {
        kernels_ref.store(layout, block, slot, key, value);
        return;
    }
    std::int8_t q[max_dim];
    float* scales = reinterpret_cast<float*>(block + scales_at(layout));
    const auto quantise = [&](const float* x, std::size_t count, std::size_t place) {
        const float scale = f_scale_of(x, count, 127.0f);
        f_store_first(scales + place, scale);
        i_quantise8(x, count, scale > 0.0f ? 1.0f / scale : 0.0f, q);
    };
    quantise(key, layout.key_dim, slot);
    for (std::size_t c = 0; c < layout.key_dim; c += 2) {
        std::uint8_t* place = block + (c / 2 * layout.block_size + slot) * 2;
        place[0] = static_cast<std::uint8_t>(q[c]);
        place[1] = static_cast<std::uint8_t>(q[c + 1]);
    }
    quantise(value, layout.value_dim, layout.block_size + slot);
    std::uint8_t* values = block + values_at(layout) + slot / 2 * layout.value_dim * 2 + slot % 2;
    for (std::size_t c = 0; c < layout.value_dim; ++c) {
        values[2 * c] = static_cast<std::uint8_t>(q[c]);
    }
}

void prepare(const Layout& layout, const Rows& rows, float scale, void* scratch) {
    const Parts parts = parts_of(layout, scratch);
    for (std::size_t r = 0; r < rows.count; ++r) {
        const float* query = rows.query + r / rows.group * rows.token_stride + r % rows.group * layout.key_dim;
        if (layout.format == Format::i8) {
            const float step = f_scale_of(query, layout.key_dim, 32767.0f);
            i_quantise16(query, layout.key_dim, step > 0.0f ? 1.0f / step : 0.0f,
                         static_cast<std::int16_t*>(parts.queries) + r * layout.key_dim);
            parts.facts->scale[r] = scale * step;
        } else {
            float* to = static_cast<float*>(parts.queries) + r * layout.key_dim;
            for (std::size_t c = 0; c < layout.key_dim; c += lanes) {
                f_store(to + c, f_load(query + c));
            }
            parts.facts->scale[r] = scale;
        }
    }
}

// Which slots of a block each row sees. False: every row sees all of them.
bool look(const Layout& layout, const Pattern& pattern, const Rows& rows, std::int64_t number, RowFacts& facts) {
    const std::int64_t size = static_cast<std::int64_t>(layout.block_size), start = number * size;
    const std::int64_t last = rows.first + static_cast<std::int64_t>(rows.count / rows.group) - 1;
    std::int64_t whole[max_rows];
    bool are_whole = true;
    for (std::size_t g = 0; g < rows.group; ++g) {
        whole[g] = pattern.strides[g] > 0 && (number + pattern.offsets[g]) % pattern.strides[g] == 0;
        are_whole = are_whole && whole[g];
    }
    if (start + size <= rows.first + 1 && (are_whole || start >= local_start(pattern, last, size))) {
        return false;
    }
    const auto within = [&](std::int64_t slots) {
        return static_cast<float>(slots < 0 ? 0 : slots > size ? size : slots);
    };
    for (std::size_t r = 0; r < rows.count; ++r) {
        const std::int64_t position = rows.first + static_cast<std::int64_t>(r / rows.group);
        Seen& seen = facts.seen[r];
        seen.sink = whole[r % rows.group] ? static_cast<float>(size) : within(pattern.sink - start);
        seen.near = within(local_start(pattern, position, size) - start);
        seen.end = within(position + 1 - start);
        facts.is_blind[r] = seen.end <= 0.0f || (seen.sink <= 0.0f && seen.near >= seen.end);
    }
    return true;
}

// Scores get their scales and lose what is not seen, and each row's largest so far is found. `scales` of i8: those of the
// block's keys, then of its values.
template <bool is_masked, bool is_i8>
inline void find_tops(const Layout& layout, std::size_t count, const float* scales, const Parts& parts, float* states) {
    RowFacts& facts = *parts.facts;
    for (std::size_t r = 0; r < count; ++r) {
        float* x = parts.scores + r * layout.block_size;
        facts.factor[r] = states[r * state_stride(layout) + layout.value_dim];
        F most = f_set(facts.factor[r]);
        for (std::size_t n = 0; n < layout.block_size; n += lanes) {
            F score = f_load(x + n);
            if constexpr (is_i8) {
                score = f_mul(score, f_load(scales + n));
            }
            if constexpr (is_masked) {
                score = f_keep(score, n, facts.seen[r], nothing_seen);
            }
            f_store(x + n, score);
            most = f_max(score, most);
        }
        facts.top[r] = f_most(most);
    }
    for (std::size_t r = 0; r < count; r += lanes) {
        f_store(facts.factor + r, exp_of(f_sub(f_load(facts.factor + r), f_load(facts.top + r))));
    }
}

// Scores become exponentials, which the rows' sums take in; those of i8 are then multiplied by their values' scales.
template <bool is_masked, bool is_i8>
inline void exponentiate(const Layout& layout, std::size_t count, const float* scales, const Parts& parts,
                         float* states) {
    RowFacts& facts = *parts.facts;
    for (std::size_t r = 0; r < count; ++r) {
        float* x = parts.scores + r * layout.block_size;
        F sum = f_set(0.0f), largest = f_set(0.0f);
        for (std::size_t n = 0; n < layout.block_size; n += lanes) {
            F p = exp_of(f_sub(f_load(x + n), f_set(facts.top[r])));
            if constexpr (is_masked) {
                p = f_keep(p, n, facts.seen[r], 0.0f);
            }
            sum = f_add(sum, p);
            if constexpr (is_i8) {
                p = f_mul(p, f_load(scales + layout.block_size + n));
                if constexpr (is_masked) {  // the scale of a slot that is not in use may be anything
                    p = f_keep(p, n, facts.seen[r], 0.0f);
                }
                largest = f_max(largest, p);
                sum = f_fma(p, f_set(0.0f), sum);  // what is no finite number spoils the row
            }
            f_store(x + n, p);
        }
        float* state = states + r * state_stride(layout) + layout.value_dim;
        state[0] = facts.top[r];
        state[1] = state[1] * facts.factor[r] + f_sum(sum);
        facts.weight[r] = is_i8 ? f_most(largest) * (1.0f / 32767.0f) : 1.0f;
    }
}

template <class W, bool prefetches>
inline void add_scores(const Layout& layout, const Rows& rows, const std::uint8_t* keys, const std::uint8_t* next,
                       const Parts& parts) {
    const auto* queries = static_cast<const typename W::A*>(parts.queries);
    const Product<W> product{queries, layout.key_dim, keys, next, layout.key_dim, layout.block_size};
    multiply<W, prefetches>(product, rows.count, [&](std::size_t r, std::size_t n, F x) {
        f_store(parts.scores + r * layout.block_size + n, f_mul(x, f_set(parts.facts->scale[r])));
    });
}

template <class W, bool prefetches>
inline void add_values(const Layout& layout, const Rows& rows, const std::uint8_t* values, const std::uint8_t* next,
                       std::size_t used, const Parts& parts, const typename W::A* weights, float* states) {
    const Product<W> product{weights, layout.block_size, values, next, used, layout.value_dim};
    multiply<W, prefetches>(product, rows.count, [&](std::size_t r, std::size_t n, F x) {
        float* sums = states + r * state_stride(layout) + n;
        f_store(sums, f_fma(f_load(sums), f_set(parts.facts->factor[r]), f_mul(x, f_set(parts.facts->weight[r]))));
    });
}

// Packed8 to Packed16, or Halves to Floats.
inline void unpack(Format format, const std::uint8_t* from, const std::uint8_t* next, std::size_t count,
                   std::uint8_t* to) {
    if (format == Format::i8) {
        for (std::size_t i = 0; i < count; i += 2 * lanes) {
            EDGE_PREFETCH(next + i);
            i_store(to + 2 * i, i_16_from_i8(from + i));
        }
    } else {
        for (std::size_t i = 0; i < count; i += lanes) {
            EDGE_PREFETCH(next + 2 * i);
            f_store(reinterpret_cast<float*>(to) + i, f_from_bf16(from + 2 * i));
        }
    }
}

// Softmax of all rows, in place, for i8 also in 16 bits. Each step goes over all rows before the next begins: one row is
// a chain of reductions that wait for each other.
template <bool is_masked, bool is_i8>
inline void soften(const Layout& layout, const Rows& rows, const std::uint8_t* block, const Parts& parts,
                   float* states) {
    const float* scales = reinterpret_cast<const float*>(block + scales_at(layout));
    find_tops<is_masked, is_i8>(layout, rows.count, scales, parts, states);
    exponentiate<is_masked, is_i8>(layout, rows.count, scales, parts, states);
    if constexpr (is_i8) {
        for (std::size_t r = 0; r < rows.count; ++r) {
            const float weight = parts.facts->weight[r];
            i_quantise16(parts.scores + r * layout.block_size, layout.block_size, weight > 0.0f ? 1.0f / weight : 0.0f,
                         parts.probabilities + r * layout.block_size);
        }
    }
}

template <bool is_i8>
inline void soften_rows(const Layout& layout, const Rows& rows, const std::uint8_t* block, bool is_masked,
                        const Parts& parts, float* states) {
    if (is_masked) {
        soften<true, is_i8>(layout, rows, block, parts, states);
    } else {
        soften<false, is_i8>(layout, rows, block, parts, states);
    }
}

// One block for all rows, of which they use the first `used` slots: what lies behind may be no number. `Near` is how it
// lies in the cache, `Far` how it is read by many rows.
template <class Near, class Far, bool is_i8>
inline void attend_block(const Layout& layout, const Rows& rows, const std::uint8_t* block, const std::uint8_t* next,
                         bool is_masked, std::size_t used, const Parts& parts, float* states) {
    const std::size_t at = values_at(layout), keys = layout.block_size * layout.key_dim;
    const auto* floats = reinterpret_cast<const typename Near::A*>(parts.scores);
    const auto* weights = is_i8 ? reinterpret_cast<const typename Near::A*>(parts.probabilities) : floats;
    if (rows.count < 8 || Near::bytes == Far::bytes) {
        add_scores<Near, true>(layout, rows, block, next, parts);
        soften_rows<is_i8>(layout, rows, block, is_masked, parts, states);
        add_values<Near, true>(layout, rows, block + at, next + at, used, parts, weights, states);
        return;
    }
    std::uint8_t* values = parts.unpacked + keys * 4;
    unpack(layout.format, block, next, keys, parts.unpacked);
    unpack(layout.format, block + at, next + at, layout.block_size * layout.value_dim, values);
    add_scores<Far, false>(layout, rows, parts.unpacked, parts.unpacked, parts);
    soften_rows<is_i8>(layout, rows, block, is_masked, parts, states);
    add_values<Far, false>(layout, rows, values, values, used, parts, weights, states);
}

void attend(const Layout& layout, const Pattern& pattern, const Rows& rows, const Entry* entries, std::size_t count,
            float* states, void* scratch) {
    const Parts parts = parts_of(layout, scratch);
    const std::int64_t last = rows.first + static_cast<std::int64_t>(rows.count / rows.group) - 1;
    const float nan = f_sum(f_set(0.0f)) / 0.0f;
    for (std::size_t e = 0; e < count; ++e) {
        const bool is_masked = look(layout, pattern, rows, entries[e].number, *parts.facts);
        const std::uint8_t* block = entries[e].block;
        if (block == nullptr) {
            for (std::size_t r = 0; r < rows.count; ++r) {
                if (!is_masked || !parts.facts->is_blind[r]) {
                    f_store_first(states + r * state_stride(layout) + layout.value_dim + 1, nan);
                }
            }
            continue;
        }
        const std::uint8_t* next = entries[e + 1].block != nullptr ? entries[e + 1].block : block;
        const std::int64_t slots = last + 1 - entries[e].number * static_cast<std::int64_t>(layout.block_size);
        const bool is_partial = slots < static_cast<std::int64_t>(layout.block_size);
        const std::size_t step = layout.format == Format::i8 ? 2 : 1;  // of a pair the second half may be unused: times 0
        const std::size_t used = is_partial ? (static_cast<std::size_t>(slots) + step - 1) / step * step : layout.block_size;
        if (layout.format == Format::i8) {
            attend_block<Packed8, Packed16, true>(layout, rows, block, next, is_masked, used, parts, states);
        } else if (layout.format == Format::bf16) {
            attend_block<Halves, Floats, false>(layout, rows, block, next, is_masked, used, parts, states);
        } else {
            attend_block<Floats, Floats, false>(layout, rows, block, next, is_masked, used, parts, states);
        }
    }
}
