// The OpenVINO side of BlockSparseAttention: types, shapes, which blocks are read for whom, and threads.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "block_sparse_attention/block_sparse_attention.hpp"
#include "block_sparse_attention/plan.hpp"
#include "cpu/parallel.hpp"
#include "openvino/core/op_extension.hpp"
#include "openvino/op/op.hpp"
#include "ov_extension.hpp"

namespace edge {
namespace attention {
namespace {

std::atomic<std::uint64_t> bytes_read{0};

bool parse_format(const std::string& name, Format& format) {
    format = name == "f32" ? Format::f32 : name == "bf16" ? Format::bf16 : Format::i8;
    return name == "f32" || name == "bf16" || name == "u8";
}

// y = sums / sum, for one row of one range.
void finish(const Layout& layout, const float* state, float* y) {
    const float sum = state[layout.value_dim + 1];
    for (std::size_t c = 0; c < layout.value_dim; ++c) {
        y[c] = state[c] / sum;
    }
}

// The same for a row whose blocks were shared out in `count` ranges, added in order.
void merge(const Layout& layout, const float* states, std::size_t count, std::size_t step, float* y) {
    float top = nothing_seen, total = 0.0f;
    for (std::size_t i = 0; i < count; ++i) {
        top = std::max(top, states[i * step + layout.value_dim]);
    }
    std::fill_n(y, layout.value_dim, 0.0f);
    for (std::size_t i = 0; i < count; ++i) {
        const float* state = states + i * step;
        const float factor = std::exp(state[layout.value_dim] - top);
        total += factor * state[layout.value_dim + 1];
        for (std::size_t c = 0; c < layout.value_dim; ++c) {
            y[c] += factor * state[c];
        }
    }
    for (std::size_t c = 0; c < layout.value_dim; ++c) {
        y[c] /= total;
    }
}

class BlockSparseAttention : public ov::op::Op {
public:
    OPENVINO_OP("BlockSparseAttention", "edge");

    BlockSparseAttention() = default;

    void validate_and_infer_types() override {
        NODE_VALIDATION_CHECK(this, get_input_size() == 7, "BlockSparseAttention got ", get_input_size(),
                              " inputs, expected 7");
        for (std::size_t i = 0; i < 7; ++i) {
            check_type(i, i < 3 ? ov::element::f32 : i == 3 ? ov::element::u8 : ov::element::i32);
        }
        // All that can be wrong is found here: on one thread the plugin loses what evaluate() throws, and returns what
        // the output held before.
        const Kernels* kernels = nullptr;
        OPENVINO_ASSERT(choose_kernels(kernels),
                        "EDGE_KERNELS_ISA names instructions that this machine does not have, expected avx512, "
                        "avx2vnni, avx2 or ref");
        if (m_num_heads != 0) {
            check_attributes();
        }
        const auto query = get_input_partial_shape(0), value = get_input_partial_shape(2);
        ov::Dimension width;
        if (m_num_heads != 0 && known_width(1) && known_width(2) && known_width(0)) {
            const Layout layout = check_layout(width_of(0), width_of(1), width_of(2));
            const auto cache = get_input_partial_shape(3);
            NODE_VALIDATION_CHECK(
                this, cache.rank().is_dynamic() || (cache.size() == 2 && cache[1].compatible(block_bytes(layout))),
                "BlockSparseAttention got a cache of shape ", cache, ", expected blocks of ", block_bytes(layout),
                " bytes");
            width = ov::Dimension(static_cast<std::int64_t>(layout.value_dim) * m_num_heads);
        }
        set_output_type(0, ov::element::f32,
                        {query.rank().is_static() && query.size() == 2 ? query[0] : ov::Dimension::dynamic(), width});
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        check_new_args_count(this, inputs);
        auto copy = std::make_shared<BlockSparseAttention>();
        copy->m_num_heads = m_num_heads;
        copy->m_num_kv_heads = m_num_kv_heads;
        copy->m_block_size = m_block_size;
        copy->m_scale = m_scale;
        copy->m_kv_type = m_kv_type;
        copy->m_window = m_window;
        copy->m_by_tokens = m_by_tokens;
        copy->m_sink = m_sink;
        copy->m_strides = m_strides;
        copy->m_offsets = m_offsets;
        copy->set_arguments(inputs);
        copy->validate_and_infer_types();
        return copy;
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("num_heads", m_num_heads);
        visitor.on_attribute("num_kv_heads", m_num_kv_heads);
        visitor.on_attribute("block_size", m_block_size);
        visitor.on_attribute("scale", m_scale);
        visitor.on_attribute("kv_type", m_kv_type);
        visitor.on_attribute("window", m_window);
        visitor.on_attribute("by_tokens", m_by_tokens);
        visitor.on_attribute("sink", m_sink);
        visitor.on_attribute("strides", m_strides);
        visitor.on_attribute("offsets", m_offsets);
        return true;
    }

    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        const auto shape = inputs[0].get_shape(), table = inputs[6].get_shape();
        const Layout layout = check_layout(shape.at(1), inputs[1].get_shape().at(1), inputs[2].get_shape().at(1));
        const std::size_t heads = static_cast<std::size_t>(m_num_heads), sequences = inputs[4].get_size();
        OPENVINO_ASSERT(table.size() == 3 && table[0] == sequences && table[1] == kv_heads() &&
                            inputs[5].get_size() == sequences + 1 && inputs[3].get_shape().at(1) == block_bytes(layout),
                        "BlockSparseAttention got a block table of shape ", table, " for ", sequences,
                        " sequences and a cache of shape ", inputs[3].get_shape());
        outputs[0].set_shape({shape[0], heads * layout.value_dim});
        Call call{};
        call.layout = layout;
        call.num_heads = heads;
        call.num_kv_heads = kv_heads();
        call.num_tokens = shape[0];
        call.num_sequences = sequences;
        call.query = inputs[0].data<const float>();
        call.key = inputs[1].data<const float>();
        call.value = inputs[2].data<const float>();
        // The plugin hands over the caller's own memory, which PagedAttention too is written into.
        call.cache = const_cast<std::uint8_t*>(static_cast<const std::uint8_t*>(inputs[3].data()));
        call.num_blocks = inputs[3].get_shape()[0];
        call.past_lens = inputs[4].data<const std::int32_t>();
        call.begins = inputs[5].data<const std::int32_t>();
        call.table = inputs[6].data<const std::int32_t>();
        call.table_width = table[2];
        call.pattern = {m_window, m_by_tokens, m_sink, m_strides.data(), m_offsets.data()};
        run(call, outputs[0].data<float>());
        return true;
    }

private:
    std::size_t kv_heads() const { return static_cast<std::size_t>(m_num_kv_heads); }

    bool known_width(std::size_t input) const {
        const auto shape = get_input_partial_shape(input);
        return shape.rank().is_static() && shape.size() == 2 && shape[1].is_static();
    }

    std::size_t width_of(std::size_t input) const {
        return static_cast<std::size_t>(get_input_partial_shape(input)[1].get_length());
    }

    void check_type(std::size_t input, ov::element::Type expected) const {
        const auto type = get_input_element_type(input);
        NODE_VALIDATION_CHECK(this, type == expected || type.is_dynamic(), "BlockSparseAttention got input ", input,
                              " of type ", type, ", expected ", expected);
    }

    void check_attributes() const {
        Format format;
        OPENVINO_ASSERT(parse_format(m_kv_type, format), "BlockSparseAttention got kv_type ", m_kv_type,
                        ", expected f32, bf16 or u8");
        OPENVINO_ASSERT(m_num_heads > 0 && m_num_kv_heads > 0 && m_num_heads % m_num_kv_heads == 0 &&
                            m_num_heads / m_num_kv_heads <= static_cast<std::int64_t>(max_rows),
                        "BlockSparseAttention got ", m_num_heads, " heads and ", m_num_kv_heads,
                        " KV heads, expected a multiple of at most 64");
        OPENVINO_ASSERT(m_block_size == 16 || m_block_size == 32 || m_block_size == 64 || m_block_size == 128,
                        "BlockSparseAttention got block_size ", m_block_size, ", expected 16, 32, 64 or 128");
        OPENVINO_ASSERT(std::isfinite(m_scale) && m_window >= -1 && m_window != 0 && m_sink >= 0,
                        "BlockSparseAttention got scale ", m_scale, ", window ", m_window, " and sink ", m_sink);
        const std::size_t heads = static_cast<std::size_t>(m_num_heads);
        OPENVINO_ASSERT(m_strides.size() == heads && m_offsets.size() == heads, "BlockSparseAttention got ",
                        m_strides.size(), " strides and ", m_offsets.size(), " offsets for ", heads, " heads");
        for (std::size_t h = 0; h < heads; ++h) {
            OPENVINO_ASSERT(m_strides[h] >= 0 && m_offsets[h] >= 0, "BlockSparseAttention got stride ", m_strides[h],
                            " and offset ", m_offsets[h], ", expected none below 0");
        }
    }

    Layout check_layout(std::size_t query, std::size_t key, std::size_t value) const {
        Layout layout{};
        parse_format(m_kv_type, layout.format);
        layout.block_size = static_cast<std::size_t>(m_block_size);
        layout.key_dim = key / kv_heads();
        layout.value_dim = value / kv_heads();
        const bool fits = key == layout.key_dim * kv_heads() && value == layout.value_dim * kv_heads() &&
                          query == layout.key_dim * static_cast<std::size_t>(m_num_heads);
        for (const std::size_t dim : {layout.key_dim, layout.value_dim}) {
            OPENVINO_ASSERT(fits && dim > 0 && dim % 16 == 0 && dim <= max_dim, "BlockSparseAttention got queries of ",
                            query, ", keys of ", key, " and values of ", value, " numbers for ", m_num_heads,
                            " heads and ", m_num_kv_heads, " KV heads, expected multiples of 16 up to 256 a head");
        }
        return layout;
    }

    void run(const Call& call, float* y) const {
        const Kernels* kernels = nullptr;
        OPENVINO_ASSERT(choose_kernels(kernels), "EDGE_KERNELS_ISA names what this machine does not have");
        const Plan plan = make_plan(call);
        if (!plan.is_valid) {
            std::fill_n(y, call.num_tokens * call.num_heads * call.layout.value_dim, NAN);
            return;
        }
        store(*kernels, call);
        const std::size_t threads = num_threads(), stride = state_stride(call.layout);
        const std::size_t part = Scratch::floats_of<std::uint8_t>(attend_scratch(call.layout));
        const std::size_t own = Scratch::floats_of<float>(max_rows * stride);
        Scratch scratch(threads * (part + own) + Scratch::floats_of<float>(plan.num_states * stride));
        float* parts = scratch.take<float>(threads * part);
        float* owned = scratch.take<float>(threads * own);
        float* states = scratch.take<float>(plan.num_states * stride);
        share_out(plan.tasks.size(), threads, [&](std::size_t index, std::size_t thread) {
            const Task& task = plan.tasks[index];
            float* state = task.is_shared ? states + task.first_state * stride : owned + thread * own;
            attend(*kernels, call, plan, task, state, parts + thread * part);
            if (!task.is_shared) {
                for (std::size_t r = 0; r < task.rows.count; ++r) {
                    finish(call.layout, state + r * stride, y + output_at(call, task, r));
                }
            }
        });
        for (const Merge& each : plan.merges) {
            const Task& task = plan.tasks[each.first_task];
            for (std::size_t r = 0; r < task.rows.count; ++r) {
                merge(call.layout, states + (task.first_state + r) * stride, each.num_tasks, task.rows.count * stride,
                      y + output_at(call, task, r));
            }
        }
    }

    // Tokens enter their blocks: serially where they are few, since waking a thread takes longer.
    void store(const Kernels& kernels, const Call& call) const {
        const std::size_t pairs = call.num_sequences * call.num_kv_heads;
        const auto one = [&](std::size_t pair, std::size_t) {
            const std::size_t b = pair / call.num_kv_heads, h = pair % call.num_kv_heads;
            for (std::int64_t t = call.begins[b]; t < call.begins[b + 1]; ++t) {
                const std::int64_t position = call.past_lens[b] + t - call.begins[b];
                std::uint8_t* block = block_of(call, pair, position / m_block_size);
                if (block != nullptr) {
                    const std::size_t row = static_cast<std::size_t>(t) * call.num_kv_heads + h;
                    kernels.store(call.layout, block, static_cast<std::size_t>(position % m_block_size),
                                  call.key + row * call.layout.key_dim, call.value + row * call.layout.value_dim);
                }
            }
        };
        if (call.num_tokens <= 8) {
            for (std::size_t pair = 0; pair < pairs; ++pair) {
                one(pair, 0);
            }
        } else {
            share_out(pairs, num_threads(), one);
        }
    }

    void attend(const Kernels& kernels, const Call& call, const Plan& plan, const Task& task, float* state,
                void* scratch) const {
        const std::size_t stride = state_stride(call.layout);
        for (std::size_t r = 0; r < task.rows.count; ++r) {
            std::fill_n(state + r * stride, stride, 0.0f);
            state[r * stride + call.layout.value_dim] = nothing_seen;
        }
        const Pattern pattern = pattern_of(call, task);
        kernels.prepare(call.layout, task.rows, m_scale, scratch);
        Entry entries[range_blocks + 1];
        for (std::size_t first = task.first_block; first < task.last_block; first += range_blocks) {
            const std::size_t count = std::min(range_blocks, task.last_block - first);
            for (std::size_t i = 0; i < count; ++i) {
                entries[i] = entry_of(call, plan, task, first + i);
            }
            entries[count] = first + count < task.last_block ? entry_of(call, plan, task, first + count)
                                                             : entries[count - 1];
            kernels.attend(call.layout, pattern, task.rows, entries, count, state, scratch);
        }
        bytes_read += (task.last_block - task.first_block) * block_bytes(call.layout);
    }

    std::int64_t m_num_heads = 0, m_num_kv_heads = 0, m_block_size = 64, m_window = -1, m_sink = 0;
    float m_scale = 1.0f;
    std::string m_kv_type = "u8";
    bool m_by_tokens = false;
    std::vector<std::int64_t> m_strides, m_offsets;
};

}  // namespace
}  // namespace attention

ov::Extension::Ptr make_block_sparse_attention_extension() {
    return std::make_shared<ov::OpExtension<attention::BlockSparseAttention>>();
}

}  // namespace edge

// For benchmarks and tests: bytes of blocks that the op went through, since the library was loaded.
extern "C" EDGE_EXPORT std::uint64_t edge_attention_bytes_read() { return edge::attention::bytes_read; }

// Bytes of one block of keys and values of one KV head; 0 for a kv_type that the op does not have.
extern "C" EDGE_EXPORT std::uint64_t edge_attention_block_bytes(std::uint64_t block_size, std::uint64_t key_dim,
                                                                std::uint64_t value_dim, const char* kv_type) {
    edge::attention::Layout layout{};
    layout.block_size = block_size;
    layout.key_dim = key_dim;
    layout.value_dim = value_dim;
    return edge::attention::parse_format(kv_type, layout.format) ? edge::attention::block_bytes(layout) : 0;
}
