// CUDA's execution model on a CPU, as far as csrc/cuda uses it: the threads of a block are fibers that take turns, blocks run
// one after another. It checks what kernels compute, not how fast or in which order; compile with -DLLMCTL_WITH_CUDA.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __restrict__

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
enum { cudaDevAttrMultiProcessorCount, cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
    void* attrs = nullptr;
    unsigned numAttrs = 0;
};
inline const char* cudaGetErrorString(cudaError_t) { return "none"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) { return *value = 6, cudaSuccess; }
template <class F>
cudaError_t cudaFuncSetAttribute(F, int, int) {
    return cudaSuccess;
}

namespace emulation {

constexpr unsigned lanes = 32;
constexpr size_t stack_bytes = 64 << 10;

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool finished;
};

// Where threads of a group wait for each other, and what each brings.
struct Meeting {
    unsigned members = 0, arrived = 0, round = 0;
    unsigned char brought[2][lanes][64];
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Meeting> warps;
    Meeting all;
    ucontext_t scheduler;
    unsigned current = 0;
    std::function<void()> body;
    std::vector<unsigned char> shared;
};

inline Block* block = nullptr;

inline void yield() { swapcontext(&block->fibers[block->current].context, &block->scheduler); }

inline void meet(Meeting& meeting) {
    const unsigned round = meeting.round;
    if (++meeting.arrived == meeting.members) {
        meeting.arrived = 0;
        ++meeting.round;
        return;
    }
    while (meeting.round == round) yield();
}

inline void leave(Meeting& meeting) {
    if (--meeting.members && meeting.arrived == meeting.members) {
        meeting.arrived = 0;
        ++meeting.round;
    }
}

inline void enter() {
    block->body();
    const unsigned me = block->current;
    leave(block->all);
    leave(block->warps[me / lanes]);
    block->fibers[me].finished = true;
    yield();
}

// What all lanes of the warp bring, in order.
template <class T>
std::vector<T> exchange(const T& mine) {
    static_assert(sizeof(T) <= 64, "more than a meeting holds");
    Meeting& warp = block->warps[block->current / lanes];
    if (warp.members != lanes) std::abort();  // a collective of a warp whose lanes are not all there
    auto& slots = warp.brought[warp.round % 2];
    std::memcpy(slots[block->current % lanes], &mine, sizeof(T));
    meet(warp);
    std::vector<T> all(lanes);
    for (unsigned i = 0; i < lanes; ++i) std::memcpy(&all[i], slots[i], sizeof(T));
    return all;
}

}  // namespace emulation

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

inline void run(const cudaLaunchConfig_t& config, const std::function<void()>& body) {
    const unsigned n = config.blockDim.x;
    gridDim = config.gridDim, blockDim = config.blockDim;
    Block here;
    here.fibers.resize(n);
    here.warps.resize((n + lanes - 1) / lanes);
    here.shared.resize(config.dynamicSmemBytes + 128);
    here.body = body;
    for (Fiber& fiber : here.fibers) fiber.stack.reset(new char[stack_bytes]);
    block = &here;
    for (unsigned z = 0; z < gridDim.z; ++z)
        for (unsigned y = 0; y < gridDim.y; ++y)
            for (unsigned x = 0; x < gridDim.x; ++x) {
                blockIdx = dim3(x, y, z);
                here.all.members = n;
                for (auto& warp : here.warps) warp.members = 0;
                for (unsigned i = 0; i < n; ++i) ++here.warps[i / lanes].members;
                for (Fiber& fiber : here.fibers) {
                    fiber.finished = false;
                    getcontext(&fiber.context);
                    fiber.context.uc_stack.ss_sp = fiber.stack.get();
                    fiber.context.uc_stack.ss_size = stack_bytes;
                    fiber.context.uc_link = &here.scheduler;
                    makecontext(&fiber.context, enter, 0);
                }
                // Garbage, so that a kernel that reads what it has not written is found out.
                std::memset(here.shared.data(), 0xFF, here.shared.size());
                for (unsigned left = n; left;) {
                    for (unsigned i = 0; i < n; ++i) {
                        if (here.fibers[i].finished) continue;
                        here.current = i;
                        threadIdx = dim3(i, 0, 0);
                        swapcontext(&here.scheduler, &here.fibers[i].context);
                        left -= here.fibers[i].finished;
                    }
                }
            }
    block = nullptr;
}

}  // namespace emulation

template <class... Wanted, class... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Wanted...), Given&&... given) {
    std::tuple<Wanted...> arguments(static_cast<Wanted>(given)...);
    emulation::run(*config, [&] { std::apply(kernel, arguments); });
    return cudaSuccess;
}

inline void __syncthreads() { emulation::meet(emulation::block->all); }
inline void __syncwarp(unsigned = ~0u) { emulation::exchange(0); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int distance) {
    return emulation::exchange(value)[(emulation::block->current % emulation::lanes) ^ distance];
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
    return emulation::exchange(value)[lane];
}
template <class T>
T atomicAdd(T* place, T value) {
    const T before = *place;
    *place += value;
    return before;
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(both >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
    return result;
}
inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
