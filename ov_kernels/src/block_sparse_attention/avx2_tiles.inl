// What attend.inl needs beside the vector operations, on 256 bits.

#include "block_sparse_attention/seen.inl"

constexpr int tile_vectors = 2;

inline F f_keep(F x, std::size_t first, const Seen& seen, float other) {
    const F index = f_add(f_set(static_cast<float>(first)), _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7));
    const F far = _mm256_cmp_ps(index, f_set(seen.sink), _CMP_LT_OQ);
    const F near = _mm256_cmp_ps(index, f_set(seen.near), _CMP_GE_OQ);
    const F past = _mm256_cmp_ps(index, f_set(seen.end), _CMP_LT_OQ);
    return _mm256_blendv_ps(f_set(other), x, _mm256_and_ps(_mm256_or_ps(far, near), past));
}
