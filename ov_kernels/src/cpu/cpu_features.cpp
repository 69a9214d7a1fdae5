#include "cpu/cpu_features.hpp"

#include <cstdint>

#if defined(_M_X64)
#    include <intrin.h>
#elif defined(__x86_64__)
#    include <cpuid.h>
#endif

namespace edge {

#if defined(__x86_64__) || defined(_M_X64)

namespace {

struct Registers {
    std::uint32_t a, b, c, d;
};

Registers cpuid(std::uint32_t leaf, std::uint32_t part) {
    Registers r{};
#    if defined(_M_X64)
    int values[4];
    __cpuid(values, 0);
    if (static_cast<std::uint32_t>(values[0]) < leaf) {  // else it would answer for the last leaf that it has
        return r;
    }
    __cpuidex(values, static_cast<int>(leaf), static_cast<int>(part));
    r = {static_cast<std::uint32_t>(values[0]), static_cast<std::uint32_t>(values[1]),
         static_cast<std::uint32_t>(values[2]), static_cast<std::uint32_t>(values[3])};
#    else
    __get_cpuid_count(leaf, part, &r.a, &r.b, &r.c, &r.d);
#    endif
    return r;
}

// XCR0: the registers that the operating system saves.
std::uint64_t saved_registers() {
#    if defined(_M_X64)
    return _xgetbv(0);
#    else
    std::uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low | (static_cast<std::uint64_t>(high) << 32);
#    endif
}

bool has(std::uint32_t word, int bit) { return (word >> bit & 1u) != 0; }

}  // namespace

CpuFeatures cpu_features() {
    CpuFeatures found{};
    const Registers basic = cpuid(1, 0);
    const bool has_xgetbv = has(basic.c, 27);
    const std::uint64_t saved = has_xgetbv ? saved_registers() : 0;
    const bool saves_ymm = (saved & 0x6) == 0x6;
    const bool saves_zmm = (saved & 0xE6) == 0xE6;
    const bool saves_tiles = (saved & 0x60000) == 0x60000;
    const Registers extended = cpuid(7, 0);
    found.avx2 = saves_ymm && has(extended.b, 5) && has(basic.c, 12) && has(basic.c, 29);
    found.avx_vnni = found.avx2 && extended.a >= 1 && has(cpuid(7, 1).a, 4);
    const bool has_512 = has(extended.b, 16) && has(extended.b, 17) && has(extended.b, 30) && has(extended.b, 31);
    found.avx512_vnni = found.avx2 && saves_zmm && has_512 && has(extended.c, 11);
    found.amx_bf16 = saves_tiles && has(extended.d, 22) && has(extended.d, 24);
    return found;
}

#else

CpuFeatures cpu_features() { return {}; }

#endif

}  // namespace edge
