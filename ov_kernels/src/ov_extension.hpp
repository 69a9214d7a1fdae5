// The ops of this library. Each op's _op.cpp defines its factory; the class itself stays private to that file.

#pragma once

#include "openvino/core/extension.hpp"

namespace edge {

ov::Extension::Ptr make_cats_mlp_extension();
ov::Extension::Ptr make_threshold_extension();

}  // namespace edge
