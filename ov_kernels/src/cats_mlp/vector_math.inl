// Loops over registers, e^x and the activations.

// body(0), ..., body(n - 1) with constants: registers that a loop would index stay registers, while gcc stores an array's
// elements in every step of the loop around it.
template <int n>
struct Index {
    constexpr operator int() const { return n; }
};

template <int n, class Body>
inline void unroll(const Body& body) {
    if constexpr (n > 0) {
        unroll<n - 1>(body);
        body(Index<n - 1>{});
    }
}

inline F exp_of(F x) {
    // 2^n * e^r with |r| <= ln 2 / 2; relative error 2e-7. From 88.4 on n is 128 and the result infinite, so that x / (1 +
    // e^-x) is 0 for a large negative x. The order of min and max lets NaN through.
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

inline F silu(F x) { return f_div(x, f_add(f_set(1.0f), exp_of(f_sub(f_set(0.0f), x)))); }

inline F gelu_tanh(F x) {  // 0.5 x (1 + tanh u) = x / (1 + e^-2u)
    const F cubic = f_fma(f_mul(f_set(0.044715f), f_mul(x, x)), x, x);
    return f_div(x, f_add(f_set(1.0f), exp_of(f_mul(f_set(-1.59576912f), cubic))));
}

inline F gelu_erf(F x) {  // erf by Abramowitz and Stegun 7.1.26: absolute error below 1.5e-7
    const F z = f_mul(f_abs(x), f_set(0.70710678f));
    const F t = f_div(f_set(1.0f), f_fma(z, f_set(0.3275911f), f_set(1.0f)));
    F p = f_fma(t, f_set(1.061405429f), f_set(-1.453152027f));
    p = f_fma(t, p, f_set(1.421413741f));
    p = f_fma(t, p, f_set(-0.284496736f));
    p = f_mul(t, f_fma(t, p, f_set(0.254829592f)));
    const F tail = f_mul(p, exp_of(f_sub(f_set(0.0f), f_mul(z, z))));  // 1 - erf |z|
    return f_mul(f_mul(f_set(0.5f), x), f_add(f_set(1.0f), f_copysign(f_sub(f_set(1.0f), tail), x)));
}

void activate(Activation activation, float* values, std::size_t count) {  // count is a multiple of 16
    for (std::size_t i = 0; i < count; i += lanes) {
        const F x = f_load(values + i);
        f_store(values + i, activation == Activation::silu        ? silu(x)
                            : activation == Activation::gelu_tanh ? gelu_tanh(x)
                                                                  : gelu_erf(x));
    }
}
