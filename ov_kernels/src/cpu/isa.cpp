#include "cpu/isa.hpp"

#include <cstdlib>
#include <cstring>

#include "cpu/cpu_features.hpp"

namespace edge {
namespace {

struct Choice {
    const char* name;
    bool is_supported;
    Isa isa;
};

const Choice* choice() {
    static const CpuFeatures cpu = cpu_features();
    (void)cpu;  // unused where the CPU is no x86
    static const Choice choices[] = {
#if defined(__x86_64__) || defined(_M_X64)
        {"avx512", cpu.avx512_vnni, Isa::avx512},
        {"avx2vnni", cpu.avx_vnni, Isa::avx2vnni},
        {"avx2", cpu.avx2, Isa::avx2},
#endif
        {"ref", true, Isa::ref},
    };
    const char* wanted = std::getenv("EDGE_KERNELS_ISA");
    for (const Choice& each : choices) {
        if (each.is_supported && (wanted == nullptr || std::strcmp(wanted, each.name) == 0)) {
            return &each;
        }
    }
    return nullptr;
}

}  // namespace

bool choose_isa(Isa& chosen) {
    const Choice* made = choice();
    if (made != nullptr) {
        chosen = made->isa;
    }
    return made != nullptr;
}

const char* isa_name() {
    const Choice* made = choice();
    return made != nullptr ? made->name : "none";
}

}  // namespace edge
