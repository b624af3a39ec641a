// torch.ops.cece_emulated: the schemas of csrc/ops.cpp under another name. csrc/cuda/ops.cpp brings the functions.
#include <torch/library.h>

#define cece cece_emulated
#include "../../csrc/ops.cpp"
#undef cece

#include "emulator.h"

TORCH_LIBRARY_FRAGMENT(cece_emulated, m) {
  m.def("seed(int number) -> ()", [](int64_t number) {
    using emulator::Order;
    emulator::config().order = number == 0 ? Order::forward : number == -1 ? Order::reverse : Order::random;
    emulator::config().seed = uint64_t(number);
  });
  m.def("clusters() -> int", [] { return emulator::config().clusters; });
  m.def("card(int major, int compiled_for) -> ()", [](int64_t major, int64_t compiled_for) {
    emulator::config().card_major = int(major);
    emulator::config().compiled_for = int(compiled_for);
  });
}
