// BlockSparseAttention with AVX2 and AVX-VNNI: VNNI on 256 bits (Alder Lake and later, Core Ultra, Zen 5).

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
#include "cpu/avx2vnni_dots.inl"
//
#include "cpu/vector_math.inl"
//
#include "block_sparse_attention/avx2_tiles.inl"
//
#include "block_sparse_attention/attend.inl"

}  // namespace

const Kernels kernels_avx2vnni = {store, prepare, attend};

}  // namespace attention
}  // namespace edge
