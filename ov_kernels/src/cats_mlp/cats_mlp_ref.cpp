// The reference: one weight after another, as the formula says. For CPUs without AVX2, and for tests.

#include <cmath>
#include <cstring>

#include "cats_mlp/cats_mlp.hpp"

namespace edge {
namespace cats_mlp {
namespace {

template <class T>
T at(const T* values, std::size_t index) {  // no alignment is promised
    T value;
    std::memcpy(&value, reinterpret_cast<const char*>(values) + index * sizeof(T), sizeof(T));
    return value;
}

float from_bits(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

float from_f16(std::uint16_t half) {
    const std::uint32_t sign = (half & 0x8000u) << 16;
    const std::uint32_t exponent = (half >> 10) & 31u;
    const std::uint32_t fraction = half & 0x3FFu;
    if (exponent == 0) {
        const float value = std::ldexp(static_cast<float>(fraction), -24);
        return sign ? -value : value;
    }
    return from_bits(sign | ((exponent == 31 ? 255u : exponent + 112u) << 23) | (fraction << 13));
}

// Weight q of a row, stored in words of 4 bytes that lie `stride` bytes apart.
float stored(Format format, const std::uint8_t* row, std::size_t stride, std::size_t column) {
    const auto byte_at = [&](std::size_t i) { return row[i / 4 * stride + i % 4]; };
    if (format == Format::i8) {
        return static_cast<float>(static_cast<std::int8_t>(byte_at(column)));
    }
    if (format == Format::bf16) {
        const std::uint32_t bits = byte_at(2 * column) | static_cast<std::uint32_t>(byte_at(2 * column + 1)) << 8;
        return from_bits(bits << 16);
    }
    const std::uint8_t pair = byte_at(column / block * 64 + column % 64);
    return static_cast<float>(column % block < 64 ? pair & 15 : pair >> 4);
}

float scaled(float q, const std::uint16_t* scale, const std::int8_t* zero, std::size_t entry) {
    return from_f16(at(scale, entry)) * (q - static_cast<float>(zero[entry]));
}

float row_weight(const Weights& w, std::size_t row, std::size_t column) {
    const Matrix& matrix = w.up;
    const std::size_t entry = row * matrix.groups + (w.format == Format::u4 ? column / block : 0);
    const float q = stored(w.format, matrix.rows + row * matrix.stride, 4, column);
    return w.format == Format::bf16 ? q : scaled(q, matrix.scale, matrix.zero, entry);
}

float tile_weight(const Weights& w, const Tiles& tiles, std::size_t row, std::size_t column) {
    const std::size_t row_bytes = tiles.blocks * (w.row_bytes / (w.columns / block)), lane = row % tile_rows;
    const std::uint8_t* first = tiles.bytes + row / tile_rows * tile_rows * row_bytes + 4 * lane;
    const std::size_t group = row / tile_rows * tiles.groups + (w.format == Format::u4 ? column / block : 0);
    const float q = stored(w.format, first, 4 * tile_rows, column);
    return w.format == Format::bf16 ? q : scaled(q, tiles.scale, tiles.zero, group * tile_rows + lane);
}

float gate_weight(const Weights& w, std::size_t neuron, std::size_t column) {
    return tile_weight(w, w.gate_tiles, neuron, column);
}

float up_weight(const Weights& w, std::size_t neuron, std::size_t column) {
    return w.is_tiled ? tile_weight(w, w.up_tiles, neuron, column) : row_weight(w, neuron, column);
}

float down_weight(const Weights& w, std::size_t neuron, std::size_t column) {
    if (w.is_tiled) {
        return tile_weight(w, w.down_tiles, column, neuron);
    }
    const float q = stored(w.format, w.down + neuron * w.up.stride, 4, column);
    const std::size_t entry = (w.format == Format::u4 ? neuron / block : 0) * w.columns + column;
    return w.format == Format::bf16 ? q : scaled(q, w.down_scale, w.down_zero, entry);
}

using Weight = float (*)(const Weights&, std::size_t, std::size_t);

double dot(const Weights& w, Weight weight, std::size_t row, const float* x) {
    double sum = 0;
    for (std::size_t i = 0; i < w.hidden; ++i) {
        sum += static_cast<double>(weight(w, row, i)) * x[i];
    }
    return sum;
}

double activate(Activation activation, double x) {
    if (activation == Activation::silu) {
        return x / (1 + std::exp(-x));
    }
    const double inner = activation == Activation::gelu_erf
                             ? std::erf(x * 0.70710678118654752)
                             : std::tanh(0.79788456080286536 * (x + 0.044715 * x * x * x));
    return 0.5 * x * (1 + inner);
}

}  // namespace

void reference(const Weights& w, const Thresholds& thresholds, const float* x, std::size_t rows, float* y,
               float* hidden) {
    for (std::size_t row = 0; row < rows; ++row, x += w.hidden, y += w.hidden) {
        for (std::size_t j = 0; j < w.ffn; ++j) {
            const float g = static_cast<float>(activate(w.activation, dot(w, gate_weight, j, x)));
            const bool is_dead = std::fabs(g) <= at(thresholds.values, thresholds.count == 1 ? 0 : j);
            hidden[j] = is_dead ? 0.0f : static_cast<float>(g * dot(w, up_weight, j, x));
        }
        for (std::size_t i = 0; i < w.hidden; ++i) {
            double sum = 0;
            for (std::size_t j = 0; j < w.ffn; ++j) {
                if (hidden[j] != 0.0f) {
                    sum += static_cast<double>(down_weight(w, j, i)) * hidden[j];
                }
            }
            y[i] = static_cast<float>(sum);
        }
    }
}

}  // namespace cats_mlp
}  // namespace edge
