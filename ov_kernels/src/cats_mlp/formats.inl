// How a block of 128 weights becomes vectors, for each format; how blocks are prefetched.

constexpr std::size_t half = block / 2;

// load: columns c.. and c + 64.. of a block, `lanes` of each; load16: twice as many, as 16 bits; load8: four times as
// many, as unsigned bytes that are `shift` too large.

struct I8 {
    static constexpr bool is_grouped = false;
    static constexpr bool has_scale = true;
    static constexpr float shift = 128;
    static constexpr std::size_t block_bytes = block;
    static void load(const std::uint8_t* p, std::size_t c, F& low, F& high) {
        low = f_from_i8(p + c);
        high = f_from_i8(p + c + half);
    }
    static void load16(const std::uint8_t* p, std::size_t c, I& low, I& high) {
        low = i_16_from_i8(p + c);
        high = i_16_from_i8(p + c + half);
    }
    static void load8(const std::uint8_t* p, std::size_t c, I& low, I& high) {
        low = load8_half(p, c, 0);
        high = load8_half(p, c, 1);
    }
    static I load8_half(const std::uint8_t* p, std::size_t c, int part) {
        return i_unsigned(i_load(p + c + (part ? half : 0)));
    }
};

struct U4 {
    static constexpr bool is_grouped = true;
    static constexpr bool has_scale = true;
    static constexpr float shift = 0;
    static constexpr std::size_t block_bytes = block / 2;
    static void load(const std::uint8_t* p, std::size_t c, F& low, F& high) { f_from_u4(p + c, low, high); }
    static void load16(const std::uint8_t* p, std::size_t c, I& low, I& high) { i_16_from_u4(p + c, low, high); }
    static void load8(const std::uint8_t* p, std::size_t c, I& low, I& high) {
        low = load8_half(p, c, 0);
        high = load8_half(p, c, 1);
    }
    static I load8_half(const std::uint8_t* p, std::size_t c, int part) {
        return part ? i_high_u4(i_load(p + c)) : i_low_u4(i_load(p + c));
    }
};

struct BF16 {
    static constexpr bool is_grouped = false;
    static constexpr bool has_scale = false;
    static constexpr float shift = 0;
    static constexpr std::size_t block_bytes = block * 2;
    static void load(const std::uint8_t* p, std::size_t c, F& low, F& high) {
        low = f_from_bf16(p + 2 * c);
        high = f_from_bf16(p + 2 * (c + half));
    }
};

// A macro, as EDGE_PREFETCH is.
#define EDGE_PREFETCH_BLOCK(W, row, b)                              \
    for (std::size_t line = 0; line < W::block_bytes; line += 64) { \
        EDGE_PREFETCH((row) + (b) * W::block_bytes + line);         \
    }
