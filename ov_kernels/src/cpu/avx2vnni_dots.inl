// Integer dot products on 256 bits with AVX-VNNI.

#ifdef EMULATE_AVX_VNNI  // for tests on machines without it
#    include "cpu/avx2_dots.inl"
#else
inline I i_dot16(I sum, I x, I y) { return _mm256_dpwssd_avx_epi32(sum, x, y); }

// Weights of 8 bits as i_dot8 takes them: unsigned, `byte_shift` too large.
constexpr std::int32_t byte_shift = 128;
inline I i_bytes(I x) { return _mm256_xor_si256(x, _mm256_set1_epi8(static_cast<char>(0x80))); }

inline I i_dot8(I sum, I u, I s) { return _mm256_dpbusd_avx_epi32(sum, u, s); }
inline I i_dot4(I sum, I u, I s) { return i_dot8(sum, u, s); }
inline I i_add4(I part, I u, I s) { return i_dot8(part, u, s); }
inline I i_whole4(I part) { return part; }
#endif
