// BlockSparseAttention in plain C++: one key after another, sums in f64. Slow, and what the other kernels are tested by.

#include <cmath>
#include <cstring>

#include "block_sparse_attention/block_sparse_attention.hpp"

namespace edge {
namespace attention {
namespace {

float read_f32(const std::uint8_t* p) {
    float x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

void write_f32(std::uint8_t* p, float x) { std::memcpy(p, &x, sizeof x); }

std::uint16_t to_bf16(float x) {  // to nearest, ties to even; NaN stays NaN
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (std::isnan(x)) {
        return static_cast<std::uint16_t>(bits >> 16 | 0x40);
    }
    return static_cast<std::uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

float from_bf16(const std::uint8_t* p) {
    std::uint16_t half;
    std::memcpy(&half, p, sizeof half);
    const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// Index of channel c of slot s in K, and in V.
std::size_t key_index(const Layout& x, std::size_t c, std::size_t s) {
    return x.format == Format::i8 ? (c / 2 * x.block_size + s) * 2 + c % 2 : c * x.block_size + s;
}
std::size_t value_index(const Layout& x, std::size_t c, std::size_t s) {
    return x.format == Format::i8 ? (s / 2 * x.value_dim + c) * 2 + s % 2 : s * x.value_dim + c;
}

float scale_of(const float* x, std::size_t count) {
    float most = 0.0f;
    for (std::size_t i = 0; i < count; ++i) {
        if (!std::isfinite(x[i])) {
            return NAN;
        }
        most = std::fmax(most, std::fabs(x[i]));
    }
    return most / 127.0f;
}

template <class Index>
void store_vector(const Layout& layout, std::uint8_t* part, std::uint8_t* scale, const float* x, std::size_t count,
                  const Index& index) {
    const float step = layout.format == Format::i8 ? scale_of(x, count) : 0.0f;
    if (layout.format == Format::i8) {
        write_f32(scale, step);
    }
    for (std::size_t c = 0; c < count; ++c) {
        std::uint8_t* place = part + index(c) * element_bytes(layout);
        if (layout.format == Format::f32) {
            write_f32(place, x[c]);
        } else if (layout.format == Format::bf16) {
            const std::uint16_t half = to_bf16(x[c]);
            std::memcpy(place, &half, sizeof half);
        } else {
            *place = static_cast<std::uint8_t>(step > 0.0f ? static_cast<int>(std::nearbyintf(x[c] / step)) : 0);
        }
    }
}

void store(const Layout& layout, std::uint8_t* block, std::size_t slot, const float* key, const float* value) {
    std::uint8_t* scales = block + scales_at(layout);
    store_vector(layout, block, scales + 4 * slot, key, layout.key_dim,
                 [&](std::size_t c) { return key_index(layout, c, slot); });
    store_vector(layout, block + values_at(layout), scales + 4 * (layout.block_size + slot), value, layout.value_dim,
                 [&](std::size_t c) { return value_index(layout, c, slot); });
}

float element(const Layout& layout, const std::uint8_t* part, std::size_t index, float scale) {
    const std::uint8_t* place = part + index * element_bytes(layout);
    return layout.format == Format::f32    ? read_f32(place)
           : layout.format == Format::bf16 ? from_bf16(place)
                                           : scale * static_cast<float>(static_cast<std::int8_t>(*place));
}

bool sees(const Pattern& pattern, std::size_t head, std::int64_t position, std::int64_t key, std::int64_t block_size) {
    const std::int64_t stride = pattern.strides[head];
    return key <= position && (key < pattern.sink || key >= local_start(pattern, position, block_size) ||
                               (stride > 0 && (key / block_size + pattern.offsets[head]) % stride == 0));
}

struct Scratch {
    float scale;
};

void prepare(const Layout&, const Rows&, float scale, void* scratch) { static_cast<Scratch*>(scratch)->scale = scale; }

// Adds one key and its value to a row's state.
void add(const Layout& layout, const std::uint8_t* block, std::size_t slot, const float* query, float scale,
         float* state) {
    const bool is_i8 = layout.format == Format::i8;
    const std::uint8_t* scales = block + scales_at(layout);
    const float key_scale = is_i8 ? read_f32(scales + 4 * slot) : 0.0f;
    const float value_scale = is_i8 ? read_f32(scales + 4 * (layout.block_size + slot)) : 0.0f;
    double dot = 0.0;
    for (std::size_t c = 0; c < layout.key_dim; ++c) {
        dot += static_cast<double>(query[c]) * element(layout, block, key_index(layout, c, slot), key_scale);
    }
    float &most = state[layout.value_dim], &sum = state[layout.value_dim + 1];
    const float score = static_cast<float>(scale * dot), top = std::fmax(most, score);
    const float factor = std::exp(most - top), weight = std::exp(score - top);
    sum = sum * factor + weight;
    most = top;
    for (std::size_t c = 0; c < layout.value_dim; ++c) {
        const float value = element(layout, block + values_at(layout), value_index(layout, c, slot), value_scale);
        state[c] = state[c] * factor + weight * value;
    }
}

void attend(const Layout& layout, const Pattern& pattern, const Rows& rows, const Entry* entries, std::size_t count,
            float* states, void* scratch) {
    const std::int64_t size = static_cast<std::int64_t>(layout.block_size);
    for (std::size_t r = 0; r < rows.count; ++r) {
        const std::size_t head = r % rows.group, token = r / rows.group;
        const float* query = rows.query + token * rows.token_stride + head * layout.key_dim;
        float* state = states + r * state_stride(layout);
        for (std::size_t e = 0; e < count; ++e) {
            for (std::int64_t slot = 0; slot < size; ++slot) {
                if (!sees(pattern, head, rows.first + static_cast<std::int64_t>(token), entries[e].number * size + slot,
                          size)) {
                    continue;
                }
                if (entries[e].block == nullptr) {
                    state[layout.value_dim + 1] = NAN;
                } else {
                    add(layout, entries[e].block, static_cast<std::size_t>(slot), query,
                        static_cast<Scratch*>(scratch)->scale, state);
                }
            }
        }
    }
}

}  // namespace

const Kernels kernels_ref = {store, prepare, attend};

}  // namespace attention
}  // namespace edge
