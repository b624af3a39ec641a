// Memory for gradients, and for what is as large and as often asked for; implemented in cpu/ops.cpp over pages.h.
#pragma once
#include <ATen/core/Tensor.h>

namespace cece::cpu {

at::Tensor empty_gradient(at::IntArrayRef sizes, at::ScalarType type);

}  // namespace cece::cpu
