// CatsMlp with AVX-512 F, BW, VL, DQ and VNNI (Ice Lake, Zen 4 and later).

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "cats_mlp/cats_mlp.hpp"

namespace edge {
namespace cats_mlp {
namespace {

#include "cpu/avx512_vectors.inl"

constexpr std::size_t down_tokens = 5;
constexpr int tile_vectors = 4;
constexpr int tile_sums = 12;

constexpr std::size_t sums_stride_of(std::size_t columns) { return columns + 16; }

#include "cats_mlp/kernels.inl"

}  // namespace

const Kernels kernels_avx512 = {"avx512", prepare, decode, finish, prepare_blocks, compute_hidden, compute_output};

}  // namespace cats_mlp
}  // namespace edge
