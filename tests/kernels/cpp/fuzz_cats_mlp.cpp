// Random shapes, blobs and tokens through every instruction set of the machine, in buffers of exactly the promised
// sizes and at odd addresses, against the reference. Built with address and undefined-behaviour sanitizers by
// tests/kernels/test_cats_mlp_sanitizers.py.
//
//   fuzz_cats_mlp SEED ROUNDS
//
// With EMULATE_AVX_VNNI the unit for AVX-VNNI runs its two instructions in terms of AVX2, on machines without them.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "cats_mlp/cats_mlp.hpp"
#include "cpu/cpu_features.hpp"

using namespace edge::cats_mlp;

namespace {

std::mt19937 randomness;

std::size_t draw(std::size_t low, std::size_t high) {
    return std::uniform_int_distribution<std::size_t>(low, high)(randomness);
}

// Memory of exactly `size` bytes that begins at an odd address, so that no kernel can count on alignment or read past
// it.
class Bytes {
public:
    explicit Bytes(std::size_t size) : m_memory(new std::uint8_t[size + 1]), size(size) {
        for (std::size_t i = 0; i < size; ++i) {
            data()[i] = static_cast<std::uint8_t>(randomness());
        }
    }
    std::uint8_t* data() { return m_memory.get() + 1; }

private:
    std::unique_ptr<std::uint8_t[]> m_memory;

public:
    const std::size_t size;
};

std::size_t up(std::size_t value, std::size_t step) { return (value + step - 1) / step * step; }

struct Shape {
    Format format;
    std::size_t hidden, ffn;
    bool is_tiled;
};

Shape draw_shape() {
    const Format format = static_cast<Format>(draw(0, 2));
    if (format == Format::u4) {
        return {format, 128 * draw(1, 4), 128 * draw(1, 4), draw(0, 1) == 1};
    }
    return {format, draw(1, 700), draw(1, 700), draw(0, 1) == 1};
}

std::size_t groups_of(Format format, std::size_t columns) {
    return format == Format::i8 ? 1 : format == Format::u4 ? columns / 128 : 0;
}

std::size_t blob_size(const Shape& s) {
    const auto row = [&s](std::size_t columns) {
        return s.format == Format::i8 ? up(columns, 128) : s.format == Format::u4 ? columns / 2 : up(columns, 128) * 2;
    };
    const auto tiles = [&](std::size_t rows, std::size_t columns) {
        const std::size_t count = up(rows, 16), scales = count * groups_of(s.format, columns);
        return up(count * row(columns), 64) + up(2 * scales, 64) + up(scales, 64);
    };
    if (s.is_tiled) {
        return 64 + 2 * tiles(s.ffn, s.hidden) + tiles(s.hidden, s.ffn);
    }
    const std::size_t scales = s.ffn * groups_of(s.format, up(s.hidden, 128));
    const std::size_t down = groups_of(s.format, s.ffn) * up(s.hidden, 128);
    return 64 + tiles(s.ffn, s.hidden) + up(s.ffn * (2 * row(s.hidden) + 64), 64) + up(2 * scales, 64) +
           up(scales, 64) + up(2 * down, 64) + up(down, 64);
}

std::uint32_t crc32(const std::uint8_t* data, std::size_t size) {
    std::uint32_t crc = ~0u;
    for (std::size_t i = 0; i < size; ++i) {
        crc ^= data[i];
        for (int bit = 0; bit < 8; ++bit) {
            crc = crc >> 1 ^ (0xEDB88320u & (0u - (crc & 1u)));
        }
    }
    return ~crc;
}

void write_header(const Shape& s, Bytes& blob) {
    std::memset(blob.data(), 0, 64);
    std::memcpy(blob.data(), "EDGE-MLP", 8);
    const std::uint32_t fields[6] = {2,
                                     static_cast<std::uint32_t>(s.format),
                                     static_cast<std::uint32_t>(draw(0, 2)),
                                     static_cast<std::uint32_t>(s.hidden),
                                     static_cast<std::uint32_t>(s.ffn),
                                     s.is_tiled ? 1u : 0u};
    const std::uint64_t size = blob.size;
    std::memcpy(blob.data() + 8, fields, sizeof(fields));
    std::memcpy(blob.data() + 32, &size, sizeof(size));
    const std::uint32_t crc = crc32(blob.data(), 60);
    std::memcpy(blob.data() + 60, &crc, sizeof(crc));
}

// Random bytes would make scales and bf16 weights huge or NaN and zeros far from all values: give them ordinary sizes.
void tame(const Weights& w, Bytes& blob) {
    auto half = [](const std::uint16_t* p, std::size_t count) {
        for (std::size_t i = 0; i < count; ++i) {
            const std::uint16_t value =
                static_cast<std::uint16_t>(0x1800 + randomness() % 0x800);  // about 0.002 to 0.008
            std::memcpy(const_cast<char*>(reinterpret_cast<const char*>(p)) + 2 * i, &value, 2);
        }
    };
    auto zero = [&w](const std::int8_t* p, std::size_t count) {  // amid the values, as quantisers put them
        for (std::size_t i = 0; i < count; ++i) {
            const int value = w.format == Format::u4 ? 4 + static_cast<int>(randomness() % 8)
                                                     : static_cast<int>(randomness() % 41) - 20;
            const_cast<std::int8_t*>(p)[i] = static_cast<std::int8_t>(value);
        }
    };
    auto tiles = [&](const Tiles& a, std::size_t rows) {
        zero(a.zero, up(rows, 16) * a.groups);
        half(a.scale, up(rows, 16) * a.groups);
    };
    tiles(w.gate_tiles, w.ffn);
    if (w.is_tiled) {
        tiles(w.up_tiles, w.ffn);
        tiles(w.down_tiles, w.hidden);
    } else {
        zero(w.up.zero, w.ffn * w.up.groups);
        zero(w.down_zero, w.down_groups * w.columns);
        half(w.up.scale, w.ffn * w.up.groups);
        half(w.down_scale, w.down_groups * w.columns);
    }
    if (w.format == Format::bf16) {
        for (std::size_t i = 64; i + 1 < blob.size; i += 2) {
            blob.data()[i + 1] = static_cast<std::uint8_t>((blob.data()[i + 1] & 0x80) | 0x3c);  // +-0.008 to 0.03
        }
    }
}

template <class T>
std::unique_ptr<T[]> exactly(std::size_t count) {
    return std::unique_ptr<T[]>(new T[count]());
}

// Tokens as blocks, in memory of exactly their size.
struct Blocks {
    Blocks(std::size_t rows, std::size_t blocks)
        : values(exactly<float>(rows * blocks * block)),
          scale(exactly<float>(rows * blocks)),
          sum(exactly<float>(rows * blocks)),
          offset(exactly<std::int32_t>(rows * blocks)),
          tokens{rows, values.get(), scale.get(), offset.get(), sum.get(), nullptr} {}

    std::unique_ptr<float[]> values, scale, sum;
    std::unique_ptr<std::int32_t[]> offset;
    Tokens tokens;
};

// As cats_mlp_op.cpp does, on one thread, with two ranges.
void decode_all(const Kernels& k, const Weights& w, const Thresholds& t, const float* x, std::size_t rows, int digits,
                float* y) {
    const std::size_t chunks = up(w.ffn, block) / block, per_range = (chunks + 1) / 2;
    const std::size_t ranges = (chunks + per_range - 1) / per_range, stride = rows * sums_stride(w);
    auto values = exactly<std::uint8_t>(rows * token_bytes(w));
    auto scale = exactly<float>(rows * token_lanes(w)), sum = exactly<float>(rows * token_lanes(w));
    auto offset = exactly<std::int32_t>(rows * token_lanes(w));
    auto total = exactly<float>(rows), sums = exactly<float>(ranges * stride);
    auto scratch = exactly<float>(decode_scratch(w, rows, per_range * block));
    Tokens tokens{rows, values.get(), scale.get(), offset.get(), sum.get(), total.get()};
    Blocks blocks(rows, w.columns / block);
    k.prepare(w, x, digits, tokens);
    k.prepare_blocks(w, x, digits, blocks.tokens);
    for (std::size_t r = 0; r < ranges; ++r) {
        const std::size_t first = r * per_range * block, last = std::min(w.ffn, first + per_range * block);
        k.decode(w, t, tokens, blocks.tokens, digits, first, last, sums.get() + r * stride, scratch.get());
    }
    k.finish(w, sums.get(), ranges, rows, 0, w.hidden, y);
}

void run_blocks(const Kernels& k, const Weights& w, const Thresholds& t, const float* x, std::size_t rows, int digits,
                float* y) {
    const std::size_t chunks = up(w.ffn, block) / block;
    const std::size_t step = w.is_tiled && rows <= max_unpacked_rows ? tile_rows : block;
    Blocks tokens(rows, w.columns / block), hidden(rows, chunks);
    auto scratch = exactly<float>(block_scratch(rows));
    k.prepare_blocks(w, x, digits, tokens.tokens);
    for (std::size_t c = 0; c < chunks; ++c) {
        k.hidden(w, t, tokens.tokens, digits, c * block, hidden.tokens, scratch.get());
    }
    for (std::size_t begin = 0; begin < w.hidden; begin += step) {
        k.output(w, hidden.tokens, digits, begin, begin + step, y, scratch.get());
    }
}

void run_all(const Kernels& k, const Weights& w, const Thresholds& t, const float* x, std::size_t rows, bool exact,
             float* y) {
    const std::size_t few = w.is_tiled ? max_unpacked_rows : max_decode_rows;
    const std::size_t most = exact || rows <= few ? few : rows;
    for (std::size_t m = 0; m < rows; m += most) {
        const std::size_t count = std::min(most, rows - m);
        const int digits = exact ? 0 : count <= max_rows_of_two_digits ? 2 : 1;
        const auto run = most > max_decode_rows ? run_blocks : decode_all;
        run(k, w, t, x + m * w.hidden, count, digits, y + m * w.hidden);
    }
}

// Far from every activation, each neuron dead or not, so that rounding does not decide: scattered, by whole groups of
// 128, or one alone.
std::unique_ptr<float[]> draw_limits(std::size_t ffn) {
    auto limits = exactly<float>(ffn);
    const std::size_t kind = draw(0, 2), alone = draw(0, ffn - 1);
    std::vector<bool> is_group_dead(ffn / block + 1);
    for (std::size_t g = 0; g <= ffn / block; ++g) {
        is_group_dead[g] = draw(0, 1) == 0;
    }
    for (std::size_t j = 0; j < ffn; ++j) {
        const bool is_dead = kind == 0 ? draw(0, 2) > 0 : kind == 1 ? is_group_dead[j / block] : j != alone;
        limits[j] = is_dead ? 1e30f : draw(0, 9) ? -1.0f : NAN;  // nothing is <= NaN
    }
    return limits;
}

// Root of the mean square error, relative, but for the values of row `poisoned`.
double distance(const float* got, const float* wanted, std::size_t rows, std::size_t hidden, std::size_t poisoned) {
    double error = 0, size = 1e-30;
    for (std::size_t i = 0; i < rows * hidden; ++i) {
        if (i / hidden == poisoned) {
            continue;
        }
        error += std::pow(static_cast<double>(got[i]) - wanted[i], 2);
        size += std::pow(static_cast<double>(wanted[i]), 2);
    }
    return std::sqrt(error / size);
}

std::vector<const Kernels*> machine_kernels() {
    const edge::CpuFeatures cpu = edge::cpu_features();
    std::vector<const Kernels*> found;
    if (cpu.avx2) {
        found.push_back(&kernels_avx2);
    }
#ifdef EMULATE_AVX_VNNI
    if (cpu.avx2) {
        found.push_back(&kernels_avx2vnni);
    }
#else
    if (cpu.avx_vnni) {
        found.push_back(&kernels_avx2vnni);
    }
#endif
    if (cpu.avx512_vnni) {
        found.push_back(&kernels_avx512);
    }
    return found;
}

bool check_round(const Shape& shape, std::size_t rows) {
    Bytes blob(blob_size(shape));
    write_header(shape, blob);
    Weights w;
    if (const char* wrong = parse(blob.data(), blob.size, w)) {
        std::printf("a good blob was refused: %s\n", wrong);
        return false;
    }
    tame(w, blob);
    auto x = exactly<float>(rows * w.hidden), wanted = exactly<float>(rows * w.hidden),
         got = exactly<float>(rows * w.hidden);
    for (std::size_t i = 0; i < rows * w.hidden; ++i) {
        x[i] = std::normal_distribution<float>()(randomness);
    }
    const std::size_t poisoned = draw(0, 5) ? rows : draw(0, rows - 1);  // other rows must not notice
    if (poisoned < rows) {
        x[poisoned * w.hidden + draw(0, w.hidden - 1)] = draw(0, 1) ? NAN : INFINITY;
    } else if (draw(0, 5) == 0) {
        std::fill_n(x.get(), w.hidden, -0.0f);
    }
    const bool is_dense = draw(0, 1) == 0;
    auto limits = is_dense ? exactly<float>(1) : draw_limits(w.ffn);
    limits[0] = is_dense ? -1 : limits[0];
    const Thresholds t{limits.get(), is_dense ? 1 : w.ffn};
    auto hidden = exactly<float>(w.ffn);
    reference(w, t, x.get(), rows, wanted.get(), hidden.get());
    bool is_right = true;
    for (const Kernels* k : machine_kernels()) {
        for (bool exact : {true, false}) {
            const bool is_exact = exact || w.format == Format::bf16;
            std::fill_n(got.get(), rows * w.hidden, NAN);
            run_all(*k, w, t, x.get(), rows, is_exact, got.get());
            const double error = distance(got.get(), wanted.get(), rows, w.hidden, poisoned);
            if (!(error <= (is_exact ? 2e-5 : 8e-2))) {
                std::printf("%s differs by %g: format %d, H %zu, F %zu, %zu rows, exact %d, dense %d, tiled %d\n",
                            k->name, error, static_cast<int>(w.format), w.hidden, w.ffn, rows, is_exact, is_dense,
                            w.is_tiled);
                is_right = false;
            }
        }
    }
    return is_right;
}

// A spoilt header is refused, or describes a blob of exactly this size.
bool check_spoilt() {
    const Shape shape = draw_shape();
    Weights w;
    Bytes part(draw(0, 63));
    if (parse(part.data(), part.size, w) == nullptr) {
        std::printf("a blob of %zu bytes was taken for a whole one\n", part.size);
        return false;
    }
    Bytes blob(blob_size(shape) - (draw(0, 1) ? draw(0, 64) : 0));
    write_header(shape, blob);
    for (std::size_t flips = draw(0, 3); flips > 0; --flips) {
        blob.data()[draw(0, 59)] ^= static_cast<std::uint8_t>(1u << draw(0, 7));
    }
    if (draw(0, 1)) {  // by one who knows the checksum
        const std::uint32_t crc = crc32(blob.data(), 60);
        std::memcpy(blob.data() + 60, &crc, sizeof(crc));
    }
    if (parse(blob.data(), blob.size, w) != nullptr) {
        return true;
    }
    const Shape read{w.format, w.hidden, w.ffn, w.is_tiled};
    if (blob_size(read) != blob.size) {
        std::printf("a blob of %zu bytes was taken for one of %zu\n", blob.size, blob_size(read));
        return false;
    }
    return true;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) {
        std::printf("usage: fuzz_cats_mlp SEED ROUNDS\n");
        return 2;
    }
    randomness.seed(static_cast<unsigned>(std::atoi(argv[1])));
    bool is_right = check_round({Format::u4, max_columns, block, false}, 2);
    is_right &= check_round({Format::u4, max_columns, block, true}, 2);
    for (int round = std::atoi(argv[2]); round > 0; --round) {
        is_right &= check_round(draw_shape(), draw(0, 4) ? draw(1, 20) : draw(30, 45));
        for (int spoilt = 0; spoilt < 20; ++spoilt) {
            is_right &= check_spoilt();
        }
    }
    return is_right ? 0 : 1;
}
