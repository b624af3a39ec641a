// Every kernel on small shapes, without torch, to be compiled with -fsanitize: each buffer is exactly as large as its
// tensor, so one element too far is found. Losses and gradients are compared with sums in long double.
#include <memory>

#include "../../csrc/cuda/kernels.h"
#include "emulator.h"

using namespace cece;
using cece::cuda::Device;

namespace {

// Memory of an exact size, `offset` elements past 16-byte alignment.
struct Buffer {
  std::unique_ptr<char[]> memory;
  char* data;
  explicit Buffer(size_t bytes, size_t misaligned = 0) {
    memory.reset(new char[bytes + misaligned]);  // aligned to 16, its end right behind the last element
    data = memory.get() + misaligned;
    std::memset(memory.get(), 0xFF, bytes + misaligned);
  }
  template <class T>
  T* as() {
    return reinterpret_cast<T*>(data);
  }
};

void put(Dtype d, void* p, int64_t i, float x) {
  if (d == Dtype::f32) static_cast<float*>(p)[i] = x;
  if (d == Dtype::bf16) static_cast<__nv_bfloat16*>(p)[i] = __float2bfloat16_rn(x);
}
double get(Dtype d, const void* p, int64_t i) {
  return d == Dtype::f32 ? static_cast<const float*>(p)[i] : __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]);
}

int failures = 0;
double worst = 0;
void expect(const char* what, int64_t classes, double got, double want, double scale, double tolerance) {
  const double error = std::fabs(got - want) / (scale + 1e-30);
  if (error > worst) worst = error;
  if (error <= tolerance) return;
  failures++;
  std::printf("%s, %ld classes: got %.9g, want %.9g\n", what, long(classes), got, want);
}

std::mt19937 random_bits(7);
float normal() { return std::normal_distribution<float>(0, 4)(random_bits); }

struct Case {
  Dtype dtype;
  int64_t rows, classes;
  bool pixels, soft;
  double smoothing;
  int misaligned;  // elements
  int multiprocessors;
};

void cross_entropy(const Case& t) {
  const size_t size = t.dtype == Dtype::f32 ? 4 : 2, shift = size_t(t.misaligned) * size;
  const int64_t n = t.rows * t.classes;
  // with labels the gradient is aligned where the logits are not: packs that straddle theirs
  Buffer x(n * size, shift), grad(n * size, t.soft ? shift : 0), q(n * size, shift), labels(t.rows * 8),
      weight(t.classes * 4);
  Buffer stats(3 * t.rows * 4), loss(t.rows * 4), reduced(4), total(4), incoming(4);
  const int64_t step = t.pixels ? t.rows : 1, row_step = t.pixels ? 1 : t.classes;
  for (int64_t i = 0; i < n; i++) put(t.dtype, x.data, i, normal()), put(t.dtype, q.data, i, 1.f / float(t.classes));
  for (int64_t r = 0; r < t.rows; r++) labels.as<int64_t>()[r] = r == 1 ? -100 : int64_t(random_bits() % t.classes);
  for (int64_t c = 0; c < t.classes; c++) weight.as<float>()[c] = 0.5f + float(c % 3);

  CrossEntropyArgs a{};
  a.rows = {1, {t.rows}, t.rows};
  a.classes = a.all_classes = t.classes;
  a.logits = {x.data, t.dtype, step, {row_step}};
  a.grad_logits = {grad.data, t.dtype, step, {row_step}};
  if (t.soft) a.probabilities = {q.data, t.dtype, step, {row_step}};
  if (!t.soft) a.labels = labels.data;
  a.label_dtype = Dtype::i64;
  a.weight = weight.data;
  a.ignore_index = -100;
  a.label_smoothing = t.smoothing;
  a.reduction = Reduction::mean;
  a.stats = stats.data, a.loss = loss.data, a.reduced = reduced.data, a.total_weight = total.data;
  a.grad_loss = incoming.data;
  incoming.as<float>()[0] = 2.f;
  const Device device{t.multiprocessors, false, nullptr};
  const auto& k = (t.dtype == Dtype::f32 ? cuda::kF32 : cuda::kBF16).cross_entropy;
  Buffer scratch(size_t(k.forward_scratch(a, device)));
  k.forward(a, device, scratch.data);
  k.backward(a, device);

  long double sum = 0, weights = t.soft ? t.rows : 0;
  for (int64_t r = 0; r < t.rows && !t.soft; r++) {
    const int64_t y = labels.as<int64_t>()[r];
    if (y >= 0) weights += weight.as<float>()[y];
  }
  for (int64_t r = 0; r < t.rows; r++) {
    const int64_t y = t.soft ? 0 : labels.as<int64_t>()[r];
    const auto at = [&](int64_t c) { return r * row_step + c * step; };
    const auto mass = [&](int64_t c) -> long double {
      const double p = t.soft ? get(t.dtype, q.data, at(c)) : double(c == y);
      return weight.as<float>()[c] * (p * (1 - t.smoothing) + t.smoothing / double(t.classes));
    };
    long double max = -1e30L, z = 0, want = 0, all = 0;
    for (int64_t c = 0; c < t.classes; c++) max = std::max<long double>(max, get(t.dtype, x.data, at(c)));
    for (int64_t c = 0; c < t.classes; c++) z += expl(get(t.dtype, x.data, at(c)) - max);
    for (int64_t c = 0; c < t.classes && y >= 0; c++) {
      all += mass(c);
      want += mass(c) * (max + logl(z) - get(t.dtype, x.data, at(c)));
    }
    sum += want;
    expect("loss", t.classes, loss.as<float>()[r], double(want), double(want) + 1e-6, 3e-6);
    for (int64_t c = 0; c < t.classes; c++) {
      const long double p = expl(get(t.dtype, x.data, at(c)) - max) / z;
      const double slope = y < 0 ? 0 : double(2 / weights * (p * all - mass(c)));
      const double scale = std::fabs(slope) + double(2 / weights * (p * all + mass(c))) * 1e-2 + 1e-30;
      expect("gradient", t.classes, get(t.dtype, grad.data, at(c)), slope, scale, t.dtype == Dtype::f32 ? 1e-4 : 4e-3);
    }
  }
  expect("mean", t.classes, reduced.as<float>()[0], double(sum / weights), double(sum / weights), 3e-6);
}

void binary(Dtype dtype, int64_t n, int misaligned) {
  const size_t size = dtype == Dtype::f32 ? 4 : 2, shift = size_t(misaligned) * size;
  Buffer x(n * size, shift), y(n), grad(n * size, shift), weight(n * 4), reduced(4), incoming(4);
  for (int64_t i = 0; i < n; i++) {
    put(dtype, x.data, i, normal());
    y.as<uint8_t>()[i] = uint8_t(random_bits() & 1);
    weight.as<float>()[i] = 0.5f + float(i % 5);
  }
  BinaryCrossEntropyArgs a{};
  a.shape = {1, {n}, n};
  a.input = {x.data, dtype, 0, {1}}, a.grad_input = {grad.data, dtype, 0, {1}};
  a.target = {y.data, Dtype::u8, 0, {1}}, a.weight = {weight.data, Dtype::f32, 0, {1}};
  a.kind = 1, a.keep = 1;  // with logits, the truth as it is
  a.reduction = Reduction::sum;
  a.reduced = reduced.data;
  a.grad_loss.data = incoming.data;
  incoming.as<float>()[0] = 1.f;
  const Device device{4, false, nullptr};
  const auto& k = (dtype == Dtype::f32 ? cuda::kF32 : cuda::kBF16).binary_cross_entropy;
  Buffer scratch(size_t(k.forward_scratch(a)));
  k.forward(a, device, scratch.data);
  k.backward(a, device);
  long double sum = 0;
  for (int64_t i = 0; i < n; i++) {
    const long double v = get(dtype, x.data, i), w = weight.as<float>()[i], s = y.as<uint8_t>()[i] ? -v : v;
    sum += w * log1pl(expl(s));
    const double slope = double(w / (1 + expl(-s)) * (y.as<uint8_t>()[i] ? -1 : 1));
    expect("binary gradient", n, get(dtype, grad.data, i), slope, std::fabs(slope), dtype == Dtype::f32 ? 1e-6 : 4e-3);
  }
  expect("binary sum", n, reduced.as<float>()[0], double(sum), double(sum), 1e-6);
}

}  // namespace

int main(int argc, char** argv) {
  emulator::config().seed = argc > 1 ? uint64_t(std::atoll(argv[1])) : 1;
  try {
    for (const Dtype d : {Dtype::f32, Dtype::bf16}) {
#ifdef __SANITIZE_THREAD__  // a hundred times slower: one shape for each path
      for (const int64_t classes : {3, 33, 1001}) {
#else
      for (const int64_t classes : {1, 3, 10, 33, 257, 1001, 2500}) {  // one lane to a warp a row
#endif
        for (const bool soft : {false, true}) {
          cross_entropy({d, 5, classes, false, soft, soft ? 0.1 : 0.0, int(classes % 3), 4});
          if (classes > 1) cross_entropy({d, 37, classes > 300 ? 300 : classes, true, soft, soft ? 0.0 : 0.1, 1, 4});
        }
      }
      cross_entropy({d, 2, 5000, false, false, 0, 1, 1});     // a block a row
      cross_entropy({d, 2, 17000, false, false, 0.1, 3, 1});  // a whole block
      cross_entropy({d, 2, 40001, false, false, 0, 1, 8});    // parts of a row
      cross_entropy({d, 1500, 9, true, false, 0, 0, 1});      // a pixel a thread
      cross_entropy({d, 2100, 2, false, false, 0, 0, 1});     // a reduction in two kernels
      for (const int64_t n : {1, 7, 1000, 5003}) binary(d, n, int(n % 3));
    }
  } catch (const emulator::Error& e) {
    return std::puts(e.what()), 2;
  }
  std::printf("worst relative error %.2g, %d failures\n", worst, failures);
  return failures != 0;
}
