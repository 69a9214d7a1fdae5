// Tokens as dot products take them: padded to whole blocks, as f32 or as integers with a scale for each block.

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

// Values, a multiple of 16, as integers of `bits`; sets their scale and the sum of what they then stand for. The inverse of
// a smaller scale than this could be infinite.
constexpr float least_scale = 1.17549435e-38f;

void quantise(const float* x, std::size_t count, int bits, void* q, float& scale, float& sum) {
    scale = f_scale_of(x, count, bits == 16 ? 32767.0f : 127.0f);
    scale = scale < least_scale ? least_scale : scale;
    const float inverse = scale > 0 ? 1.0f / scale : 0.0f;  // NaN: 0
    const std::int32_t total = bits == 16 ? i_quantise16(x, count, inverse, static_cast<std::int16_t*>(q))
                                          : i_quantise8(x, count, inverse, static_cast<std::int8_t*>(q));
    sum = scale * static_cast<float>(total);
}

void prepare(const Weights& w, const float* x, int bits, Tokens& t) {
    const std::size_t blocks = w.columns / block, block_bytes = block * static_cast<std::size_t>(bits) / 8;
    const bool is_prefill = t.rows > max_decode_rows;
    for (std::size_t m = 0; m < t.rows; ++m) {
        t.total[m] = 0;
        for (std::size_t b = 0; b < blocks; ++b) {
            const std::size_t count = w.hidden - b * block < block ? w.hidden - b * block : block;
            float padded[block] = {};
            for (std::size_t c = 0; c < count; c += lanes) {
                const std::size_t rest = count - c < lanes ? count - c : lanes;
                f_store(padded + c, f_load(x + m * w.hidden + b * block + c, rest));
            }
            const std::size_t entry = is_prefill ? b * t.rows + m : m * blocks + b;
            void* to = static_cast<std::uint8_t*>(t.values) + entry * block_bytes;
            if (bits == 32) {
                for (std::size_t c = 0; c < block; c += lanes) {
                    f_store(static_cast<float*>(to) + c, f_load(padded + c));
                }
                t.sum[entry] = sum_of(padded);
            } else {
                quantise(padded, block, bits, to, t.scale[entry], t.sum[entry]);
            }
            t.total[m] += t.sum[entry];
        }
    }
}
