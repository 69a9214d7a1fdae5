// How weights become vectors, for each format; which columns of a token share a scale; how blocks are prefetched.

constexpr std::size_t half = block / 2;
constexpr std::size_t bytes_in = 4 * lanes;      // a vector
constexpr std::size_t span = block * lanes / 4;  // 8 vectors of bytes

// The sum that two digits' sums stand for.
template <int digits>
inline I i_whole(const I* sums) {
    return digits == 2 ? i_two_digits(sums[0], sums[1]) : sums[0];
}

// load: columns c.. and c + 64.. of a block as floats, `lanes` of each; bytes: `bytes_in` columns from c or c + 64 on,
// as i_dot8 takes them.
//
// In tiles, each_word: word k of 16 rows, 4 columns from 4k on, as i_dot8 takes them. each_column: those of one loaded
// word as floats.
//
// each_vector, each_word: loops of a few visits, which get a constant that counts them within a step, then the number
// of the vector or word. Whole blocks at once would be several times the code, and that much longer to compile.
//
// Integer dot products of a row run over spans of columns. In a span each lane of a sum sees columns that share one
// scale, a group of them to `group_lanes` lanes, so that sums become floats once for a span. A group's columns come in
// pieces: piece i of group g is `piece` columns from column_of(g, i) on, and lies at place_of(g, i) of the token's
// bytes.

struct I8 {
    static constexpr bool is_grouped = false;
    static constexpr bool has_scale = true;
    static constexpr std::int32_t shift = byte_shift;
    static constexpr std::size_t block_bytes = block;
    static constexpr std::size_t group_lanes = 1;
    static constexpr std::size_t piece = 4, pieces = 8;
    static std::size_t column_of(std::size_t g, std::size_t i) { return (i * lanes + g % lanes) * piece; }
    static std::size_t place_of(std::size_t g, std::size_t i) { return column_of(g, i); }
    template <class Visit>
    static void each_vector(const std::uint8_t* p, const Visit& visit) {
        for (std::size_t first = 0; first < 8; first += 4) {
            unroll<4>([&](auto i) { visit(i, first + i, bytes(p + (first + i) * bytes_in, 0, 0)); });
        }
    }
    static void load(const std::uint8_t* p, std::size_t c, F& low, F& high) {
        low = f_from_i8(p + c);
        high = f_from_i8(p + c + half);
    }
    static I dot(I sum, I weights, I x) { return i_dot8(sum, weights, x); }
    static I bytes(const std::uint8_t* p, std::size_t c, int part) {
        return i_bytes(i_load(p + c + (part ? half : 0)));
    }
    static constexpr std::size_t tile_bytes = tile_rows * block_bytes;
    static constexpr std::size_t steps = 1;
    template <int V, class Visit>
    static void each_word(const std::uint8_t* p, std::size_t, const Visit& visit) {
        for (std::size_t first = 0; first < 32; first += 4) {
            unroll<4>([&](auto i) {
                unroll<V>([&](auto v) { visit(i, first + i, v, bytes(p + (first + i) * 64, v * bytes_in, 0)); });
            });
        }
    }
    static I add(I part, I weights, I x) { return dot(part, weights, x); }
    static I whole(I part) { return part; }
    template <class Visit>
    static void each_column(I words, std::size_t k, const Visit& visit) {
        unroll<4>([&](auto i) { visit(4 * k + i, f_from_i32(i_shift_right<24>(i_shift_left<24 - 8 * i>(words)))); });
    }
};

// Quarters of blocks, 16 bytes of 32 columns, alternate so that each block has 4 lanes: i_quarters makes that order of
// rows.
struct U4 {
    static constexpr bool is_grouped = true;
    static constexpr bool has_scale = true;
    static constexpr std::int32_t shift = 0;
    static constexpr std::size_t block_bytes = block / 2;
    static constexpr std::size_t group_lanes = 4;
    static constexpr std::size_t piece = 16, pieces = 8;
    static std::size_t column_of(std::size_t g, std::size_t i) { return g % (span / block) * block + i * piece; }
    static std::size_t place_of(std::size_t g, std::size_t i) {
        return (i % 4 * 2 + i / 4) * bytes_in + g % (span / block) * piece;
    }
    template <class Visit>
    static void each_vector(const std::uint8_t* p, const Visit& visit) {
        constexpr int n = span / block;
        for (std::size_t c = 0; c < block_bytes / bytes_in; ++c) {
            I rows[n];
            unroll<n>([&](auto i) { rows[i] = i_load(p + i * block_bytes + c * bytes_in); });
            i_quarters(rows);
            unroll<n>([&](auto i) {
                visit(Index<2 * i>{}, (c * n + i) * 2, i_low_u4(rows[i]));
                visit(Index<2 * i + 1>{}, (c * n + i) * 2 + 1, i_high_u4(rows[i]));
            });
        }
    }
    static void load(const std::uint8_t* p, std::size_t c, F& low, F& high) { f_from_u4(p + c, low, high); }
    static I dot(I sum, I weights, I x) { return i_dot4(sum, weights, x); }
    static I bytes(const std::uint8_t* p, std::size_t c, int part) {
        return part ? i_high_u4(i_load(p + c)) : i_low_u4(i_load(p + c));
    }
    static constexpr std::size_t tile_bytes = tile_rows * block_bytes;
    static constexpr std::size_t steps = 4;
    template <int V, class Visit>
    static void each_word(const std::uint8_t* p, std::size_t step, const Visit& visit) {
        unroll<4>([&](auto i) {
            const std::size_t k = 4 * step + i;
            I pairs[V];
            unroll<V>([&](auto v) { pairs[v] = i_load(p + k * 64 + v * bytes_in); });
            unroll<V>([&](auto v) { visit(Index<2 * i>{}, k, v, i_low_u4(pairs[v])); });
            unroll<V>([&](auto v) { visit(Index<2 * i + 1>{}, k + 16, v, i_high_u4(pairs[v])); });
        });
    }
    static I add(I part, I weights, I x) { return i_add4(part, weights, x); }
    static I whole(I part) { return i_whole4(part); }
    template <class Visit>
    static void each_column(I words, std::size_t k, const Visit& visit) {
        unroll<8>([&](auto i) {  // the nibbles of a word: those of even i are columns of the first half
            visit(i % 2 * half + 4 * k + i / 2, f_from_i32(i_low_nibble(i_shift_right<4 * i>(words))));
        });
    }
};

struct BF16 {
    static constexpr bool is_grouped = false;
    static constexpr bool has_scale = false;
    static constexpr std::int32_t shift = 0;
    static constexpr std::size_t block_bytes = block * 2;
    static void load(const std::uint8_t* p, std::size_t c, F& low, F& high) {
        low = f_from_bf16(p + 2 * c);
        high = f_from_bf16(p + 2 * (c + half));
    }
    static constexpr std::size_t tile_bytes = tile_rows * block_bytes;
    template <class Visit>
    static void each_column(I words, std::size_t k, const Visit& visit) {
        visit(2 * k, f_from_bits(i_shift_left<16>(words)));
        visit(2 * k + 1, f_from_bits(i_shift_left<16>(i_shift_right<16>(words))));
    }
};

// A macro, as EDGE_PREFETCH is.
#define EDGE_PREFETCH_BLOCK(W, row, b)                              \
    for (std::size_t line = 0; line < W::block_bytes; line += 64) { \
        EDGE_PREFETCH((row) + (b) * W::block_bytes + line);         \
    }
