// What fits the registers of AVX2, see kernels.inl.

constexpr std::size_t down_tokens = 2;
constexpr int tile_vectors = 2;
constexpr int tile_sums = 8;

constexpr std::size_t sums_stride_of(std::size_t columns) { return columns + 16; }
