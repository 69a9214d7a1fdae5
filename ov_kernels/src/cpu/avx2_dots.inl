// Integer dot products on 256 bits without VNNI.

inline I i_dot16(I sum, I x, I y) { return _mm256_add_epi32(sum, _mm256_madd_epi16(x, y)); }

// Weights of 8 bits as i_dot8 takes them: as they are.
constexpr std::int32_t byte_shift = 0;
inline I i_bytes(I x) { return x; }

// vpmaddubsw wants one factor without sign: |x| * (y with the sign of x). Two products, of 128 * 127 at most, fit 16
// bits.
inline I i_dot8(I sum, I x, I y) {
    const I pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(y, x));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// The same where x has no sign and 4 bits.
inline I i_dot4(I sum, I x, I y) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(x, y), _mm256_set1_epi16(1)));
}

// The same without widening: up to 8 of them fit 16 bits, 8 * 2 * 15 * 127 < 2^15. i_whole4 widens.
inline I i_add4(I part, I x, I y) { return _mm256_add_epi16(part, _mm256_maddubs_epi16(x, y)); }
inline I i_whole4(I part) { return i_dot16(_mm256_setzero_si256(), part, _mm256_set1_epi16(1)); }
