// Vector operations on 512 bits: AVX-512 F, BW, VL, DQ and VNNI. Included in a unit's own unnamed namespace.

using F = __m512;
using I = __m512i;
constexpr std::size_t lanes = 16;

inline __mmask16 first_lanes(std::size_t count) { return static_cast<__mmask16>((1u << count) - 1); }

inline F f_set(float x) { return _mm512_set1_ps(x); }
inline F f_load(const float* p) { return _mm512_loadu_ps(p); }
inline F f_load(const float* p, std::size_t count) { return _mm512_maskz_loadu_ps(first_lanes(count), p); }
inline void f_store(float* p, F x) { _mm512_storeu_ps(p, x); }
inline void f_store(float* p, F x, std::size_t count) { _mm512_mask_storeu_ps(p, first_lanes(count), x); }
inline F f_add(F x, F y) { return _mm512_add_ps(x, y); }
inline F f_sub(F x, F y) { return _mm512_sub_ps(x, y); }
inline F f_mul(F x, F y) { return _mm512_mul_ps(x, y); }
inline F f_div(F x, F y) { return _mm512_div_ps(x, y); }
inline F f_fma(F x, F y, F z) { return _mm512_fmadd_ps(x, y, z); }
inline F f_min(F x, F y) { return _mm512_min_ps(x, y); }
inline F f_max(F x, F y) { return _mm512_max_ps(x, y); }
inline F f_abs(F x) { return _mm512_abs_ps(x); }
inline F f_copysign(F x, F y) { return _mm512_or_ps(f_abs(x), _mm512_and_ps(y, f_set(-0.0f))); }
inline F f_round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F f_from_i32(I x) { return _mm512_cvtepi32_ps(x); }
inline float f_sum(F x) { return _mm512_reduce_add_ps(x); }
inline float f_most(F x) { return _mm512_reduce_max_ps(x); }
inline float f_first(const float* p) { return _mm_cvtss_f32(_mm_load_ss(p)); }
inline float f_first(F x) { return _mm_cvtss_f32(_mm512_castps512_ps128(x)); }
inline void f_store_first(float* p, float x) { _mm_storeu_si32(p, _mm_castps_si128(_mm_set_ss(x))); }

// The sums of 4 vectors.
inline void f_sum4(const F (&x)[4], float* sums) {
    const F a = f_add(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
    const F b = f_add(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
    const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
    const F all = f_add(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)), _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

inline F f_power_of_2(F n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}

inline F f_from_i8(const void* p) {
    return f_from_i32(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
}

inline F f_from_i8(const void* p, std::size_t count) {
    return f_from_i32(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first_lanes(count), p)));
}

inline F f_from_f16(const void* p, std::size_t count) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(count), p));
}

inline float f_one_f16(const void* p) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_maskz_loadu_epi16(1, p))); }

inline F f_from_bf16(const void* p) {
    const I wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

inline void f_from_u4(const void* p, F& low, F& high) {
    const I pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
    low = f_from_i32(_mm512_and_si512(pairs, _mm512_set1_epi32(15)));
    high = f_from_i32(_mm512_srli_epi32(pairs, 4));
}

inline I i_zero() { return _mm512_setzero_si512(); }
inline I i_add(I x, I y) { return _mm512_add_epi32(x, y); }
inline F f_spread(F x, int first) {  // 4 lanes from `first` on, 4 times each
    const I index = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_permutexvar_ps(_mm512_add_epi32(index, _mm512_set1_epi32(first)), x);
}
inline I i_load(const void* p) { return _mm512_loadu_si512(p); }
inline void i_store(void* p, I x) { _mm512_storeu_si512(p, x); }
inline I i_dot16(I sum, I x, I y) { return _mm512_dpwssd_epi32(sum, x, y); }
inline I i_dot8(I sum, I u, I s) { return _mm512_dpbusd_epi32(sum, u, s); }
inline I i_dot4(I sum, I u, I s) { return i_dot8(sum, u, s); }
inline I i_add4(I part, I u, I s) { return i_dot8(part, u, s); }
inline I i_whole4(I part) { return part; }
inline I i_set_word(const void* p) { return _mm512_broadcastd_epi32(_mm_loadu_si32(p)); }

inline I i_16_from_i8(const void* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}

// Weights of 8 bits as i_dot8 takes them: unsigned, `byte_shift` too large.
constexpr std::int32_t byte_shift = 128;
inline I i_bytes(I x) { return _mm512_xor_si512(x, _mm512_set1_epi8(static_cast<char>(0x80))); }

inline I i_set(std::int32_t x) { return _mm512_set1_epi32(x); }
inline I i_two_digits(I high, I low) {  // high * 255 + low
    return _mm512_add_epi32(_mm512_sub_epi32(_mm512_slli_epi32(high, 8), high), low);
}

template <int n>
inline I i_shift_left(I x) {
    return _mm512_slli_epi32(x, n);
}
template <int n>
inline I i_shift_right(I x) {  // with the sign
    return _mm512_srai_epi32(x, n);
}
inline F f_from_bits(I x) { return _mm512_castsi512_ps(x); }
inline I i_low_nibble(I x) { return _mm512_and_si512(x, _mm512_set1_epi32(15)); }

inline I i_low_u4(I x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
inline I i_high_u4(I x) { return i_low_u4(_mm512_srli_epi16(x, 4)); }

inline void i_zip8(I (&x)[4]) {
    const I a = _mm512_unpacklo_epi8(x[0], x[1]), b = _mm512_unpackhi_epi8(x[0], x[1]);
    const I c = _mm512_unpacklo_epi8(x[2], x[3]), d = _mm512_unpackhi_epi8(x[2], x[3]);
    x[0] = _mm512_unpacklo_epi16(a, c);
    x[1] = _mm512_unpackhi_epi16(a, c);
    x[2] = _mm512_unpacklo_epi16(b, d);
    x[3] = _mm512_unpackhi_epi16(b, d);
}

// Of 4 vectors that each have 4 quarters, makes those of all first, second, third and fourth quarters.
inline void i_quarters(I (&x)[4]) {
    const I a = _mm512_shuffle_i32x4(x[0], x[1], 0x44), b = _mm512_shuffle_i32x4(x[2], x[3], 0x44);
    const I c = _mm512_shuffle_i32x4(x[0], x[1], 0xEE), d = _mm512_shuffle_i32x4(x[2], x[3], 0xEE);
    x[0] = _mm512_shuffle_i32x4(a, b, 0x88);
    x[1] = _mm512_shuffle_i32x4(a, b, 0xDD);
    x[2] = _mm512_shuffle_i32x4(c, d, 0x88);
    x[3] = _mm512_shuffle_i32x4(c, d, 0xDD);
}

inline void i_unzip8(I (&x)[4]) { i_quarters(x); }

// The scale with which floats, a multiple of 16, become integers of at most `limit`; NaN where one is NaN or infinite.
inline float f_scale_of(const float* x, std::size_t count, float limit) {
    F most = f_set(0.0f), poison = f_set(0.0f);
    for (std::size_t c = 0; c < count; c += lanes) {
        most = f_max(most, f_abs(f_load(x + c)));
        poison = f_fma(f_load(x + c), f_set(0.0f), poison);
    }
    return f_most(most) / limit + f_sum(poison);
}

// Floats, a multiple of 16, as 16-bit integers; returns their sum.
inline std::int32_t i_quantise16(const float* x, std::size_t count, float inverse, std::int16_t* q) {
    I sum = i_zero();
    for (std::size_t c = 0; c < count; c += lanes) {
        const __m256i low = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(f_mul(f_load(x + c), f_set(inverse))));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + c), low);
        sum = _mm512_add_epi32(sum, _mm512_cvtepi16_epi32(low));
    }
    return _mm512_reduce_add_epi32(sum);
}

inline std::int32_t i_quantise8(const float* x, std::size_t count, float inverse, std::int8_t* q) {
    I sum = i_zero();
    for (std::size_t c = 0; c < count; c += lanes) {
        const __m128i low = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(f_mul(f_load(x + c), f_set(inverse))));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(q + c), low);
        sum = _mm512_add_epi32(sum, _mm512_cvtepi8_epi32(low));
    }
    return _mm512_reduce_add_epi32(sum);
}

inline void transpose(const std::uint8_t* from, std::size_t from_stride, std::uint8_t* to, std::size_t to_stride) {
    I a[16], b[16];
    for (int i = 0; i < 16; ++i) {
        a[i] = i_load(from + i * from_stride);
    }
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {  // a[4g + i] lane l: word 4l + i of rows 4g..4g+3
        b[i] = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88);
        b[4 + i] = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xDD);
        b[8 + i] = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
        b[12 + i] = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xDD);
    }
    for (int i = 0; i < 4; ++i) {
        _mm512_storeu_si512(to + i * to_stride, _mm512_shuffle_i32x4(b[i], b[8 + i], 0x88));
        _mm512_storeu_si512(to + (8 + i) * to_stride, _mm512_shuffle_i32x4(b[i], b[8 + i], 0xDD));
        _mm512_storeu_si512(to + (4 + i) * to_stride, _mm512_shuffle_i32x4(b[4 + i], b[12 + i], 0x88));
        _mm512_storeu_si512(to + (12 + i) * to_stride, _mm512_shuffle_i32x4(b[4 + i], b[12 + i], 0xDD));
    }
}
