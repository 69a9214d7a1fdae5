// CatsMlp: a gated MLP in one op, which reads only the neurons that a token wakes (CATS, arXiv 2404.08763; per-channel
// thresholds: CHESS, arXiv 2409.01366).
//
//   g = f(x Wgate)          f: SiLU or GELU
//   a = g where not |g| <= t, else 0          t: one number, or one for each neuron; t < 0: nothing is ever dead
//   y = (a * (x Wup)) Wdown
//
// Neuron j owns row j of Wgate^T, row j of Wup^T and row j of Wdown. All gate rows are read; of the other two only those
// of neurons that are alive in at least one token. A NaN is not <= t: it stays alive and reaches y.
//
// In the IR: type="CatsMlp" version="edge"; inputs x f32 [.., H], weights u8 [bytes] (layout below), thresholds f32 [1]
// or [F]; output y f32 [.., H]; attribute `exact`.
//
// Weights, one blob, made by edge_export and never rewritten: header of 64 bytes, then sections in this order, each
// padded with zeros to 64 bytes. `columns` is H rounded up to 128; a row has all of them.
//
// Layout of records, from which neurons can be skipped:
//   gate       rows of Wgate^T in tiles, see below
//   records    [F][2 * row_bytes + 64]   neuron j: its row of Wup^T, its row of Wdown, zeros
//   gate scale, gate zero, see below
//   up scale f16 [F][groups], up zero i8 [F][groups]
//   down scale f16 [down_groups][columns], down zero i8 [down_groups][columns]
//
// Layout of tiles, to be read whole: rows come 16 abreast, [rows / 16][row_bytes / 4][16][4 bytes], rounded up with
// zeros. Those of gate and up are the same; those of down are Wdown's columns, of F neurons rounded up to 128.
//   gate, up, down tiles
//   gate scale f16 [rows / 16][groups][16], gate zero i8 of the same shape; the same for up, and for down with
//   down_groups
//
// A weight is scale * (q - zero), and finite: a neuron that is dead for one token and alive for another is multiplied by
// 0.
// Formats of q:
//   i8    one byte, signed. groups = 1; down_groups = 1: one scale for each column
//   u4    columns in blocks of 128: byte i of a block holds column i in its low and column i + 64 in its high half.
//         groups = columns / 128; down_groups = F / 128: neurons in groups of 128; H and F are multiples of 128
//   bf16  two bytes; no scales, no zeros
//
// Activations: `exact` computes in f32 throughout, as bf16 does (max error / max y below 1e-5). Else tokens enter the dot
// products as integers, one scale for at most 128 columns, and a * (x Wup) too, one for at most 128 neurons: of two
// digits of 8 bits for one or two tokens (rms error / rms y below 1e-4), and of one for more (below 2e-2, the class of
// OpenVINO's own dynamic quantisation). In records neurons that are read together share their scale, so within these
// bounds a token's result depends on which neurons its step's other tokens wake; not so in f32, nor in tiles.
// tests/kernels/test_cats_mlp.py holds the bounds.
//
// This header is included by every translation unit of the op and names nothing from OpenVINO or the STL.

#pragma once

#include <cstddef>
#include <cstdint>

namespace edge {
namespace cats_mlp {

enum class Format : std::uint32_t { i8 = 0, u4 = 1, bf16 = 2 };
enum class Activation : std::uint32_t { silu = 0, gelu_tanh = 1, gelu_erf = 2 };

constexpr std::size_t block = 128;  // columns or neurons that share a scale
constexpr std::size_t max_columns = 32768;
constexpr std::size_t max_decode_rows = 8;
constexpr std::size_t max_unpacked_rows = 16;  // tokens that tiles are multiplied with as they are
constexpr std::size_t max_rows_of_two_digits = 2;
constexpr std::size_t max_prefill_rows = 256;
constexpr std::size_t tile_rows = 16;

// Rows of one matrix. `scale` and `zero` have `groups` entries for each row; null for bf16.
struct Matrix {
    const std::uint8_t* rows;
    std::size_t stride;  // bytes from row to row
    const std::uint16_t* scale;
    const std::int8_t* zero;
    std::size_t groups;
};

// A matrix in tiles. `blocks` is its columns / 128, rounded up; scale and zero as in the blob, null for bf16.
struct Tiles {
    const std::uint8_t* bytes;
    std::size_t blocks;
    const std::uint16_t* scale;
    const std::int8_t* zero;
    std::size_t groups;
};

// A blob that was found whole. Pointers lead into it; none need be aligned. Of its two layouts one is there.
struct Weights {
    Format format;
    bool is_tiled;
    Activation activation;
    std::size_t hidden;
    std::size_t ffn;
    std::size_t columns;
    std::size_t row_bytes;
    Matrix up;
    const std::uint8_t* down;  // first row of Wdown; stride as `up`
    const std::uint16_t* down_scale;
    const std::int8_t* down_zero;
    std::size_t down_groups;
    Tiles gate_tiles;
    Tiles up_tiles;
    Tiles down_tiles;  // of Wdown^T: its rows are columns of the output
};

// Reads a blob's header and sets `weights`. Returns null, or what is wrong with the blob, which is then not to be used.
const char* parse(const std::uint8_t* blob, std::size_t size, Weights& weights);

struct Thresholds {
    const float* values;  // `count` of them
    std::size_t count;    // 1, or F
};

// Tokens, ready for dot products. Columns beyond H are 0.
//   f32       values [rows][columns], sum [rows][columns / 128]
//   integers  values [rows][digits][columns] in the order that the format's rows are read in, scale and offset for the
//             lanes of sums; for u4 sum as above
//   blocks    (prefill and tiles) values [columns / 128][rows][digits][128], of integers or f32; scale, offset and sum
//             [columns / 128][rows]. Also for the hidden activations, with F for H
struct Tokens {
    std::size_t rows;
    void* values;
    float* scale;          // NaN where its columns hold NaN or infinity
    std::int32_t* offset;  // what sums over weights begin with that are read as unsigned bytes
    float* sum;            // of each block's values
    float* total;          // [rows]: of all values
};

// One instruction set. All pointers: dense, no alignment beyond their type's, no aliasing.
struct Kernels {
    const char* name;

    // Fills `tokens` from x, [rows][H]: as f32 (no digits), or integers of 1 or 2 digits.
    void (*prepare)(const Weights& weights, const float* x, int digits, Tokens& tokens);

    // Adds the share of neurons [first, last), `first` a multiple of 128, of up to 8 tokens, which come in both forms, to
    // `sums`, [rows][columns + 16] and set to 0: raw sums over q of Wdown (i8) or final ones; element `columns` of a row
    // sums the coefficients. `scratch` holds decode_scratch() floats. Returns the bytes of weights read.
    std::size_t (*decode)(const Weights& weights, const Thresholds& thresholds, const Tokens& tokens,
                          const Tokens& blocks, int digits, std::size_t first, std::size_t last, float* sums,
                          float* scratch);

    // y[rows][begin..end) from `count` arrays of sums, added in order; begin is a multiple of 128.
    void (*finish)(const Weights& weights, const float* sums, std::size_t count, std::size_t rows, std::size_t begin,
                   std::size_t end, float* y);

    // Without skipping, in two halves. Fills `tokens` with blocks; more than 8 tokens have one digit.
    void (*prepare_blocks)(const Weights& weights, const float* x, int digits, Tokens& tokens);

    // The hidden activations of neurons [first, first + 128), `first` a multiple of 128. `scratch` holds
    // block_scratch() floats.
    void (*hidden)(const Weights& weights, const Thresholds& thresholds, const Tokens& tokens, int digits,
                   std::size_t first, Tokens& hidden, float* scratch);

    // y[rows][begin..end) as far as H reaches, from the hidden activations. Both are multiples of 128; of 16 with tiles
    // and at most 16 tokens. Same scratch.
    void (*output)(const Weights& weights, const Tokens& hidden, int digits, std::size_t begin, std::size_t end,
                   float* y, float* scratch);
};

std::size_t tiled_bytes(const Weights& weights);  // of all its matrices and scales, in tiles
std::size_t sums_stride(const Weights& weights);
std::size_t token_bytes(const Weights& weights);  // of the values of a token in decoding
std::size_t token_lanes(const Weights& weights);  // of its scales
std::size_t decode_scratch(const Weights& weights, std::size_t rows, std::size_t neurons);
std::size_t block_scratch(std::size_t rows);

// Computes y [rows][H] from x [rows][H], one token after another, in f32 with sums in f64. `hidden` holds F floats.
void reference(const Weights& weights, const Thresholds& thresholds, const float* x, std::size_t rows, float* y,
               float* hidden);

#if defined(__x86_64__) || defined(_M_X64)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx2vnni;
extern const Kernels kernels_avx512;
#endif

// Sets the best kernels that CPU and system support, or those that EDGE_KERNELS_ISA names (asked at each call); null is
// the reference. False: this machine has none of that name.
bool choose_kernels(const Kernels*& chosen);

}  // namespace cats_mlp
}  // namespace edge
