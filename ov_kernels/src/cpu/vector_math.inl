// Loops over registers, and e^x. Included after a unit's vector operations.

// Fetches the line at p into the first cache. gcc would move all prefetches of an unrolled loop to its top, where they
// queue; volatile ones stay in order with EDGE_KEEP, which says that a vector is needed from here on.
//
// EDGE_FLATTEN inlines all that a function calls, whose registers an unrolled loop's body shares.
#if defined(__GNUC__)
#    define EDGE_FLATTEN __attribute__((flatten))
#    define EDGE_PREFETCH(p) asm volatile("prefetcht0 %0" : : "m"(*reinterpret_cast<const char*>(p)))
#    define EDGE_KEEP(x) asm volatile("" : "+v"(x))
#else
#    define EDGE_FLATTEN
#    define EDGE_PREFETCH(p) _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0)
#    define EDGE_KEEP(x)
#endif

// body(0), ..., body(n - 1) with constants: registers that a loop would index stay registers, while gcc stores an
// array's elements in every step of the loop around it.
template <int n>
struct Index {
    constexpr operator int() const { return n; }
};

template <class Body, int... n>
inline void call_with(const Body& body, std::integer_sequence<int, n...>) {
    (body(Index<n>{}), ...);
}

template <int n, class Body>
inline void unroll(const Body& body) {
    call_with(body, std::make_integer_sequence<int, n>{});
}

inline F exp_of(F x) {
    // 2^n * e^r with |r| <= ln 2 / 2; relative error 2e-7. From 88.4 on n is 128 and the result infinite, so that x /
    // (1 + e^-x) is 0 for a large negative x. The order of min and max lets NaN through.
    x = f_min(f_set(89.0f), f_max(f_set(-87.3f), x));
    const F n = f_round(f_mul(x, f_set(1.44269504f)));
    F r = f_fma(n, f_set(-0.693359375f), x);
    r = f_fma(n, f_set(2.12194440e-4f), r);
    F p = f_set(1.9875691500e-4f);
    p = f_fma(p, r, f_set(1.3981999507e-3f));
    p = f_fma(p, r, f_set(8.3334519073e-3f));
    p = f_fma(p, r, f_set(4.1665795894e-2f));
    p = f_fma(p, r, f_set(1.6666665459e-1f));
    p = f_fma(p, r, f_set(5.0000001201e-1f));
    p = f_fma(p, f_mul(r, r), f_add(r, f_set(1.0f)));
    return f_mul(p, f_power_of_2(n));
}
