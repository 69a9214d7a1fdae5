// Bytes of 4 rows, `count` of each (a multiple of 16), to [count][4], with SSE2, which every unit has. Of packed 4-bit
// rows the half is taken that `shift` (0 or 4) selects; others become what i_dot8 takes.
inline void interleave(const std::uint8_t* const* rows, std::size_t count, bool is_packed, int shift,
                       std::uint8_t* to) {
    const __m128i low = _mm_set1_epi8(15), sign = _mm_set1_epi8(static_cast<char>(byte_shift));
    for (std::size_t c = 0; c < count; c += 16, to += 64) {
        __m128i x[4];
        for (int i = 0; i < 4; ++i) {
            const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i] + c));
            x[i] = is_packed ? _mm_and_si128(_mm_srl_epi16(bytes, _mm_cvtsi32_si128(shift)), low)
                             : _mm_xor_si128(bytes, sign);
        }
        const __m128i a = _mm_unpacklo_epi8(x[0], x[1]), b = _mm_unpackhi_epi8(x[0], x[1]);
        const __m128i c2 = _mm_unpacklo_epi8(x[2], x[3]), d = _mm_unpackhi_epi8(x[2], x[3]);
        __m128i* out = reinterpret_cast<__m128i*>(to);
        _mm_storeu_si128(out, _mm_unpacklo_epi16(a, c2));
        _mm_storeu_si128(out + 1, _mm_unpackhi_epi16(a, c2));
        _mm_storeu_si128(out + 2, _mm_unpacklo_epi16(b, d));
        _mm_storeu_si128(out + 3, _mm_unpackhi_epi16(b, d));
    }
}
