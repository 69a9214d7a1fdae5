// Which queries go together, and which blocks they read: the work of one call, cut into tasks.
//
// A task is up to 64 rows (tokens x heads of one KV head) and the blocks that any of them sees: those that its pattern
// keeps for ever, in order, then those of the local window. Where a sequence has no more than 64 rows a KV head, as in
// decoding, its blocks are shared out in ranges of 32, whose results are added in order: what comes out does not depend on
// the number of threads.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "block_sparse_attention/block_sparse_attention.hpp"

namespace edge {
namespace attention {

constexpr std::size_t range_blocks = 32;

// The inputs of one evaluation. `pattern` has strides and offsets of all query heads.
struct Call {
    Layout layout;
    Pattern pattern;
    std::size_t num_heads, num_kv_heads, num_tokens, num_sequences;
    const float *query, *key, *value;
    std::uint8_t* cache;
    std::size_t num_blocks;
    const std::int32_t *past_lens, *begins, *table;
    std::size_t table_width;
};

struct Task {
    Rows rows;
    std::size_t pair;          // sequence * num_kv_heads + KV head
    std::size_t first_token;   // of all tokens of the call
    std::size_t num_kept;      // entries of the pair's kept blocks that lie before the window
    std::int64_t first_local;  // number of the window's first block
    std::size_t first_block, last_block;  // of kept and local blocks together
    bool is_shared;                       // with other tasks of the same rows
    std::size_t first_state;
};

// Tasks of the same rows, in the order in which their results are added.
struct Merge {
    std::size_t first_task, num_tasks;
};

struct Plan {
    bool is_valid;  // false: the inputs contradict each other
    std::vector<std::vector<std::int64_t>> kept;  // for each pair, the blocks seen from far away
    std::vector<Task> tasks;
    std::vector<Merge> merges;
    std::size_t num_states;
};

Plan make_plan(const Call& call);

// Physical place of a pair's logical block; null where the table lacks it or names none of the cache.
std::uint8_t* block_of(const Call& call, std::size_t pair, std::int64_t number);

// The entry at `index` of a task's blocks.
Entry entry_of(const Call& call, const Plan& plan, const Task& task, std::size_t index);

Pattern pattern_of(const Call& call, const Task& task);

// Where the result of a task's row goes, in floats.
std::size_t output_at(const Call& call, const Task& task, std::size_t row);

}  // namespace attention
}  // namespace edge
