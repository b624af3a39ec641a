// cece._C: what was built, and for what. Nothing numeric: the operators are in torch.ops.cece. Python's own C
// interface, so that no build waits for pybind11, and one of another version than torch's cannot get in.
//
// The macros come from setup.py. Only this file and cuda/none.cpp are compiled again where they change.
#include "module.h"

#include <Python.h>

#include <exception>

#ifdef __clang__
#define CECE_COMPILER __VERSION__  // names itself
#else
#define CECE_COMPILER "g++ " __VERSION__
#endif

namespace {

PyObject* strings(const std::vector<std::string>& items) {
  PyObject* list = PyList_New(0);
  for (const std::string& item : items) {
    PyObject* text = PyUnicode_FromString(item.c_str());
    if (list && (!text || PyList_Append(list, text))) Py_CLEAR(list);
    Py_XDECREF(text);
  }
  return list;
}

std::vector<std::string> cuda_archs() {
  std::vector<std::string> archs;
  for (const char* arch : {CECE_CUDA_ARCHS}) {
    if (arch) archs.push_back(arch);
  }
  return archs;
}

template <PyObject* (*f)()>
PyObject* guarded(PyObject*, PyObject*) {
  try {
    return f();
  } catch (const std::exception& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what());
    return nullptr;
  }
}

PyObject* build_info() {
  return Py_BuildValue("{s:s,s:s,s:N,s:s,s:N,s:s,s:s}", "version", CECE_VERSION, "torch", CECE_TORCH, "cpu_isas",
                       strings(cece::cpu_isas()), "cpu_isa", cece::cpu_isa().c_str(), "cuda_archs",
                       strings(cuda_archs()), "cuda_left_out", CECE_CUDA_LEFT_OUT, "compiler", CECE_COMPILER);
}

PyObject* empty_cache() {
  cece::empty_cache();
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {{"build_info", guarded<build_info>, METH_NOARGS, nullptr},
                         {"empty_cache", guarded<empty_cache>, METH_NOARGS, nullptr},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef_Slot slots[] = {
#ifdef Py_mod_gil  // Python 3.13: what the module keeps is behind its own locks (Pages) or constant
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, 0, methods, slots, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModuleDef_Init(&module); }
