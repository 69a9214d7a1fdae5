// The OpenVINO side of CatsMlp: types, shapes, threads and scratch memory. The arithmetic is in the other files.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "cats_mlp/cats_mlp.hpp"
#include "cpu/isa.hpp"
#include "cpu/parallel.hpp"
#include "openvino/core/op_extension.hpp"
#include "openvino/op/constant.hpp"
#include "openvino/op/op.hpp"
#include "ov_extension.hpp"

namespace edge {
namespace cats_mlp {
namespace {

// Neurons are shared out in ranges, each with sums of its own, added in order: the result does not depend on threads. A
// range is a 16th of what is left, so that threads end together on many cores and on cores of two speeds; one under 256
// neurons would cost more to add up than to compute.
constexpr std::size_t shares = 16;
constexpr std::size_t least_range = 2 * block;

// Where each range begins, and where the last one ends.
std::vector<std::size_t> ranges_of(std::size_t ffn) {
    std::vector<std::size_t> bounds{0};
    bounds.reserve(64);
    while (bounds.back() < ffn) {
        const std::size_t left = ffn - bounds.back(), size = ceil_div(left, shares * block) * block;
        bounds.push_back(bounds.back() + std::min(left, std::max(least_range, size)));
    }
    return bounds;
}

std::atomic<std::uint64_t> bytes_read{0};

std::size_t bytes_of_blocks(std::size_t rows, std::size_t blocks, int digits) {
    return rows * blocks * block * static_cast<std::size_t>(digits == 0 ? 4 : digits);
}

std::size_t floats_of_blocks(std::size_t rows, std::size_t blocks, int digits) {
    return Scratch::floats_of<std::uint8_t>(bytes_of_blocks(rows, blocks, digits)) +
           3 * Scratch::floats_of<float>(rows * blocks);
}

// Tokens as blocks of 128 columns.
Tokens take_blocks(Scratch& scratch, std::size_t rows, std::size_t blocks, int digits) {
    Tokens tokens{};
    tokens.rows = rows;
    tokens.values = scratch.take<std::uint8_t>(bytes_of_blocks(rows, blocks, digits));
    tokens.scale = scratch.take<float>(rows * blocks);
    tokens.offset = scratch.take<std::int32_t>(rows * blocks);
    tokens.sum = scratch.take<float>(rows * blocks);
    return tokens;
}

// Skips weights of dead neurons, for up to 8 tokens.
void decode_rows(const Kernels& k, const Weights& w, const Thresholds& thresholds, const float* x, std::size_t rows,
                 int digits, float* y) {
    const std::vector<std::size_t> bounds = ranges_of(w.ffn);
    const std::size_t ranges = bounds.size() - 1;
    const std::size_t stride = rows * sums_stride(w), threads = num_threads();
    const std::size_t part = Scratch::floats_of<float>(decode_scratch(w, rows, bounds[1]));
    Scratch scratch(Scratch::floats_of<std::uint8_t>(rows * token_bytes(w)) +
                    3 * Scratch::floats_of<float>(rows * token_lanes(w)) + 16 +
                    floats_of_blocks(rows, w.columns / block, digits) + threads * part + ranges * stride);
    Tokens tokens{};
    tokens.rows = rows;
    tokens.values = scratch.take<std::uint8_t>(rows * token_bytes(w));
    tokens.scale = scratch.take<float>(rows * token_lanes(w));
    tokens.offset = scratch.take<std::int32_t>(rows * token_lanes(w));
    tokens.sum = scratch.take<float>(rows * token_lanes(w));
    tokens.total = scratch.take<float>(rows);
    Tokens blocks = take_blocks(scratch, rows, w.columns / block, digits);
    float* own = scratch.take<float>(threads * part);
    float* sums = scratch.take<float>(ranges * stride);
    k.prepare(w, x, digits, tokens);
    k.prepare_blocks(w, x, digits, blocks);
    share_out(ranges, threads, [&](std::size_t range, std::size_t thread) {
        std::fill_n(sums + range * stride, stride, 0.0f);
        bytes_read += k.decode(w, thresholds, tokens, blocks, digits, bounds[range], bounds[range + 1],
                               sums + range * stride, own + thread * part);
    });
    share_out(ceil_div(w.hidden, 1024), threads, [&](std::size_t task, std::size_t) {
        k.finish(w, sums, ranges, rows, task * 1024, std::min(w.hidden, task * 1024 + 1024), y);
    });
}

// Reads all weights: for any tokens if they are in tiles, else for more than 8.
void run_blocks(const Kernels& k, const Weights& w, const Thresholds& thresholds, const float* x, std::size_t rows,
                int digits, float* y) {
    const std::size_t chunks = ceil_div(w.ffn, block), blocks = w.columns / block;
    const std::size_t step = w.is_tiled && rows <= max_unpacked_rows ? tile_rows : block;
    const std::size_t threads = num_threads(), part = Scratch::floats_of<float>(block_scratch(rows));
    Scratch scratch(floats_of_blocks(rows, blocks, digits) + floats_of_blocks(rows, chunks, digits) + threads * part);
    Tokens tokens = take_blocks(scratch, rows, blocks, digits), hidden = take_blocks(scratch, rows, chunks, digits);
    float* own = scratch.take<float>(threads * part);
    k.prepare_blocks(w, x, digits, tokens);
    share_out(chunks, threads, [&](std::size_t chunk, std::size_t thread) {
        k.hidden(w, thresholds, tokens, digits, chunk * block, hidden, own + thread * part);
    });
    share_out(ceil_div(w.hidden, step), threads, [&](std::size_t task, std::size_t thread) {
        k.output(w, hidden, digits, task * step, task * step + step, y, own + thread * part);
    });
}

const Kernels* chosen_kernels() {
    const Kernels* k = nullptr;
    OPENVINO_ASSERT(choose_kernels(k), "EDGE_KERNELS_ISA names instructions that this machine does not have, expected ",
                    "avx512, avx2vnni, avx2 or ref");
    return k;
}

void run(const Weights& w, const Thresholds& thresholds, const float* x, std::size_t rows, bool exact, float* y) {
    const Kernels* k = chosen_kernels();
    if (k == nullptr) {
        std::vector<float> hidden(w.ffn);
        reference(w, thresholds, x, rows, y, hidden.data());
        return;
    }
    exact = exact || w.format == Format::bf16;
    const std::size_t few = w.is_tiled ? max_unpacked_rows : max_decode_rows;
    while (rows > 0) {
        const bool is_few = exact || rows <= few;
        const std::size_t count = std::min(rows, is_few ? few : max_prefill_rows);
        const int digits = exact ? 0 : count <= max_rows_of_two_digits ? 2 : 1;
        if (is_few && !w.is_tiled) {
            decode_rows(*k, w, thresholds, x, count, digits, y);
        } else {
            run_blocks(*k, w, thresholds, x, count, digits, y);
            bytes_read += is_few ? tiled_bytes(w) : 0;
        }
        x += count * w.hidden;
        y += count * w.hidden;
        rows -= count;
    }
}

class CatsMlp : public ov::op::Op {
public:
    OPENVINO_OP("CatsMlp", "edge");

    CatsMlp() = default;

    CatsMlp(const ov::OutputVector& inputs, bool exact) : Op(inputs), m_exact(exact) {
        constructor_validate_and_infer_types();
    }

    void validate_and_infer_types() override {
        NODE_VALIDATION_CHECK(this, get_input_size() == 3, "CatsMlp got ", get_input_size(), " inputs, expected 3");
        check_type(0, ov::element::f32);
        check_type(1, ov::element::u8);
        check_type(2, ov::element::f32);
        // All that can be wrong is found here: on one thread the plugin loses what evaluate() throws, and returns what
        // the output held before.
        chosen_kernels();
        const auto shape = get_input_partial_shape(0);
        if (const auto blob = constant(1)) {
            const Weights weights = parsed(blob->get_data_ptr<std::uint8_t>(), blob->get_byte_size());
            check_shape(shape, weights);
        }
        set_output_type(0, ov::element::f32, shape);
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        check_new_args_count(this, inputs);
        return std::make_shared<CatsMlp>(inputs, m_exact);
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("exact", m_exact);
        return true;
    }

    bool has_evaluate() const override { return get_input_element_type(0) == ov::element::f32; }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        const Weights weights = parsed(inputs[1].data<const std::uint8_t>(), inputs[1].get_byte_size());
        const auto shape = inputs[0].get_shape();
        const Thresholds thresholds{inputs[2].data<const float>(), inputs[2].get_size()};
        OPENVINO_ASSERT(!shape.empty() && shape.back() == weights.hidden, "CatsMlp got an input of shape ", shape,
                        ", expected a last axis of ", weights.hidden);
        check_thresholds(thresholds.count, weights);
        outputs[0].set_shape(shape);
        run(weights, thresholds, inputs[0].data<const float>(), inputs[0].get_size() / weights.hidden, m_exact,
            outputs[0].data<float>());
        return true;
    }

private:
    std::shared_ptr<ov::op::v0::Constant> constant(std::size_t input) const {
        return ov::as_type_ptr<ov::op::v0::Constant>(get_input_node_shared_ptr(input));
    }

    void check_type(std::size_t input, ov::element::Type expected) const {
        const auto type = get_input_element_type(input);
        NODE_VALIDATION_CHECK(this, type == expected || type.is_dynamic(), "CatsMlp got input ", input, " of type ",
                              type, ", expected ", expected);
    }

    void check_shape(const ov::PartialShape& shape, const Weights& weights) const {
        if (shape.rank().is_static()) {
            const auto rank = shape.rank().get_length();
            NODE_VALIDATION_CHECK(this, rank > 0 && shape[rank - 1].compatible(ov::Dimension(weights.hidden)),
                                  "CatsMlp got an input of shape ", shape, ", expected a last axis of ",
                                  weights.hidden);
        }
        if (get_input_partial_shape(2).is_static()) {
            check_thresholds(ov::shape_size(get_input_shape(2)), weights);
        }
    }

    static void check_thresholds(std::size_t count, const Weights& weights) {
        OPENVINO_ASSERT(count == 1 || count == weights.ffn, "CatsMlp got ", count, " thresholds, expected 1 or ",
                        weights.ffn);
    }

    static Weights parsed(const std::uint8_t* blob, std::size_t size) {
        Weights weights{};
        const char* wrong = parse(blob, size, weights);
        OPENVINO_ASSERT(wrong == nullptr, "CatsMlp cannot use its ", size, " bytes of weights: ", wrong);
        return weights;
    }

    bool m_exact = false;
};

}  // namespace
}  // namespace cats_mlp

ov::Extension::Ptr make_cats_mlp_extension() { return std::make_shared<ov::OpExtension<cats_mlp::CatsMlp>>(); }

}  // namespace edge

// For benchmarks: bytes of weights that CatsMlp read in decoding, since the library was loaded.
extern "C" EDGE_EXPORT std::uint64_t edge_cats_mlp_bytes_read() { return edge::cats_mlp::bytes_read; }

// For `edge-run devices` and tests: the instruction set that the ops use.
extern "C" EDGE_EXPORT const char* edge_kernels_isa() { return edge::isa_name(); }
