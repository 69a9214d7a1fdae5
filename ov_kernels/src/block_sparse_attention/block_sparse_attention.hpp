// BlockSparseAttention: attention over a paged cache that reads only the blocks of keys and values which a pattern sees
// (LongGen, arXiv 2410.01485; S2-Attention, arXiv 2407.17678; full attention is the pattern that sees all).
//
// A query of head h at position p, in block i = p / S, sees the key at position k <= p, in block j = k / S, if
//   k < sink,  or  k >= start(p),  or  strides[h] > 0 and (j + offsets[h]) % strides[h] == 0
//   start(p) = (i + 1) S - window, or p + 1 - window if `by_tokens`; 0 for window = -1
// and gets softmax over those keys of scale * q.k, times their values. G = num_heads / num_kv_heads heads share keys.
//
// In the IR: type="BlockSparseAttention" version="edge". Inputs, T tokens of B sequences:
//   query f32 [T, H D], key f32 [T, Hkv D], value f32 [T, Hkv V]
//   cache u8 [blocks, bytes]       written in place: the keys and values of these tokens enter it first
//   past_lens i32 [B], subsequence_begins i32 [B + 1], block_table i32 [B, Hkv, n]: physical block of each logical one
// Output f32 [T, H V]. A query that sees a block which the table lacks gets NaN; nothing is read or written out of bounds.
//
// A block holds S tokens of one KV head of one layer, K and then V, lanes along what a product runs over last:
//   f32, bf16   K [D][S], V [S][V]
//   i8          K [D / 2][S][2], V [S / 2][V][2], then a f32 scale for each token's key and for each token's value
// i8 is symmetric, by token: a token never changes what another left, so a rejected draft leaves no trace.
//
// Accuracy: f32 and bf16 to 1e-5 of the largest output, given the stored values. With i8 queries and probabilities have
// 15 bits, keys and values 7: 1.5e-2 on normal data. tests/kernels/test_block_sparse_attention.py holds these bounds.
//
// This header is included by every translation unit of the op and names nothing from OpenVINO or the STL.

#pragma once

#include <cstddef>
#include <cstdint>

namespace edge {
namespace attention {

enum class Format : std::uint32_t { f32 = 0, bf16 = 1, i8 = 2 };

constexpr std::size_t max_block_size = 128;
constexpr std::size_t max_dim = 256;
constexpr std::size_t max_rows = 64;  // query rows that share one pass over the blocks

struct Layout {
    Format format;
    std::size_t block_size;  // S, a multiple of 16
    std::size_t key_dim;     // D, a multiple of 16
    std::size_t value_dim;   // V, a multiple of 16
};

// Static: what a unit of one instruction set emits must not serve another.
static inline std::size_t element_bytes(const Layout& x) {
    return x.format == Format::f32 ? 4 : x.format == Format::bf16 ? 2 : 1;
}
static inline std::size_t values_at(const Layout& x) { return x.block_size * x.key_dim * element_bytes(x); }
static inline std::size_t scales_at(const Layout& x) {
    return x.block_size * (x.key_dim + x.value_dim) * element_bytes(x);
}
static inline std::size_t block_bytes(const Layout& x) {
    return scales_at(x) + (x.format == Format::i8 ? 2 * x.block_size * sizeof(float) : 0);
}

// Of the G heads that share a KV head.
struct Pattern {
    std::int64_t window;  // -1: all
    bool by_tokens;
    std::int64_t sink;
    const std::int64_t* strides;
    const std::int64_t* offsets;
};

static inline std::int64_t local_start(const Pattern& x, std::int64_t position, std::int64_t block_size) {
    const std::int64_t end = x.by_tokens ? position + 1 : (position / block_size + 1) * block_size;
    return x.window < 0 || end < x.window ? 0 : end - x.window;
}

// Queries of one KV head and consecutive tokens: row r is head r % G of token r / G, at position `first` + r / G.
struct Rows {
    std::size_t count;  // at most max_rows
    std::size_t group;  // G
    const float* query;
    std::size_t token_stride;  // floats from a token's queries to the next one's
    std::int64_t first;
};

// A logical block and where it lies; null where the table lacks it.
struct Entry {
    const std::uint8_t* block;
    std::int64_t number;
};

// What a row has seen so far: V sums of values, then the largest score and the sum of exponentials.
static inline std::size_t state_stride(const Layout& x) { return x.value_dim + 16; }
constexpr float nothing_seen = -3.0e38f;

// One instruction set. Pointers need no alignment beyond their type's.
struct Kernels {
    // Puts one token into a block. `key` and `value` hold D and V floats.
    void (*store)(const Layout& layout, std::uint8_t* block, std::size_t slot, const float* key, const float* value);

    // Prepares `scratch`, attend_scratch() bytes aligned to 64, for these rows; `scale` is that of the scores.
    void (*prepare)(const Layout& layout, const Rows& rows, float scale, void* scratch);

    // Adds blocks to the rows' states, [rows][state_stride()], prepared by start(). `next` follows the last entry.
    void (*attend)(const Layout& layout, const Pattern& pattern, const Rows& rows, const Entry* entries,
                   std::size_t count, float* states, void* scratch);
};

std::size_t attend_scratch(const Layout& layout);

extern const Kernels kernels_ref;
#if defined(__x86_64__) || defined(_M_X64)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx2vnni;
extern const Kernels kernels_avx512;
#endif

// Sets the kernels of the instruction set in use. False: EDGE_KERNELS_ISA names one that this machine does not have.
bool choose_kernels(const Kernels*& chosen);

}  // namespace attention
}  // namespace edge
