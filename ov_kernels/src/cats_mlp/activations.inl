// The activations.

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
