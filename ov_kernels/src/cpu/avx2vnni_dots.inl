// Integer dot products on 256 bits with AVX-VNNI.

#ifdef EMULATE_AVX_VNNI  // for tests on machines without it
#    include "cpu/avx2_dots.inl"
#else
inline I i_dot16(I sum, I x, I y) { return _mm256_dpwssd_avx_epi32(sum, x, y); }

inline I i_dot8(I sum, I u, I s) { return _mm256_dpbusd_avx_epi32(sum, u, s); }
#endif
