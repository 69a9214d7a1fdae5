// Which kernels run.

#include "cats_mlp/cats_mlp.hpp"
#include "cpu/isa.hpp"

namespace edge {
namespace cats_mlp {

bool choose_kernels(const Kernels*& chosen) {
    Isa isa = Isa::ref;
    if (!choose_isa(isa)) {
        return false;
    }
    chosen = nullptr;
#if defined(__x86_64__) || defined(_M_X64)
    chosen = isa == Isa::avx512     ? &kernels_avx512
             : isa == Isa::avx2vnni ? &kernels_avx2vnni
             : isa == Isa::avx2     ? &kernels_avx2
                                    : nullptr;
#endif
    return true;
}

}  // namespace cats_mlp
}  // namespace edge
