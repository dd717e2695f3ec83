#include "cpu/cores.h"

#include <algorithm>
#include <fstream>
#include <set>
#include <string>
#include <thread>

#ifdef __linux__
#include <sched.h>
#endif

int32_t llmctl::physical_cores() {
    std::set<std::string> cores;  // each named by the list of its hardware threads
#ifdef __linux__
    cpu_set_t usable;
    if (sched_getaffinity(0, sizeof usable, &usable) == 0) {
        for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
            if (!CPU_ISSET(cpu, &usable)) continue;
            std::string siblings = std::to_string(cpu);
            std::ifstream file("/sys/devices/system/cpu/cpu" + siblings + "/topology/thread_siblings_list");
            std::getline(file, siblings);
            cores.insert(siblings);
        }
    }
#endif
    if (cores.empty()) return std::max<int32_t>(1, static_cast<int32_t>(std::thread::hardware_concurrency()));
    return static_cast<int32_t>(cores.size());
}
