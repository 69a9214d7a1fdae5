#include "block_sparse_attention/plan.hpp"

#include <algorithm>

namespace edge {
namespace attention {
namespace {

bool is_valid(const Call& call) {
    if (call.num_sequences == 0 || call.begins[0] != 0 ||
        call.begins[call.num_sequences] != static_cast<std::int64_t>(call.num_tokens)) {
        return call.num_tokens == 0;
    }
    for (std::size_t b = 0; b < call.num_sequences; ++b) {
        const std::int64_t end = std::int64_t{call.past_lens[b]} + call.begins[b + 1] - call.begins[b];
        if (call.begins[b] > call.begins[b + 1] || call.past_lens[b] < 0 ||
            end > static_cast<std::int64_t>(call.table_width * call.layout.block_size)) {
            return false;
        }
    }
    return true;
}

std::size_t group_of(const Call& call) { return call.num_heads / call.num_kv_heads; }

bool is_kept(const Pattern& pattern, std::size_t group, std::int64_t number, std::int64_t size) {
    for (std::size_t g = 0; g < group; ++g) {
        if (pattern.strides[g] > 0 && (number + pattern.offsets[g]) % pattern.strides[g] == 0) {
            return true;
        }
    }
    return number * size < pattern.sink;
}

// Blocks before `end` that some head of the group sees from far away.
std::vector<std::int64_t> kept_blocks(const Pattern& pattern, std::size_t group, std::int64_t end, std::int64_t size) {
    std::vector<std::int64_t> kept;
    const bool is_alike = std::all_of(pattern.strides, pattern.strides + group,
                                      [&](std::int64_t stride) { return stride == pattern.strides[0]; }) &&
                          std::all_of(pattern.offsets, pattern.offsets + group,
                                      [&](std::int64_t offset) { return offset == pattern.offsets[0]; });
    const std::int64_t sinks = std::min(end, (pattern.sink + size - 1) / size);
    const std::int64_t stride = pattern.strides[0];
    for (std::int64_t number = 0; number < (is_alike ? sinks : end); ++number) {
        if (is_kept(pattern, group, number, size)) {
            kept.push_back(number);
        }
    }
    if (is_alike && stride > 0) {  // the rest by steps: a long context has thousands of blocks that are not seen
        const std::int64_t phase = (stride - pattern.offsets[0] % stride) % stride;
        const std::int64_t first = phase + (std::max<std::int64_t>(0, sinks - phase) + stride - 1) / stride * stride;
        for (std::int64_t number = first; number < end; number += stride) {
            kept.push_back(number);
        }
    }
    return kept;
}

Pattern pattern_of_pair(const Call& call, std::size_t pair) {
    const std::size_t first = pair % call.num_kv_heads * group_of(call);
    Pattern pattern = call.pattern;
    pattern.strides += first;
    pattern.offsets += first;
    return pattern;
}

void add_tasks(const Call& call, std::size_t pair, Plan& plan) {
    const std::size_t b = pair / call.num_kv_heads, head = pair % call.num_kv_heads, group = group_of(call);
    const std::size_t begin = static_cast<std::size_t>(call.begins[b]), end = static_cast<std::size_t>(call.begins[b + 1]);
    const std::int64_t size = static_cast<std::int64_t>(call.layout.block_size);
    const std::size_t chunk = std::max<std::size_t>(1, max_rows / group);
    const std::vector<std::int64_t>& kept = plan.kept[pair];
    for (std::size_t first = begin; first < end; first += chunk) {
        const std::size_t count = std::min(chunk, end - first);
        Task task{};
        task.pair = pair;
        task.first_token = first;
        task.rows.count = count * group;
        task.rows.group = group;
        task.rows.token_stride = call.num_heads * call.layout.key_dim;
        task.rows.query = call.query + first * task.rows.token_stride + head * group * call.layout.key_dim;
        task.rows.first = call.past_lens[b] + static_cast<std::int64_t>(first - begin);
        const std::int64_t last = (task.rows.first + static_cast<std::int64_t>(count) - 1) / size;
        task.first_local = local_start(call.pattern, task.rows.first, size) / size;
        const auto before = std::lower_bound(kept.begin(), kept.end(), task.first_local);
        task.num_kept = static_cast<std::size_t>(before - kept.begin());
        const std::size_t blocks = task.num_kept + static_cast<std::size_t>(last - task.first_local + 1);
        task.is_shared = end - begin <= chunk && blocks > range_blocks;
        if (task.is_shared) {
            plan.merges.push_back({plan.tasks.size(), (blocks + range_blocks - 1) / range_blocks});
        }
        const std::size_t step = task.is_shared ? range_blocks : blocks;
        for (std::size_t block = 0; block < blocks; block += step) {
            task.first_block = block;
            task.last_block = std::min(blocks, block + step);
            task.first_state = plan.num_states;
            plan.num_states += task.is_shared ? task.rows.count : 0;
            plan.tasks.push_back(task);
        }
    }
}

}  // namespace

Plan make_plan(const Call& call) {
    Plan plan{};
    plan.is_valid = is_valid(call);
    if (!plan.is_valid) {
        return plan;
    }
    const std::int64_t size = static_cast<std::int64_t>(call.layout.block_size);
    for (std::size_t pair = 0; pair < call.num_sequences * call.num_kv_heads; ++pair) {
        const std::size_t b = pair / call.num_kv_heads;
        const std::int64_t end = std::int64_t{call.past_lens[b]} + call.begins[b + 1] - call.begins[b];
        const std::int64_t near = local_start(call.pattern, std::max<std::int64_t>(0, end - 1), size) / size;
        plan.kept.push_back(kept_blocks(pattern_of_pair(call, pair), group_of(call), near, size));
        add_tasks(call, pair, plan);
    }
    if (plan.merges.empty()) {  // the longest first, so that no thread is left alone with one at the end
        std::stable_sort(plan.tasks.begin(), plan.tasks.end(), [](const Task& x, const Task& y) {
            return x.rows.count * x.last_block > y.rows.count * y.last_block;
        });
    }
    return plan;
}

std::uint8_t* block_of(const Call& call, std::size_t pair, std::int64_t number) {
    if (number < 0 || number >= static_cast<std::int64_t>(call.table_width)) {
        return nullptr;
    }
    const std::int32_t place = call.table[pair * call.table_width + static_cast<std::size_t>(number)];
    if (place < 0 || static_cast<std::size_t>(place) >= call.num_blocks) {
        return nullptr;
    }
    return call.cache + static_cast<std::size_t>(place) * block_bytes(call.layout);
}

Entry entry_of(const Call& call, const Plan& plan, const Task& task, std::size_t index) {
    const std::int64_t number = index < task.num_kept
                                    ? plan.kept[task.pair][index]
                                    : task.first_local + static_cast<std::int64_t>(index - task.num_kept);
    return {block_of(call, task.pair, number), number};
}

Pattern pattern_of(const Call& call, const Task& task) { return pattern_of_pair(call, task.pair); }

std::size_t output_at(const Call& call, const Task& task, std::size_t row) {
    const std::size_t group = task.rows.group, head = task.pair % call.num_kv_heads * group + row % group;
    return ((task.first_token + row / group) * call.num_heads + head) * call.layout.value_dim;
}

}  // namespace attention
}  // namespace edge
