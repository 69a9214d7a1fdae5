// The OpenVINO side of Threshold: types, shapes, attributes, threads. The arithmetic is in threshold_ref.cpp.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <memory>

#include "openvino/core/op_extension.hpp"
#include "openvino/core/parallel.hpp"
#include "openvino/op/op.hpp"
#include "ov_extension.hpp"
#include "threshold/threshold.hpp"

namespace edge {
namespace {

// 64 KiB of input a task: one token's activations stay on one core, a prompt's are shared.
constexpr std::size_t task_size = 16384;

class Threshold : public ov::op::Op {
public:
    OPENVINO_OP("Threshold", "edge");

    Threshold() = default;

    Threshold(const ov::Output<ov::Node>& x, float threshold) : Op({x}), m_threshold(threshold) {
        constructor_validate_and_infer_types();
    }

    void validate_and_infer_types() override {
        const auto type = get_input_element_type(0);
        NODE_VALIDATION_CHECK(this, type == ov::element::f32 || type.is_dynamic(), "Threshold got an input of type ",
                              type, ", expected f32");
        NODE_VALIDATION_CHECK(this, std::isfinite(m_threshold) && m_threshold >= 0.0f,
                              "Threshold got the attribute threshold = ", m_threshold,
                              ", expected a finite number of at least 0");
        set_output_type(0, ov::element::f32, get_input_partial_shape(0));
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        check_new_args_count(this, inputs);
        return std::make_shared<Threshold>(inputs.at(0), m_threshold);
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("threshold", m_threshold);
        return true;
    }

    bool has_evaluate() const override { return get_input_element_type(0) == ov::element::f32; }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        outputs[0].set_shape(inputs[0].get_shape());
        const float* x = inputs[0].data<const float>();
        float* y = outputs[0].data<float>();
        const std::size_t count = inputs[0].get_size();
        ov::parallel_for((count + task_size - 1) / task_size, [&](std::size_t task) {
            const std::size_t begin = task * task_size;
            threshold_ref(x + begin, y + begin, std::min(task_size, count - begin), m_threshold);
        });
        return true;
    }

private:
    float m_threshold = 0.0f;
};

}  // namespace

ov::Extension::Ptr make_threshold_extension() { return std::make_shared<ov::OpExtension<Threshold>>(); }

}  // namespace edge
