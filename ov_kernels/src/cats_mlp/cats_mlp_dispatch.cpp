// Which kernels run: the best that CPU and operating system support, unless EDGE_KERNELS_ISA names others.

#include <cstdlib>
#include <cstring>

#include "cats_mlp/cats_mlp.hpp"
#include "cpu/cpu_features.hpp"

namespace edge {
namespace cats_mlp {
namespace {

struct Choice {
    const char* name;
    bool is_supported;
    const Kernels* kernels;
};

}  // namespace

bool choose_kernels(const Kernels*& chosen) {
    static const CpuFeatures cpu = cpu_features();
    (void)cpu;  // unused where the CPU is no x86
    const Choice choices[] = {
#if defined(__x86_64__) || defined(_M_X64)
        {"avx512", cpu.avx512_vnni, &kernels_avx512},
        {"avx2vnni", cpu.avx_vnni, &kernels_avx2vnni},
        {"avx2", cpu.avx2, &kernels_avx2},
#endif
        {"ref", true, nullptr},
    };
    const char* wanted = std::getenv("EDGE_KERNELS_ISA");
    for (const Choice& choice : choices) {
        if (choice.is_supported && (wanted == nullptr || std::strcmp(wanted, choice.name) == 0)) {
            chosen = choice.kernels;
            return true;
        }
    }
    return false;
}

}  // namespace cats_mlp
}  // namespace edge
