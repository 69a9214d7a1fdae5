// Tokens as dot products take them: f32 padded to whole blocks, or integers with scales. See Tokens in cats_mlp.hpp.

inline float threshold_of(const Thresholds& thresholds, std::size_t neuron) {
    return f_first(thresholds.values + (thresholds.count == 1 ? 0 : neuron));
}

float sum_of(const float* x) {
    F sum = f_set(0.0f);
    for (std::size_t c = 0; c < block; c += lanes) {
        sum = f_add(sum, f_load(x + c));
    }
    return f_sum(sum);
}

// The inverse of a smaller scale than this could be infinite.
constexpr float least_scale = 1.17549435e-38f;

// Writes floats, a multiple of 16 and at most 128, as integers of one digit, or of two: 255 * high + low, each from
// -127 to 127, `stride` bytes apart. Sets their scale; returns their sum.
std::int32_t quantise(const float* x, std::size_t count, int digits, std::int8_t* q, std::size_t stride, float& scale) {
    scale = f_scale_of(x, count, digits == 2 ? 255.0f * 127 + 127 : 127.0f);
    scale = scale < least_scale ? least_scale : scale;
    const float inverse = scale > 0 ? 1.0f / scale : 0.0f;  // NaN: 0
    if (digits == 1) {
        return i_quantise8(x, count, inverse, q);
    }
    float high[block], low[block];
    for (std::size_t c = 0; c < count; c += lanes) {
        const F whole = f_round(f_mul(f_load(x + c), f_set(inverse)));
        const F part = f_round(f_mul(whole, f_set(1.0f / 255)));
        f_store(high + c, part);
        f_store(low + c, f_fma(part, f_set(-255.0f), whole));
    }
    return 255 * i_quantise8(high, count, 1.0f, q) + i_quantise8(low, count, 1.0f, q + stride);
}

// Columns [c, c + count) of a token; those beyond `hidden` are 0.
inline void copy_columns(const float* x, std::size_t hidden, std::size_t c, std::size_t count, float* to) {
    const std::size_t present = c >= hidden ? 0 : hidden - c < count ? hidden - c : count;
    std::memset(to + present, 0, (count - present) * sizeof(float));
    std::memcpy(to, x + c, present * sizeof(float));
}

template <class W>
void prepare_integers(const Weights& w, const float* x, int digits, Tokens& t) {
    constexpr std::size_t size = W::piece * W::pieces;
    const std::size_t spans = (w.columns + span - 1) / span, rows = t.rows, d = static_cast<std::size_t>(digits);
    if (W::is_grouped) {
        std::memset(t.sum, 0, rows * ((w.columns / block + lanes - 1) / lanes * lanes) * sizeof(float));
    }
    for (std::size_t m = 0; m < rows; ++m) {
        t.total[m] = 0;
        for (std::size_t g = 0; g < spans * (span / size); ++g) {
            const std::size_t s = g * size / span, lane = (s * rows + m) * lanes + g * W::group_lanes % lanes;
            std::int8_t* to = static_cast<std::int8_t*>(t.values) + (s * rows + m) * d * span;
            float values[size], scale;
            std::int8_t q[2][size];
            for (std::size_t i = 0; i < W::pieces; ++i) {
                copy_columns(x + m * w.hidden, w.hidden, s * span + W::column_of(g, i), W::piece,
                             values + i * W::piece);
            }
            const std::int32_t total = quantise(values, size, digits, q[0], size, scale);
            for (std::size_t i = 0; i < W::pieces * d; ++i) {
                std::memcpy(to + i % d * span + W::place_of(g, i / d), q[i % d] + i / d * W::piece, W::piece);
            }
            for (std::size_t l = lane; l < lane + W::group_lanes; ++l) {
                t.scale[l] = scale;
                t.offset[l] = -W::shift * total;
            }
            const float sum = scale * static_cast<float>(total);
            t.total[m] += sum;
            if (W::is_grouped) {
                t.sum[(g / lanes * rows + m) * lanes + g % lanes] = sum;
            }
        }
    }
}

// 128 values of one token as entry of the blocks.
template <class W>
void put_block(const float* values, int digits, std::size_t entry, Tokens& t) {
    if (digits == 0) {
        std::memcpy(static_cast<float*>(t.values) + entry * block, values, block * sizeof(float));
        t.sum[entry] = sum_of(values);
    } else {
        std::int8_t* q = static_cast<std::int8_t*>(t.values) + entry * static_cast<std::size_t>(digits) * block;
        const std::int32_t total = quantise(values, block, digits, q, block, t.scale[entry]);
        t.sum[entry] = t.scale[entry] * static_cast<float>(total);
        t.offset[entry] = -W::shift * total;
    }
}

void prepare_floats(const Weights& w, const float* x, Tokens& t) {
    const std::size_t blocks = w.columns / block;
    for (std::size_t m = 0; m < t.rows; ++m) {
        t.total[m] = 0;
        for (std::size_t b = 0; b < blocks; ++b) {
            float* to = static_cast<float*>(t.values) + (m * blocks + b) * block;
            copy_columns(x + m * w.hidden, w.hidden, b * block, block, to);
            t.sum[m * blocks + b] = sum_of(to);
            t.total[m] += t.sum[m * blocks + b];
        }
    }
}

void prepare(const Weights& w, const float* x, int digits, Tokens& t) {
    if (digits == 0) {
        prepare_floats(w, x, t);
    } else {
        (w.format == Format::u4 ? prepare_integers<U4> : prepare_integers<I8>)(w, x, digits, t);
    }
}

void prepare_blocks(const Weights& w, const float* x, int digits, Tokens& t) {
    for (std::size_t b = 0; b < w.columns / block; ++b) {
        for (std::size_t m = 0; m < t.rows; ++m) {
            const std::size_t entry = b * t.rows + m;
            float values[block];
            copy_columns(x + m * w.hidden, w.hidden, b * block, block, values);
            if (w.format == Format::bf16) {
                put_block<BF16>(values, digits, entry, t);
            } else {
                (w.format == Format::u4 ? put_block<U4> : put_block<I8>)(values, digits, entry, t);
            }
        }
    }
}
