// cece._C: what was built, and for what. Nothing numeric: the operators are in torch.ops.cece. The pybind11 is the one
// that torch brings, on purpose: it is there wherever torch is, and its version is what torch was tested with.
//
// The macros come from setup.py. Only this file and cuda/none.cpp are compiled again where they change.
#include "module.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

// What the module keeps is behind its own locks (Pages) or constant: it needs no GIL.
PYBIND11_MODULE(_C, m, pybind11::mod_gil_not_used()) {
  m.def("build_info", [] {
    std::vector<std::string> archs;
    for (const char* arch : {CECE_CUDA_ARCHS}) {
      if (arch) archs.push_back(arch);
    }
    pybind11::dict d;
    d["version"] = CECE_VERSION;
    d["torch"] = CECE_TORCH;
    d["cpu_isas"] = cece::cpu_isas();
    d["cpu_isa"] = cece::cpu_isa();
    d["cuda_archs"] = archs;
    d["cuda_left_out"] = CECE_CUDA_LEFT_OUT;
    d["compiler"] = CECE_COMPILER;
    return d;
  });
  m.def("empty_cache", &cece::empty_cache);
}
