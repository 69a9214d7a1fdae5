// What instructions the CPU has and the operating system keeps: a register that the system does not save is not usable.
//
// Compiled without instruction-set flags, so asking cannot fault.

#pragma once

namespace edge {

struct CpuFeatures {
    bool avx2;         // AVX2, FMA and F16C
    bool avx_vnni;     // the same, and VNNI on 256 bits in VEX encoding
    bool avx512_vnni;  // AVX-512 F, BW, VL, DQ and VNNI
    bool amx_bf16;     // AMX tiles and their bf16 products; Linux may still refuse them to a process
};

CpuFeatures cpu_features();

}  // namespace edge
