// Integer dot products on 256 bits without VNNI.

inline I i_dot16(I sum, I x, I y) { return _mm256_add_epi32(sum, _mm256_madd_epi16(x, y)); }

// vpmaddubsw saturates where both factors use all their bits, so the unsigned one goes in two halves of 4 bits.
inline I i_dot8(I sum, I u, I s) {
    const I low = _mm256_and_si256(u, _mm256_set1_epi8(15));
    const I high = _mm256_and_si256(_mm256_srli_epi16(u, 4), _mm256_set1_epi8(15));
    const I one = _mm256_set1_epi16(1);
    const I sums_low = _mm256_madd_epi16(_mm256_maddubs_epi16(low, s), one);
    const I sums_high = _mm256_madd_epi16(_mm256_maddubs_epi16(high, s), one);
    return _mm256_add_epi32(sum, _mm256_add_epi32(sums_low, _mm256_slli_epi32(sums_high, 4)));
}
