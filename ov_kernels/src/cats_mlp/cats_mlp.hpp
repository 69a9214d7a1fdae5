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
//   gate       [F][row_bytes]       rows of Wgate^T
//   records    [F][2 * row_bytes + 64]   neuron j: its row of Wup^T, its row of Wdown, zeros
//   gate scale f16 [F][groups], gate zero i8 [F][groups]; the same for up
//   down scale f16 [down_groups][columns], down zero i8 [down_groups][columns]
// A weight is scale * (q - zero), and finite: a neuron that is dead for one token and alive for another is multiplied by 0.
// Formats of q:
//   i8    one byte, signed. groups = 1; down_groups = 1: one scale for each column
//   u4    columns in blocks of 128: byte i of a block holds column i in its low and column i + 64 in its high half.
//         groups = columns / 128; down_groups = F / 128: neurons in groups of 128; H and F are multiples of 128
//   bf16  two bytes; no scales, no zeros
//
// Activations: `exact` computes in f32 throughout, as bf16 does (max error / max y below 1e-5). Else tokens enter the dot
// products as integers, one scale for each 128 columns, and a * (x Wup) too, one for each batch of neurons: of 16 bits for
// one or two tokens, with AVX2 alone for up to 8 (rms error / rms y below 1e-4), and of 8 bits for more (below 2e-2, the
// class of OpenVINO's own dynamic quantisation). A batch's neurons share their scale, so within these bounds a token's result
// depends on which neurons its step's other tokens wake; not so in f32. tests/kernels/test_cats_mlp.py holds the bounds.
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
constexpr std::size_t max_prefill_rows = 256;

// Rows of one matrix. `scale` and `zero` have `groups` entries for each row; null for bf16.
struct Matrix {
    const std::uint8_t* rows;
    std::size_t stride;  // bytes from row to row
    const std::uint16_t* scale;
    const std::int8_t* zero;
    std::size_t groups;
};

// A blob that was found whole. Pointers lead into it; none need be aligned.
struct Weights {
    Format format;
    Activation activation;
    std::size_t hidden;
    std::size_t ffn;
    std::size_t columns;
    std::size_t row_bytes;
    Matrix gate;
    Matrix up;
    const std::uint8_t* down;  // first row of Wdown; stride as `up`
    const std::uint16_t* down_scale;
    const std::int8_t* down_zero;
    std::size_t down_groups;
};

// Reads a blob's header and sets `weights`. Returns null, or what is wrong with the blob, which is then not to be used.
const char* parse(const std::uint8_t* blob, std::size_t size, Weights& weights);

struct Thresholds {
    const float* values;  // `count` of them
    std::size_t count;    // 1, or F
};

// Tokens, ready for dot products: values of 32 (f32), 16 or 8 bits. Columns beyond H are 0. Up to 8 tokens: values
// [rows][columns], scale and sum [rows][columns / 128]; more: [columns / 128][rows][128] and [columns / 128][rows].
struct Tokens {
    std::size_t rows;
    void* values;
    float* scale;  // of each block of integers; NaN where the block holds NaN or infinity
    float* sum;    // of each block's values
    float* total;  // [rows]: of `sum`
};

// The hidden activations of prefill in 8 bits: q [blocks][rows][128]; scale and sum [blocks][rows], for F / 128 blocks,
// rounded up.
struct Hidden {
    std::int8_t* q;
    float* scale;
    float* sum;
};

// One instruction set. All pointers: dense, no alignment beyond their type's, no aliasing.
struct Kernels {
    const char* name;

    // Most tokens whose values have 16 bits in decoding; more have 8.
    std::size_t max_rows_of_16_bits;

    // Fills `tokens` from x, [rows][H].
    void (*prepare)(const Weights& weights, const float* x, int bits, Tokens& tokens);

    // Adds the share of neurons [first, last), `first` a multiple of 128, of up to 8 tokens to `sums`, [rows][columns +
    // 16] and set to 0: raw sums over q of Wdown (i8) or final ones; element `columns` of a row sums the coefficients.
    // `scratch` holds decode_scratch() floats. Returns the bytes of weights read.
    std::size_t (*decode)(const Weights& weights, const Thresholds& thresholds, const Tokens& tokens, int bits,
                          std::size_t first, std::size_t last, float* sums, float* scratch);

    // y[rows][begin..end) from `count` arrays of sums, added in order; begin is a multiple of 128.
    void (*finish)(const Weights& weights, const float* sums, std::size_t count, std::size_t rows, std::size_t begin,
                   std::size_t end, float* y);

    // Prefill, first half: the hidden activations of neurons [first, first + 128), `first` a multiple of 128.
    // `scratch` holds prefill_scratch() floats.
    void (*prefill_hidden)(const Weights& weights, const Thresholds& thresholds, const Tokens& tokens,
                           std::size_t first, Hidden& hidden, float* scratch);

    // Prefill, second half: y[rows][begin..begin + 128), as far as H reaches. Same scratch.
    void (*prefill_output)(const Weights& weights, const Hidden& hidden, std::size_t rows, std::size_t begin, float* y,
                           float* scratch);
};

std::size_t sums_stride(const Weights& weights);
std::size_t decode_scratch(const Weights& weights, std::size_t rows, std::size_t neurons);
std::size_t prefill_scratch(std::size_t rows);

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
