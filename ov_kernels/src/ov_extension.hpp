// The ops of this library. Each op's _op.cpp defines its factory; the class itself stays private to that file.

#pragma once

#include "openvino/core/extension.hpp"

#if defined(_WIN32)
#    define EDGE_EXPORT __declspec(dllexport)
#else
#    define EDGE_EXPORT __attribute__((visibility("default")))
#endif

namespace edge {

ov::Extension::Ptr make_block_sparse_attention_extension();
ov::Extension::Ptr make_cats_mlp_extension();
ov::Extension::Ptr make_threshold_extension();

}  // namespace edge
