// What module.cpp shows to Python, implemented in cpu/ops.cpp.
#pragma once
#include <string>
#include <vector>

#ifdef __clang__
#define CECE_COMPILER __VERSION__  // names itself
#else
#define CECE_COMPILER "g++ " __VERSION__
#endif

namespace cece {

std::vector<std::string> cpu_isas();  // built in
std::string cpu_isa();                // in use on this machine

void empty_cache();  // gives back the memory that is kept for gradients (cpu/pages.h)

}  // namespace cece
