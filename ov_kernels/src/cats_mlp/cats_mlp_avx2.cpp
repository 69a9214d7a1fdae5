// CatsMlp with AVX2, FMA and F16C (Haswell, Zen and later).

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "cats_mlp/cats_mlp.hpp"

namespace edge {
namespace cats_mlp {
namespace {

#include "cats_mlp/avx2_vectors.inl"

inline I i_dot16(I sum, I x, I y) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(x, y));
}

// vpmaddubsw saturates where both factors use all their bits, so the unsigned one goes in two halves of 4 bits.
inline I i_dot8(I sum, I u, I s) {
    const I low = _mm256_and_si256(u, _mm256_set1_epi8(15));
    const I high = _mm256_and_si256(_mm256_srli_epi16(u, 4), _mm256_set1_epi8(15));
    const I one = _mm256_set1_epi16(1);
    const I sums_low = _mm256_madd_epi16(_mm256_maddubs_epi16(low, s), one);
    const I sums_high = _mm256_madd_epi16(_mm256_maddubs_epi16(high, s), one);
    return _mm256_add_epi32(sum, _mm256_add_epi32(sums_low, _mm256_slli_epi32(sums_high, 4)));
}
// Each needs the one before.
#include "cats_mlp/interleave.inl"
//
#include "cats_mlp/decode.inl"
//
#include "cats_mlp/prefill.inl"

}  // namespace

const Kernels kernels_avx2 = {"avx2", 8, prepare, decode, finish, prefill_hidden, prefill_output};

}  // namespace cats_mlp
}  // namespace edge
