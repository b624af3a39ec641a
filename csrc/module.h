// What module.cpp shows to Python, implemented in cpu/ops.cpp.
#pragma once
#include <string>
#include <vector>

namespace cece {

struct BuildInfo {
  std::string version, torch;           // of cece, and the torch it was built with
  std::vector<std::string> cpu_isas;    // built in
  std::string cpu_isa;                  // in use on this machine
  std::vector<std::string> cuda_archs;  // empty: built without CUDA
  std::string compiler;
};
BuildInfo build_info();

void empty_cache();  // gives back the memory that is kept for gradients (cpu/pages.h)

}  // namespace cece
