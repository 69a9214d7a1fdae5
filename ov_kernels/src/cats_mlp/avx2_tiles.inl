// What fits the registers of AVX2, see kernels.inl.

constexpr std::size_t down_tokens = 2;
constexpr int tile_vectors = 2;

constexpr int tile_rows(int tokens) { return tokens == 1 ? 4 : tokens <= 3 ? 2 : 1; }

constexpr std::size_t sums_stride_of(std::size_t columns) { return columns + 16; }
