#include "cpu/scratch.h"

#include "cpu/piece_scratch.h"

char* llmctl::piece_scratch(int64_t bytes) {
    thread_local Scratch memory;
    return memory.room(bytes);
}
