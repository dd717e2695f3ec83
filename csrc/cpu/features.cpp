// Which instruction sets the processor has and the operating system saves the registers of.
#include "llmctl.h"

#if defined(__x86_64__)
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

struct Leaf {
    uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Leaf cpuid(uint32_t leaf, uint32_t subleaf = 0) {
    Leaf r;
    __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
    return r;
}

// Linux gives a process the tile registers when it asks; ARCH_REQ_XCOMP_PERM with XTILEDATA, asm/prctl.h.
bool may_use_tiles() {
#ifdef __linux__
    static const bool granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return granted;
#else
    return false;
#endif
}

bool has(uint32_t word, int bit) { return (word >> bit) & 1; }

uint64_t saved_registers() {
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t{high} << 32) | low;
}

}  // namespace

// Bit numbers: Intel SDM volume 2, CPUID leaves 1 and 7; XCR0 in volume 1, chapter 13.
uint64_t llmctl_cpu_features(void) {
    const Leaf basic = cpuid(1), more = cpuid(7), extra = cpuid(7, 1);
    if (!has(basic.ecx, 27)) return 0;  // OSXSAVE
    const uint64_t saved = saved_registers();
    const bool avx_saved = (saved & 0x6) == 0x6, avx512_saved = (saved & 0xe6) == 0xe6;
    const bool amx_saved = (saved & 0x60000) == 0x60000 && may_use_tiles();
    uint64_t features = 0;
    if (avx_saved && has(basic.ecx, 12) && has(basic.ecx, 29) && has(more.ebx, 5)) {
        features |= LLMCTL_CPU_AVX2;
        if (has(extra.eax, 4)) features |= LLMCTL_CPU_AVX_VNNI;
    }
    if (avx512_saved && has(more.ebx, 16) && has(more.ebx, 17) && has(more.ebx, 30) && has(more.ebx, 31)) {
        features |= LLMCTL_CPU_AVX512;
        if (has(more.ecx, 11)) features |= LLMCTL_CPU_AVX512_VNNI;
        if (has(extra.eax, 5)) features |= LLMCTL_CPU_AVX512_BF16;
    }
    if (amx_saved && has(more.edx, 24)) {
        if (has(more.edx, 25)) features |= LLMCTL_CPU_AMX_INT8;
        if (has(more.edx, 22)) features |= LLMCTL_CPU_AMX_BF16;
    }
    return features;
}

#elif defined(__aarch64__)

uint64_t llmctl_cpu_features(void) { return LLMCTL_CPU_NEON; }  // part of the base architecture

#else

uint64_t llmctl_cpu_features(void) { return 0; }

#endif
