// BlockSparseAttention with AVX2, FMA and F16C (Haswell, Zen and later).

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <utility>

#include "block_sparse_attention/block_sparse_attention.hpp"

namespace edge {
namespace attention {
namespace {

// Each needs those before.
#include "cpu/avx2_vectors.inl"
//
#include "cpu/avx2_dots.inl"
//
#include "cpu/vector_math.inl"
//
#include "block_sparse_attention/avx2_tiles.inl"
//
#include "block_sparse_attention/attend.inl"

}  // namespace

const Kernels kernels_avx2 = {store, prepare, attend};

}  // namespace attention
}  // namespace edge
