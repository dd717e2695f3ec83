// Which of the compiled instruction sets is used.
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

#include "boundary.h"
#include "cpu/kernels.h"
#include "llmctl.h"

namespace llmctl {
namespace {

struct Isa {
    const char* name;
    uint64_t needs;  // LLMCTL_CPU_*
    const Kernels* kernels;
};

constexpr uint64_t vnni = LLMCTL_CPU_AVX2 | LLMCTL_CPU_AVX512 | LLMCTL_CPU_AVX512_VNNI;

// From the least to the best.
const Isa isas[] = {
    {"scalar", 0, &scalar_kernels},
#ifdef __x86_64__
    {"avx2", LLMCTL_CPU_AVX2, &avx2_kernels},
    {"avx512", LLMCTL_CPU_AVX2 | LLMCTL_CPU_AVX512, &avx512_kernels},
    {"avx512_vnni", vnni, &avx512_vnni_kernels},
    {"avx512_bf16", vnni | LLMCTL_CPU_AVX512_BF16, &avx512_bf16_kernels},
    {"amx", vnni | LLMCTL_CPU_AVX512_BF16 | LLMCTL_CPU_AMX_INT8 | LLMCTL_CPU_AMX_BF16, &amx_kernels},
#endif
};

bool runs_here(const Isa& isa) { return (llmctl_cpu_features() & isa.needs) == isa.needs; }

const Isa* best() {
    const Isa* found = isas;
    for (const Isa& isa : isas) {
        if (runs_here(isa)) found = &isa;
    }
    return found;
}

std::atomic<const Isa*> chosen{nullptr};

const Isa& current() {
    if (const Isa* isa = chosen) return *isa;
    static const Isa* const found = best();
    return *found;
}

const Isa* find(const std::string& name) {
    std::string known;
    for (const Isa& isa : isas) {
        if (name == isa.name && runs_here(isa)) return &isa;
        if (name == isa.name) {
            throw std::invalid_argument("this processor runs kernels up to " + std::string(best()->name));
        }
        known += known.empty() ? isa.name : std::string(", ") + isa.name;
    }
    throw std::invalid_argument("the instruction set " + name + " is unknown here; expected one of " + known);
}

}  // namespace

const Kernels& kernels() { return *current().kernels; }

}  // namespace llmctl

int llmctl_set_isa(const char* name) {
    return llmctl::guarded([&] { llmctl::chosen = name == nullptr ? nullptr : llmctl::find(name); });
}

const char* llmctl_isa(void) { return llmctl::current().name; }
