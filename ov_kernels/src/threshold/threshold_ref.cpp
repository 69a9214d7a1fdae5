#include "threshold/threshold.hpp"

namespace edge {

void threshold_ref(const float* x, float* y, std::size_t count, float threshold) {
    for (std::size_t i = 0; i < count; ++i) {
        const float value = x[i];
        const bool is_small = value <= threshold && value >= -threshold;
        y[i] = is_small ? 0.0f : value;
    }
}

}  // namespace edge
