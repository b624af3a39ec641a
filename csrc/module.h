// What module.cpp shows to Python, implemented in cpu/ops.cpp.
#pragma once
#include <string>
#include <vector>

namespace cece {

std::vector<std::string> cpu_isas();  // built in
std::string cpu_isa();                // in use on this machine

void empty_cache();  // gives back the memory that is kept for gradients (cpu/pages.h)

}  // namespace cece
