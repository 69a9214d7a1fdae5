// CatsMlp with AVX2 and AVX-VNNI: VNNI on 256 bits (Alder Lake and later, Core Ultra, Zen 5).

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "cats_mlp/cats_mlp.hpp"

namespace edge {
namespace cats_mlp {
namespace {

#include "cats_mlp/avx2_vectors.inl"

#ifdef EMULATE_AVX_VNNI  // for tests on machines without it
#    include "cats_mlp/avx2_dots.inl"
#else
inline I i_dot16(I sum, I x, I y) { return _mm256_dpwssd_avx_epi32(sum, x, y); }

inline I i_dot8(I sum, I u, I s) { return _mm256_dpbusd_avx_epi32(sum, u, s); }
#endif

#include "cats_mlp/kernels.inl"

}  // namespace

const Kernels kernels_avx2vnni = {"avx2vnni", 2, prepare, decode, finish, prefill_hidden, prefill_output};

}  // namespace cats_mlp
}  // namespace edge
