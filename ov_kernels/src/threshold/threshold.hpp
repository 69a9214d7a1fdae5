// Threshold: forget small activations.
//
//   y[i] = 0      where |x[i]| <= threshold
//   y[i] = x[i]   elsewhere: NaN is not <= anything, so NaN stays NaN with its payload
//
// Both zeros become +0. `threshold` is finite and not negative. In the IR: type="Threshold" version="edge", one f32
// input of any shape, one f32 output of the same shape, attribute `threshold`.
//
// This header is included by every translation unit of the op and names nothing from OpenVINO or the STL.

#pragma once

#include <cstddef>

namespace edge {

// Computes y from x, `count` floats each, both dense.
//   Layout     one run of floats; the shape does not matter.
//   Alignment  that of a float: a model loaded from the cache hands out odd multiples of it.
//   Aliasing   y may be x; a partial overlap is not allowed.
//   Bound      exact: each output is the input's bits or +0, whatever the split into calls.
//   ISA        baseline of the compiler.
void threshold_ref(const float* x, float* y, std::size_t count, float threshold);

}  // namespace edge
