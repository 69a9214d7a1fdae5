// CatsMlp with AVX2, FMA and F16C (Haswell, Zen and later).

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "cats_mlp/cats_mlp.hpp"

namespace edge {
namespace cats_mlp {
namespace {

// Each needs the one before.
#include "cpu/avx2_vectors.inl"
//
#include "cpu/avx2_dots.inl"
//
#include "cats_mlp/avx2_tiles.inl"
//
#include "cats_mlp/kernels.inl"

}  // namespace

const Kernels kernels_avx2 = {"avx2", prepare, decode, finish, prepare_blocks, compute_hidden, compute_output};

}  // namespace cats_mlp
}  // namespace edge
