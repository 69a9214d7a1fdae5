// The registry: what `ov::Core::add_extension` finds in this library.

#include "ov_extension.hpp"

#include <vector>

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>({edge::make_block_sparse_attention_extension(),
                                                            edge::make_cats_mlp_extension(),
                                                            edge::make_threshold_extension()}));
