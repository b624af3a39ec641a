// How far the float primitives of csrc/cpu/vec.h are from the truth, in units of the result's last place.
//   primitives NAME STRIDE    every STRIDE-th float of the primitive's range: "worst unit, its argument"
//   primitives NAME at X...   the results there
// Compiled as one of the instruction sets is, with CPU_CAPABILITY defined.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "cpu/vec.h"

namespace {

using V = cece::Vec<float>;

struct Primitive {
  const char* name;
  float low, high;
  V (*function)(V);
  double (*truth)(double);
};
const float kInfinity = std::numeric_limits<float>::infinity();
const Primitive kPrimitives[] = {
    {"exp_nonpositive", -kInfinity, 0, [](V x) { return cece::exp_nonpositive(x); },
     [](double x) { return std::exp(x); }},
    {"expm1_nonpositive", -kInfinity, 0, [](V x) { return cece::expm1_nonpositive(x); },
     [](double x) { return std::expm1(x); }},
    {"log1p_unit", -0.5f, 1, [](V x) { return cece::log1p_unit(x); }, [](double x) { return std::log1p(x); }},
    {"log1p_", 0, 0x1p64f, [](V x) { return cece::log1p_(x); }, [](double x) { return std::log1p(x); }},
    {"log_", std::numeric_limits<float>::denorm_min(), 1, [](V x) { return cece::log_(x); },
     [](double x) { return std::log(x); }},
};

// Floats in order, as integers without a gap: 0 is 0.
int64_t place(float x) {
  const int32_t bits = std::bit_cast<int32_t>(x);
  return bits < 0 ? int64_t(std::numeric_limits<int32_t>::min()) - bits : bits;
}
float number_at(int64_t place) {
  return std::bit_cast<float>(int32_t(place < 0 ? int64_t(std::numeric_limits<int32_t>::min()) - place : place));
}

// |result - truth| in the distance of floats at the truth; where both are infinite 0, a NaN is infinitely far.
double units(float result, double truth) {
  if (double(result) == truth) return 0;
  const float size = std::fabs(float(truth));
  const double distance = std::fabs(double(result) - truth) / (double(std::nextafter(size, kInfinity)) - double(size));
  return std::isnan(distance) ? double(kInfinity) : distance;
}

}  // namespace

int main(int count, char** words) {
  const auto* p = std::find_if(std::begin(kPrimitives), std::end(kPrimitives),
                               [&](const Primitive& p) { return count > 2 && !std::strcmp(p.name, words[1]); });
  if (p == std::end(kPrimitives)) return 2;
  float x[V::size()], y[V::size()];
  if (!std::strcmp(words[2], "at")) {
    for (int i = 3; i < count; i++) {
      p->function(V(std::strtof(words[i], nullptr))).store(y);
      std::printf("%.9g\n", double(y[V::size() - 1]));
    }
    return 0;
  }
  const int64_t stride = std::atoll(words[2]), last = place(p->high);
  double worst = 0, where = 0;
  for (int64_t i = place(p->low); i <= last; i += stride * V::size()) {
    for (int k = 0; k < V::size(); k++) x[k] = number_at(std::min(i + k * stride, last));
    p->function(V::loadu(x)).store(y);
    for (int k = 0; k < V::size(); k++) {
      const double off = units(y[k], p->truth(double(x[k])));
      if (off > worst) worst = off, where = double(x[k]);
    }
  }
  std::printf("%.4f %.9g\n", worst, where);
}
