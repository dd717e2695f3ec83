// bfloat16: the upper half of a float.
#pragma once

#include <cstdint>
#include <cstring>

// Of a template that is compiled for each instruction set: it must be part of its caller.
#define LLMCTL_INLINE __attribute__((always_inline)) inline
#define LLMCTL_INLINED __attribute__((always_inline))  // the same for a lambda

namespace llmctl {

struct Bf16 {
    uint16_t bits;
};

LLMCTL_INLINE float load(float x) { return x; }

LLMCTL_INLINE float load(Bf16 x) {
    const uint32_t bits = uint32_t{x.bits} << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

LLMCTL_INLINE void store(float& to, float value) { to = value; }

// To the nearest, ties to even; NaN stays NaN.
LLMCTL_INLINE void store(Bf16& to, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to.bits = static_cast<uint16_t>(value == value ? rounded : (bits >> 16) | 0x40);
}

}  // namespace llmctl
