// Random shapes, patterns, block tables and tokens through the plan and every instruction set of the machine, in buffers of
// exactly the promised sizes and at odd addresses, against the reference; now and then with inputs that contradict each
// other. Built with address and undefined-behaviour sanitizers by tests/kernels/test_sanitizers.py.
//
//   fuzz_block_sparse_attention SEED ROUNDS

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "block_sparse_attention/block_sparse_attention.hpp"
#include "block_sparse_attention/plan.hpp"
#include "cpu/cpu_features.hpp"

using namespace edge::attention;

namespace {

std::mt19937 randomness;

std::int64_t draw(std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(randomness);
}

std::size_t size(std::int64_t low, std::int64_t high) { return static_cast<std::size_t>(draw(low, high)); }

std::vector<float> normal(std::size_t count) {
    std::normal_distribution<float> distribution;
    std::vector<float> values(count);
    std::generate(values.begin(), values.end(), [&] { return distribution(randomness); });
    return values;
}

// A call with memory of its own.
struct Case {
    Call call{};
    std::vector<std::int64_t> strides, offsets;
    std::vector<float> query, key, value;
    std::vector<std::int32_t> past, begins, table;

    Case() {
        Layout& layout = call.layout;
        layout.format = static_cast<Format>(draw(0, 2));
        layout.block_size = std::size_t{16} << draw(0, 2);
        layout.key_dim = 16 * size(1, 9);
        layout.value_dim = 16 * size(1, 9);
        const std::size_t group = size(1, 5);
        call.num_kv_heads = size(1, 3);
        call.num_heads = group * call.num_kv_heads;
        call.num_sequences = size(1, 2);
        call.table_width = size(1, 60);
        begins.push_back(0);
        for (std::size_t b = 0; b < call.num_sequences; ++b) {
            const std::int64_t room = static_cast<std::int64_t>(call.table_width * layout.block_size);
            const std::int64_t count = std::min<std::int64_t>(room, draw(0, 3) == 0 ? draw(0, 90) : draw(0, 9));
            begins.push_back(begins.back() + static_cast<std::int32_t>(count));
            past.push_back(static_cast<std::int32_t>(draw(0, room - count)));
        }
        call.num_tokens = static_cast<std::size_t>(begins.back());
        draw_pattern();
        query = normal(call.num_tokens * call.num_heads * layout.key_dim);
        key = normal(call.num_tokens * call.num_kv_heads * layout.key_dim);
        value = normal(call.num_tokens * call.num_kv_heads * layout.value_dim);
        call.num_blocks = size(1, 200);
        table.resize(call.num_sequences * call.num_kv_heads * call.table_width);
        for (std::int32_t& place : table) {
            place = static_cast<std::int32_t>(draw(0, 30) == 0 ? draw(-3, 300) : draw(0, static_cast<std::int64_t>(call.num_blocks) - 1));
        }
        if (draw(0, 9) == 0) {
            past[0] = draw(0, 1) ? -1 : 2147483647;
        }
        if (draw(0, 19) == 0) {
            begins[size(0, static_cast<std::int64_t>(begins.size()) - 1)] = static_cast<std::int32_t>(draw(-5, 200));
        }
        call.query = query.data();
        call.key = key.data();
        call.value = value.data();
        call.past_lens = past.data();
        call.begins = begins.data();
        call.table = table.data();
    }

    void draw_pattern() {
        call.pattern.window = draw(0, 3) == 0 ? -1 : draw(1, 300);
        call.pattern.by_tokens = draw(0, 1) == 1;
        call.pattern.sink = draw(0, 1) * draw(0, 100);
        const bool is_alike = draw(0, 2) > 0;
        for (std::size_t h = 0; h < call.num_heads; ++h) {
            strides.push_back(is_alike && h > 0 ? strides[0] : draw(0, 5));
            offsets.push_back(is_alike && h > 0 ? offsets[0] : draw(0, 9));
        }
        call.pattern.strides = strides.data();
        call.pattern.offsets = offsets.data();
    }
};

// The states of every task, one after another, from blocks at an odd address.
std::vector<float> run(const Case& x, const Kernels& kernels) {
    Call call = x.call;
    const std::size_t bytes = call.num_blocks * block_bytes(call.layout), stride = state_stride(call.layout);
    const std::unique_ptr<std::uint8_t[]> memory(new std::uint8_t[bytes + 1]());
    call.cache = memory.get() + 1;
    const Plan plan = make_plan(call);
    std::vector<float> all;
    if (!plan.is_valid) {
        return all;
    }
    for (std::size_t pair = 0; pair < call.num_sequences * call.num_kv_heads; ++pair) {
        const std::size_t b = pair / call.num_kv_heads, h = pair % call.num_kv_heads;
        for (std::int64_t t = call.begins[b]; t < call.begins[b + 1]; ++t) {
            const std::int64_t position = call.past_lens[b] + t - call.begins[b];
            const std::int64_t block = position / static_cast<std::int64_t>(call.layout.block_size);
            if (std::uint8_t* place = block_of(call, pair, block)) {
                const std::size_t row = static_cast<std::size_t>(t) * call.num_kv_heads + h;
                kernels.store(call.layout, place, static_cast<std::size_t>(position) % call.layout.block_size,
                              call.key + row * call.layout.key_dim, call.value + row * call.layout.value_dim);
            }
        }
    }
    for (const Task& task : plan.tasks) {
        const std::size_t scratch = attend_scratch(call.layout);
        void* aligned = std::aligned_alloc(64, (scratch + 63) / 64 * 64);
        std::vector<float> states(task.rows.count * stride, 0.0f);
        for (std::size_t r = 0; r < task.rows.count; ++r) {
            states[r * stride + call.layout.value_dim] = nothing_seen;
        }
        kernels.prepare(call.layout, task.rows, 0.1f, aligned);
        std::vector<Entry> entries;
        for (std::size_t i = task.first_block; i < task.last_block; ++i) {
            entries.push_back(entry_of(call, plan, task, i));
        }
        entries.push_back(entries.back());
        kernels.attend(call.layout, pattern_of(call, task), task.rows, entries.data(), entries.size() - 1,
                       states.data(), aligned);
        std::free(aligned);
        for (std::size_t r = 0; r < task.rows.count; ++r) {
            const float sum = states[r * stride + call.layout.value_dim + 1];
            for (std::size_t c = 0; c < call.layout.value_dim; ++c) {
                all.push_back(states[r * stride + c] / sum);
            }
        }
    }
    return all;
}

bool are_near(const std::vector<float>& got, const std::vector<float>& wanted, float bound) {
    if (got.size() != wanted.size()) {
        return false;
    }
    for (std::size_t i = 0; i < got.size(); ++i) {
        if (std::isnan(got[i]) != std::isnan(wanted[i]) || std::fabs(got[i] - wanted[i]) > bound) {
            return false;
        }
    }
    return true;
}

}  // namespace

int main(int, char** arguments) {
    randomness.seed(static_cast<std::uint32_t>(std::atoi(arguments[1])));
    const edge::CpuFeatures cpu = edge::cpu_features();
    struct Unit {
        const char* name;
        bool is_there;
        const Kernels* kernels;
    };
    const Unit units[] = {{"avx2", cpu.avx2, &kernels_avx2},
                          {"avx2vnni", cpu.avx2, &kernels_avx2vnni},
                          {"avx512", cpu.avx512_vnni, &kernels_avx512}};
    for (int round = 0; round < std::atoi(arguments[2]); ++round) {
        const Case made;
        const std::vector<float> wanted = run(made, kernels_ref);
        for (const Unit& unit : units) {
            if (unit.is_there && !are_near(run(made, *unit.kernels), wanted, 0.02f)) {
                std::printf("round %d: %s differs from the reference\n", round, unit.name);
                return 1;
            }
        }
    }
    return 0;
}
