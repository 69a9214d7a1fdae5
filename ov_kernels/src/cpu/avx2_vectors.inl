// Vector operations on 256 bits, but for the integer dot products, which differ with and without VNNI. Included in a
// unit's own unnamed namespace.

using F = __m256;
using I = __m256i;
constexpr std::size_t lanes = 8;

inline I first_lanes(std::size_t count) {
    const I index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), index);
}

inline F f_set(float x) { return _mm256_set1_ps(x); }
inline F f_load(const float* p) { return _mm256_loadu_ps(p); }
inline F f_load(const float* p, std::size_t count) { return _mm256_maskload_ps(p, first_lanes(count)); }
inline void f_store(float* p, F x) { _mm256_storeu_ps(p, x); }
inline void f_store(float* p, F x, std::size_t count) { _mm256_maskstore_ps(p, first_lanes(count), x); }
inline F f_add(F x, F y) { return _mm256_add_ps(x, y); }
inline F f_sub(F x, F y) { return _mm256_sub_ps(x, y); }
inline F f_mul(F x, F y) { return _mm256_mul_ps(x, y); }
inline F f_div(F x, F y) { return _mm256_div_ps(x, y); }
inline F f_fma(F x, F y, F z) { return _mm256_fmadd_ps(x, y, z); }
inline F f_min(F x, F y) { return _mm256_min_ps(x, y); }
inline F f_max(F x, F y) { return _mm256_max_ps(x, y); }
inline F f_abs(F x) { return _mm256_andnot_ps(f_set(-0.0f), x); }
inline F f_copysign(F x, F y) { return _mm256_or_ps(f_abs(x), _mm256_and_ps(y, f_set(-0.0f))); }
inline F f_round(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F f_from_i32(I x) { return _mm256_cvtepi32_ps(x); }
inline float f_first(const float* p) { return _mm_cvtss_f32(_mm_load_ss(p)); }
inline float f_first(F x) { return _mm_cvtss_f32(_mm256_castps256_ps128(x)); }
inline void f_store_first(float* p, float x) { _mm_storeu_si32(p, _mm_castps_si128(_mm_set_ss(x))); }

inline float f_sum(F x) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_shuffle_ps(sum, sum, 1)));
}

inline float f_most(F x) {
    __m128 top = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    top = _mm_max_ps(top, _mm_movehl_ps(top, top));
    return _mm_cvtss_f32(_mm_max_ss(top, _mm_shuffle_ps(top, top, 1)));
}

inline std::int32_t i_sum(I x) {
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xB1)));
}

// The sums of 4 vectors.
inline void f_sum4(const F (&x)[4], float* sums) {
    const F a = f_add(_mm256_unpacklo_ps(x[0], x[1]), _mm256_unpackhi_ps(x[0], x[1]));
    const F b = f_add(_mm256_unpacklo_ps(x[2], x[3]), _mm256_unpackhi_ps(x[2], x[3]));
    const __m256d c = _mm256_castps_pd(a), d = _mm256_castps_pd(b);
    const F all = f_add(_mm256_castpd_ps(_mm256_unpacklo_pd(c, d)), _mm256_castpd_ps(_mm256_unpackhi_pd(c, d)));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}

inline F f_power_of_2(F n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}

// `count` (at most 8) elements of `size` bytes; the rest of the register is 0.
inline __m128i first_bytes(const void* p, std::size_t count, std::size_t size) {
    alignas(16) std::uint8_t bytes[16] = {};
    for (std::size_t i = 0; i < count * size; ++i) {
        bytes[i] = static_cast<const std::uint8_t*>(p)[i];
    }
    return _mm_load_si128(reinterpret_cast<const __m128i*>(bytes));
}

inline F f_from_i8(const void* p) {
    return f_from_i32(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
}

inline F f_from_i8(const void* p, std::size_t count) {
    return count == lanes ? f_from_i8(p) : f_from_i32(_mm256_cvtepi8_epi32(first_bytes(p, count, 1)));
}

inline F f_from_f16(const void* p, std::size_t count) {
    return _mm256_cvtph_ps(count == lanes ? _mm_loadu_si128(static_cast<const __m128i*>(p)) : first_bytes(p, count, 2));
}

inline float f_one_f16(const void* p) { return _mm_cvtss_f32(_mm_cvtph_ps(first_bytes(p, 1, 2))); }

inline F f_from_bf16(const void* p) {
    const I wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

inline void f_from_u4(const void* p, F& low, F& high) {
    const I pairs = _mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p)));
    low = f_from_i32(_mm256_and_si256(pairs, _mm256_set1_epi32(15)));
    high = f_from_i32(_mm256_srli_epi32(pairs, 4));
}

inline I i_zero() { return _mm256_setzero_si256(); }
inline I i_add(I x, I y) { return _mm256_add_epi32(x, y); }
inline F f_spread(F x, int first) {  // 2 lanes from `first` on, 4 times each
    const I index = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    return _mm256_permutevar8x32_ps(x, _mm256_add_epi32(index, _mm256_set1_epi32(first)));
}
inline I i_load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void i_store(void* p, I x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
inline I i_set_word(const void* p) { return _mm256_broadcastd_epi32(_mm_loadu_si32(p)); }

inline I i_16_from_i8(const void* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(p))); }

inline I i_set(std::int32_t x) { return _mm256_set1_epi32(x); }
inline I i_two_digits(I high, I low) {  // high * 255 + low
    return _mm256_add_epi32(_mm256_sub_epi32(_mm256_slli_epi32(high, 8), high), low);
}

template <int n>
inline I i_shift_left(I x) {
    return _mm256_slli_epi32(x, n);
}
template <int n>
inline I i_shift_right(I x) {  // with the sign
    return _mm256_srai_epi32(x, n);
}
inline F f_from_bits(I x) { return _mm256_castsi256_ps(x); }
inline I i_low_nibble(I x) { return _mm256_and_si256(x, _mm256_set1_epi32(15)); }

inline I i_low_u4(I x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
inline I i_high_u4(I x) { return i_low_u4(_mm256_srli_epi16(x, 4)); }

inline void i_zip8(I (&x)[4]) {
    const I a = _mm256_unpacklo_epi8(x[0], x[1]), b = _mm256_unpackhi_epi8(x[0], x[1]);
    const I c = _mm256_unpacklo_epi8(x[2], x[3]), d = _mm256_unpackhi_epi8(x[2], x[3]);
    x[0] = _mm256_unpacklo_epi16(a, c);
    x[1] = _mm256_unpackhi_epi16(a, c);
    x[2] = _mm256_unpacklo_epi16(b, d);
    x[3] = _mm256_unpackhi_epi16(b, d);
}

// Of 2 vectors that each have 2 halves, makes those of both first and second halves.
inline void i_quarters(I (&x)[2]) {
    const I first = _mm256_permute2x128_si256(x[0], x[1], 0x20);
    x[1] = _mm256_permute2x128_si256(x[0], x[1], 0x31);
    x[0] = first;
}

inline void i_unzip8(I (&x)[4]) {
    const I a = x[0], b = x[1], c = x[2], d = x[3];
    x[0] = _mm256_permute2x128_si256(a, b, 0x20);
    x[1] = _mm256_permute2x128_si256(c, d, 0x20);
    x[2] = _mm256_permute2x128_si256(a, b, 0x31);
    x[3] = _mm256_permute2x128_si256(c, d, 0x31);
}

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
        const I wide = _mm256_cvtps_epi32(f_mul(f_load(x + c), f_set(inverse)));
        const __m128i low = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(q + c), low);
        sum = _mm256_add_epi32(sum, _mm256_cvtepi16_epi32(low));
    }
    return i_sum(sum);
}

inline std::int32_t i_quantise8(const float* x, std::size_t count, float inverse, std::int8_t* q) {
    I sum = i_zero();
    for (std::size_t c = 0; c < count; c += lanes) {
        const I wide = _mm256_cvtps_epi32(f_mul(f_load(x + c), f_set(inverse)));
        const __m128i low = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
        const __m128i bytes = _mm_packs_epi16(low, low);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(q + c), bytes);
        sum = _mm256_add_epi32(sum, _mm256_cvtepi8_epi32(bytes));
    }
    return i_sum(sum);
}

inline void transpose(const std::uint8_t* from, std::size_t from_stride, std::uint8_t* to, std::size_t to_stride) {
    I a[8], b[8];
    for (int i = 0; i < 8; ++i) {
        a[i] = i_load(from + i * from_stride);
    }
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {  // a[4g + i] half h: word 4h + i of rows 4g..4g+3
        __m256i* low = reinterpret_cast<__m256i*>(to + i * to_stride);
        __m256i* high = reinterpret_cast<__m256i*>(to + (4 + i) * to_stride);
        _mm256_storeu_si256(low, _mm256_permute2x128_si256(a[i], a[4 + i], 0x20));
        _mm256_storeu_si256(high, _mm256_permute2x128_si256(a[i], a[4 + i], 0x31));
    }
}
