// The registry: what `ov::Core::add_extension` finds in this library.

#include "ov_extension.hpp"

#include <vector>

#include "cpu/cpu_features.hpp"

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>({edge::make_block_sparse_attention_extension(),
                                                            edge::make_cats_mlp_extension(),
                                                            edge::make_threshold_extension()}));

// For Python, which has no CPUID of its own.
extern "C" EDGE_EXPORT int edge_cpu_has_amx() { return edge::cpu_features().amx_bf16 ? 1 : 0; }
