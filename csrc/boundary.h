// What stands between C++ and the C ABI: exceptions become a return code and a message.
#pragma once

#include <exception>
#include <new>

namespace llmctl {

void set_last_error(const char* message) noexcept;

// Runs `body` and returns 0, or keeps the message of what it threw and returns 1.
template <class Body>
int guarded(Body body) noexcept {
    try {
        body();
        return 0;
    } catch (const std::bad_alloc&) {
        set_last_error("out of memory");
    } catch (const std::exception& error) {
        set_last_error(error.what());
    } catch (...) {
        set_last_error("unknown error");
    }
    return 1;
}

}  // namespace llmctl
