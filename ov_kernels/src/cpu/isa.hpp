// Which instruction set the ops use.

#pragma once

namespace edge {

enum class Isa { ref, avx2, avx2vnni, avx512 };

// Sets the best that CPU and system support, or the one that EDGE_KERNELS_ISA names (asked at each call). False: this
// machine has none of that name.
bool choose_isa(Isa& chosen);

// The name of what is chosen, as EDGE_KERNELS_ISA has it; `none` where this machine lacks it.
const char* isa_name();

}  // namespace edge
