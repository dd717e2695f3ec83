// How a matrix product is shared among threads.
#pragma once

#include <functional>

#include "cpu/linear.h"

namespace llmctl {

// Calls work(piece) for pieces that make up the product, on the threads of the pool. `weight_bits` are those of one
// weight.
void for_linear_pieces(const Linear& product, int64_t weight_bits, const std::function<void(const LinearPiece&)>& work);

}  // namespace llmctl
