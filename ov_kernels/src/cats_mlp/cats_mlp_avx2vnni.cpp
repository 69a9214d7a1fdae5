// CatsMlp with AVX2 and AVX-VNNI: VNNI on 256 bits (Alder Lake and later, Core Ultra, Zen 5).

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
#include "cpu/avx2vnni_dots.inl"
//
#include "cats_mlp/avx2_tiles.inl"
//
#include "cats_mlp/kernels.inl"

}  // namespace

const Kernels kernels_avx2vnni = {"avx2vnni", prepare, decode, finish, prepare_blocks, compute_hidden, compute_output};

}  // namespace cats_mlp
}  // namespace edge
