// BlockSparseAttention with AVX-512 F, BW, VL, DQ and VNNI (Ice Lake, Zen 4 and later).

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <utility>

#include "block_sparse_attention/block_sparse_attention.hpp"

namespace edge {
namespace attention {
namespace {

// Each needs those before.
#include "cpu/avx512_vectors.inl"
//
#include "cpu/vector_math.inl"
//
#include "block_sparse_attention/seen.inl"

constexpr int tile_vectors = 4;

inline F f_keep(F x, std::size_t first, const Seen& seen, float other) {
    const F index = f_add(f_set(static_cast<float>(first)),
                          _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    const __mmask16 far = _mm512_cmp_ps_mask(index, f_set(seen.sink), _CMP_LT_OQ);
    const __mmask16 near = _mm512_cmp_ps_mask(index, f_set(seen.near), _CMP_GE_OQ);
    const __mmask16 past = _mm512_cmp_ps_mask(index, f_set(seen.end), _CMP_LT_OQ);
    return _mm512_mask_blend_ps(static_cast<__mmask16>((far | near) & past), f_set(other), x);
}

#include "block_sparse_attention/attend.inl"

}  // namespace

const Kernels kernels_avx512 = {store, prepare, attend};

}  // namespace attention
}  // namespace edge
