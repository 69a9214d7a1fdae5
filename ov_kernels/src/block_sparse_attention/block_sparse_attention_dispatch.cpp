// Which kernels run, and the memory they need.

#include "block_sparse_attention/block_sparse_attention.hpp"
#include "cpu/isa.hpp"

namespace edge {
namespace attention {

bool choose_kernels(const Kernels*& chosen) {
    Isa isa = Isa::ref;
    if (!choose_isa(isa)) {
        return false;
    }
    chosen = &kernels_ref;
#if defined(__x86_64__) || defined(_M_X64)
    chosen = isa == Isa::avx512     ? &kernels_avx512
             : isa == Isa::avx2vnni ? &kernels_avx2vnni
             : isa == Isa::avx2     ? &kernels_avx2
                                    : &kernels_ref;
#endif
    return true;
}

// See attend.inl: queries, scores, probabilities, one unpacked block, and some numbers for each row.
std::size_t attend_scratch(const Layout& layout) {
    const std::size_t queries = max_rows * layout.key_dim * 4, scores = max_rows * layout.block_size * 4;
    const std::size_t block = layout.block_size * (layout.key_dim + layout.value_dim) * 4;
    return queries + 2 * scores + block + 16 * max_rows * sizeof(float);
}

}  // namespace attention
}  // namespace edge
