// cece._C: what was built, and for what. Nothing numeric: the operators are in torch.ops.cece.
#include "module.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

PYBIND11_MODULE(_C, m) {
  m.def("build_info", [] {
    const cece::BuildInfo info = cece::build_info();
    pybind11::dict d;
    d["version"] = info.version;
    d["torch"] = info.torch;
    d["cpu_isas"] = info.cpu_isas;
    d["cpu_isa"] = info.cpu_isa;
    d["cuda_archs"] = info.cuda_archs;
    d["compiler"] = info.compiler;
    return d;
  });
  m.def("empty_cache", &cece::empty_cache);
}
