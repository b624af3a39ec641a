// Linear losses on a device: chunks of rows, each a few matrix products of torch's around the row operators.
//
// Logits and everything that is added up are at least float32, also where input and linear_weight are float16 or
// bfloat16: a logit of 10 that is rounded to bfloat16 moves its probability by 3 %. On a CPU their products are formed
// from float32 copies of a block of classes, which stay in its caches; on CUDA they come out of the tensor cores so.
#include "linear.h"

#include <torch/library.h>

namespace cece {

// ---- rows: cross_entropy's operators where they do, the general ones where they do not

namespace {
constexpr int64_t kReduceNone = 0;
Tensor ones_like_total(const Tensor& logits, at::ScalarType acc) { return at::ones({}, logits.options().dtype(acc)); }
bool by_cross_entropy(const MaybeTensor& target, const RowOptions& o, int64_t wanted) {
  return wanted == kLoss && present(target) && o.plain();
}
}  // namespace

RowOutputs row_forward(const Tensor& logits, const MaybeTensor& target, const MaybeTensor& weight, const RowOptions& o,
                       int64_t wanted) {
  RowOutputs out;
  if (by_cross_entropy(target, o, wanted)) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("cece::cross_entropy_forward", "")
                               .typed<std::tuple<Tensor, Tensor, Tensor>(
                                   const Tensor&, const Tensor&, const MaybeTensor&, int64_t, int64_t, double, bool)>();
    std::tie(out.loss, out.stats, std::ignore) =
        op.call(logits, *target, weight, kReduceNone, o.ignore_index, o.label_smoothing, false);
    return out;
  }
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("cece::token_statistics_forward", "")
          .typed<std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
              const Tensor&, const MaybeTensor&, const MaybeTensor&, int64_t, double, double, double, bool, int64_t)>();
  std::tie(out.loss, out.entropy, out.logsumexp, out.collision, out.argmax, out.stats) = op.call(
      logits, target, weight, o.ignore_index, o.label_smoothing, o.logit_scale, o.softcap, o.skip_masked_rows, wanted);
  return out;
}

Tensor row_backward(const RowGradients& g, const Tensor& logits, const MaybeTensor& target, const MaybeTensor& weight,
                    const Tensor& stats, const RowOptions& o, int64_t wanted) {
  if (by_cross_entropy(target, o, wanted)) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("cece::cross_entropy_backward", "")
                               .typed<Tensor(const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&,
                                             const Tensor&, const Tensor&, int64_t, int64_t, double)>();
    return op.call(*g.loss, logits, *target, weight, stats, ones_like_total(logits, stats.scalar_type()), kReduceNone,
                   o.ignore_index, o.label_smoothing);
  }
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("cece::token_statistics_backward", "")
                             .typed<Tensor(const MaybeTensor&, const MaybeTensor&, const MaybeTensor&,
                                           const MaybeTensor&, const Tensor&, const MaybeTensor&, const MaybeTensor&,
                                           const Tensor&, int64_t, double, double, double, bool)>();
  return op.call(g.loss, g.entropy, g.logsumexp, g.collision, logits, target, weight, stats, o.ignore_index,
                 o.label_smoothing, o.logit_scale, o.softcap, o.skip_masked_rows);
}

LinearRows rows_of(const RowOutputs& out, const Tensor& input) {
  const auto given = [&](const Tensor& t) { return t.defined() ? t : at::empty({0}, input.options()); };
  return {given(out.loss),      given(out.entropy), given(out.logsumexp),
          given(out.collision), given(out.argmax),  given(out.stats)};
}

namespace {

// The same, over the logits.
void row_backward_(const RowGradients& g, const Tensor& logits, const MaybeTensor& target, const MaybeTensor& weight,
                   const Tensor& stats, const RowOptions& o, int64_t wanted) {
  if (by_cross_entropy(target, o, wanted)) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("cece::cross_entropy_backward_", "")
                               .typed<void(const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&,
                                           const Tensor&, const Tensor&, int64_t, int64_t, double)>();
    return op.call(*g.loss, logits, *target, weight, stats, ones_like_total(logits, stats.scalar_type()), kReduceNone,
                   o.ignore_index, o.label_smoothing);
  }
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("cece::token_statistics_backward_", "")
          .typed<void(const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, const Tensor&,
                      const MaybeTensor&, const MaybeTensor&, const Tensor&, int64_t, double, double, double, bool)>();
  op.call(g.loss, g.entropy, g.logsumexp, g.collision, logits, target, weight, stats, o.ignore_index, o.label_smoothing,
          o.logit_scale, o.softcap, o.skip_masked_rows);
}

// ---- chunks

// So many rows a chunk: a tenth, in whole 64s, which products like. But no fewer than 64, nor than fill 16 MiB with
// logits, and no more than 4096, beyond which no product gains.
int64_t rows_a_chunk(int64_t rows, int64_t bytes_a_row) {
  return std::min<int64_t>(4096,
                           std::max<int64_t>({64, rows / 640 * 64, (16 << 20) / std::max<int64_t>(1, bytes_a_row)}));
}

// A block of classes whose float32 weights have 4 MiB: one product of 192 x 256 by 256 x 32000 takes 249 ms a 2048
// rows, in such blocks 235.
constexpr int64_t kBlockBytes = 4 << 20;

struct Linear {
  const Tensor input, target, weight;  // as given; the last two may be undefined
  const Tensor matrix, bias;           // (C d..., in), (C d...)
  const int64_t outputs, features;
  std::vector<int64_t> logit_sizes;  // (n, C, d...)
  at::ScalarType wide;               // of logits and sums
  bool cpu, narrow;                  // float16 or bfloat16
  int64_t block;
  Tensor rows, used;  // where not all rows count: their numbers, or (N) which do
  int64_t count;      // of rows
  int64_t chunk;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};

  Linear(const Tensor& x, const Tensor& linear_weight, const MaybeTensor& linear_bias, const MaybeTensor& t,
         const MaybeTensor& w, const LinearOptions& o)
      : input(x),
        target(t.value_or(Tensor())),
        weight(w.value_or(Tensor())),
        matrix(linear_weight.reshape({-1, linear_weight.size(-1)})),
        bias(present(linear_bias) ? linear_bias->reshape({-1}) : Tensor()),
        outputs(matrix.size(0)),
        features(matrix.size(1)),
        logit_sizes(linear_weight.sizes().begin(), linear_weight.sizes().end() - 1),
        wide(acc_type({&x})),
        cpu(x.is_cpu()),
        narrow(x.scalar_type() != wide),
        block(cpu ? std::max<int64_t>(64, kBlockBytes / (4 * std::max<int64_t>(1, features))) : outputs),
        count(x.size(0)) {
    logit_sizes.insert(logit_sizes.begin(), -1);
    if (is_labels(t, int64_t(logit_sizes.size()))) {
      if (cpu) check_labels(linear_weight.size(0), o.row.ignore_index);
      used = used_rows(target, o.row.ignore_index);
      if (o.compact) {
        rows = used.nonzero().squeeze(1);
        if (rows.size(0) == count) {
          rows = Tensor();
        } else {
          count = rows.size(0);
        }
        used = Tensor();
      }
    }
    chunk = o.chunk_size ? o.chunk_size : rows_a_chunk(input.size(0), outputs * int64_t(elementSize(wide)));
    chunk = std::max<int64_t>(1, std::min(chunk, count));
  }

  void check_labels(int64_t classes, int64_t ignore_index) const {
    const Tensor labels = target.to(at::kLong);
    const Tensor bad = (labels < 0).logical_or(labels >= classes).logical_and(labels != ignore_index);
    if (!bad.any().item<bool>()) return;
    const int64_t row = bad.flatten().nonzero()[0].item<int64_t>(), label = labels.flatten()[row].item<int64_t>();
    TORCH_CHECK_INDEX(false, "cece.linear_cross_entropy: Target ", label, " is out of bounds: target",
                      position(target.sizes(), row), " must be in [0, ", classes, ") or equal ignore_index (",
                      ignore_index, "), got ", label);
  }

  // visit(first, n) for each chunk; once, with no row, where there are none.
  template <class F>
  void each(F&& visit) const {
    for (int64_t i = 0; i == 0 || i < count; i += chunk) visit(i, std::min(chunk, count - i));
  }
  // Rows of a chunk, along `dim`; and back.
  Tensor take(const Tensor& t, int64_t i, int64_t n, int64_t dim = 0) const {
    if (!t.defined()) return t;
    return rows.defined() ? t.index_select(dim, rows.narrow(0, i, n)) : t.narrow(dim, i, n);
  }
  void put(const Tensor& t, int64_t i, int64_t n, const Tensor& part, int64_t dim = 0) const {
    if (rows.defined()) {
      t.index_copy_(dim, rows.narrow(0, i, n), part);
    } else {
      t.narrow(dim, i, n).copy_(part);
    }
  }
  // A chunk's results into those of all rows, 0 where a row does not count.
  void collect(Tensor& all, int64_t i, int64_t n, const Tensor& part, int64_t dim = 0) const {
    if (!all.defined()) {
      std::vector<int64_t> sizes = part.sizes().vec();
      sizes[dim] = input.size(0);
      all = rows.defined() ? at::zeros(sizes, part.options()) : at::empty(sizes, part.options());
    }
    put(all, i, n, part, dim);
  }
  Tensor take_input(int64_t i, int64_t n) const {
    Tensor x = take(input, i, n);
    if (used.defined()) x = x.masked_fill(used.narrow(0, i, n).logical_not().unsqueeze(1), 0);
    return factor(x);
  }
  // A factor of a product.
  Tensor factor(const Tensor& t) const { return cpu && narrow ? t.to(wide) : t; }

  template <class F>
  void each_block(F&& visit) const {
    for (int64_t c = 0; c < outputs; c += block) visit(c, std::min(block, outputs - c));
  }

  // (n, C, d...), in memory of `buffer`
  Tensor logits(const Tensor& x, const Tensor& buffer) const {
    const Tensor out = buffer.narrow(0, 0, x.size(0));
    if (!cpu && narrow) {
      at::mm_out(const_cast<Tensor&>(out), x, matrix.t(), wide);
      if (bias.defined()) out.add_(bias);
    } else {
      each_block([&](int64_t c, int64_t n) {
        Tensor part = out.narrow(1, c, n);
        const Tensor w = factor(matrix.narrow(0, c, n)).t();
        if (bias.defined()) {
          part.copy_(bias.narrow(0, c, n).expand_as(part));
          part.addmm_(x, w);
        } else {
          part.addmm_(x, w, /*beta=*/0);
        }
      });
    }
    return out.view(logit_sizes);
  }
  Tensor buffer() const { return at::empty({chunk, outputs}, input.options().dtype(wide)); }
};

// The gradients of a chunk's logits on their way to those of input, weight and bias, each in `wide`.
struct Gradients {
  const Linear& l;
  Tensor input, matrix, bias;  // undefined: not wanted

  Gradients(const Linear& l, int64_t wanted) : l(l) {
    const auto zeros = [&](at::IntArrayRef sizes) { return at::zeros(sizes, l.input.options().dtype(l.wide)); };
    if (wanted & 1) input = zeros(l.input.sizes());
    if (wanted & 2) matrix = zeros(l.matrix.sizes());
    if (wanted & 4) bias = zeros({l.outputs});
  }
  void add(int64_t i, const Tensor& x, const Tensor& grad_logits) const {
    const int64_t n = x.size(0);
    Tensor g = grad_logits.view({n, l.outputs});
    if (bias.defined()) bias.add_(g.sum(0));
    if (!l.cpu && l.narrow) {
      g = g.to(x.scalar_type());
      if (input.defined()) put_input(i, n, at::mm(g, l.matrix, l.wide));
      if (matrix.defined()) matrix.add_(at::mm(g.t(), x, l.wide));
      return;
    }
    if (input.defined()) {
      Tensor part = l.rows.defined() ? at::zeros({n, l.features}, x.options()) : input.narrow(0, i, n);
      if (l.narrow) {
        l.each_block([&](int64_t c, int64_t k) { part.addmm_(g.narrow(1, c, k), l.factor(l.matrix.narrow(0, c, k))); });
      } else {
        part.addmm_(g, l.matrix, /*beta=*/0);
      }
      put_input(i, n, part);
    }
    if (matrix.defined()) matrix.addmm_(g.t(), x);
  }
  Tensor shaped(const Tensor& t, at::IntArrayRef sizes) const {
    return t.defined() ? t.view(sizes) : at::empty({0}, l.input.options().dtype(l.wide));
  }

 private:
  void put_input(int64_t i, int64_t n, const Tensor& part) const {
    if (l.used.defined()) const_cast<Tensor&>(part).masked_fill_(l.used.narrow(0, i, n).logical_not().unsqueeze(1), 0);
    if (!part.is_alias_of(input)) l.put(input, i, n, part);
  }
};

LinearSum linear_cross_entropy(const Tensor& input, const Tensor& linear_weight, const MaybeTensor& linear_bias,
                               const Tensor& target, const MaybeTensor& weight, const MaybeTensor& row_weight,
                               int64_t ignore_index, double label_smoothing, double logit_scale, double softcap,
                               bool skip_masked_rows, int64_t chunk_size, bool compact, double z_loss, bool reduce,
                               int64_t gradients) {
  const RowOptions o{ignore_index, label_smoothing, logit_scale, softcap, skip_masked_rows};
  if (!reduce) {
    return linear_cross_entropy_by_rows(input, linear_weight, linear_bias, target, weight, row_weight,
                                        {o, chunk_size, compact}, z_loss, reduce);
  }
  const Linear l(input, linear_weight, linear_bias, target, weight, {o, chunk_size, compact});
  const int64_t wanted = RowLoss::wanted(z_loss);
  const Gradients grads(l, gradients);
  const Tensor buffer = l.buffer();
  Tensor losses, weighted;
  l.each([&](int64_t i, int64_t n) {
    const Tensor x = l.take_input(i, n), t = l.take(target, i, n);
    const MaybeTensor factor = present(row_weight) ? MaybeTensor(l.take(*row_weight, i, n)) : std::nullopt;
    const Tensor logits = l.logits(x, buffer);
    const RowOutputs rows = row_forward(logits, t, weight, o, wanted);
    const RowLoss row(rows, t, o, z_loss);
    if (gradients) {
      const Tensor f = present(factor) ? factor->to(row.loss.scalar_type()) : at::ones_like(row.loss);
      row_backward_(row.gradients(f), logits, t, weight, rows.stats, o, wanted);
      grads.add(i, x, logits);
    }
    l.collect(losses, i, n, row.loss);
    l.collect(weighted, i, n, row.times(factor));
  });
  return {sum_of_rows(weighted), losses, grads.shaped(grads.input, input.sizes()),
          grads.shaped(grads.matrix, linear_weight.sizes()),
          grads.shaped(grads.bias, linear_weight.sizes().slice(0, linear_weight.dim() - 1))};
}

LinearRows linear_token_statistics_forward(const Tensor& input, const Tensor& linear_weight,
                                           const MaybeTensor& linear_bias, const MaybeTensor& target,
                                           const MaybeTensor& weight, int64_t ignore_index, double label_smoothing,
                                           double logit_scale, double softcap, bool skip_masked_rows,
                                           int64_t chunk_size, bool compact, int64_t wanted) {
  const RowOptions o{ignore_index, label_smoothing, logit_scale, softcap, skip_masked_rows};
  const Linear l(input, linear_weight, linear_bias, target, weight, {o, chunk_size, compact});
  const Tensor buffer = l.buffer();
  RowOutputs out;
  l.each([&](int64_t i, int64_t n) {
    const Tensor logits = l.logits(l.take_input(i, n), buffer);
    const RowOutputs rows = row_forward(logits, maybe(l.take(l.target, i, n)), weight, o, wanted);
    for (const auto part : {&RowOutputs::loss, &RowOutputs::entropy, &RowOutputs::logsumexp, &RowOutputs::collision,
                            &RowOutputs::argmax}) {
      if ((rows.*part).defined() && (rows.*part).dim() > 0) l.collect(out.*part, i, n, rows.*part);
    }
    l.collect(out.stats, i, n, rows.stats, /*dim=*/1);
  });
  return rows_of(out, input);
}

LinearGradients linear_token_statistics_backward(const MaybeTensor& grad_loss, const MaybeTensor& grad_entropy,
                                                 const MaybeTensor& grad_logsumexp, const MaybeTensor& grad_collision,
                                                 const Tensor& input, const Tensor& linear_weight,
                                                 const MaybeTensor& linear_bias, const MaybeTensor& target,
                                                 const MaybeTensor& weight, const Tensor& stats, int64_t ignore_index,
                                                 double label_smoothing, double logit_scale, double softcap,
                                                 bool skip_masked_rows, int64_t chunk_size, bool compact,
                                                 int64_t wanted, int64_t gradients) {
  const RowOptions o{ignore_index, label_smoothing, logit_scale, softcap, skip_masked_rows};
  const Linear l(input, linear_weight, linear_bias, target, weight, {o, chunk_size, compact});
  const Gradients grads(l, gradients);
  const Tensor buffer = l.buffer();
  l.each([&](int64_t i, int64_t n) {
    const auto part = [&](const MaybeTensor& t) { return present(t) ? MaybeTensor(l.take(*t, i, n)) : std::nullopt; };
    const Tensor x = l.take_input(i, n), logits = l.logits(x, buffer);
    row_backward_({part(grad_loss), part(grad_entropy), part(grad_logsumexp), part(grad_collision)}, logits,
                  part(target), weight, l.take(stats, i, n, /*dim=*/1), o, wanted);
    grads.add(i, x, logits);
  });
  return {grads.shaped(grads.input, input.sizes()).to(input.scalar_type()),
          grads.shaped(grads.matrix, linear_weight.sizes()).to(input.scalar_type()),
          grads.shaped(grads.bias, linear_weight.sizes().slice(0, linear_weight.dim() - 1)).to(input.scalar_type())};
}

// ---- without data (meta.cpp's part of these): sizes may be symbols, what a row operator returns it says itself

Tensor meta_logits(const Tensor& input, const Tensor& linear_weight) {
  return at::empty_symint(linear_logits_sizes(input, linear_weight), input.options().dtype(acc_type({&input})));
}
Tensor meta_gradient(const Tensor& t, bool wanted, at::ScalarType type) {
  return wanted ? at::empty_symint(t.sym_sizes(), t.options().dtype(type)) : at::empty({0}, t.options().dtype(type));
}
LinearGradients meta_gradients(const Tensor& input, const Tensor& linear_weight, const MaybeTensor& linear_bias,
                               int64_t gradients, at::ScalarType type) {
  return {meta_gradient(input, gradients & 1, type), meta_gradient(linear_weight, gradients & 2, type),
          meta_gradient(present(linear_bias) ? *linear_bias : input, gradients & 4, type)};
}

LinearSum linear_cross_entropy_meta(const Tensor& input, const Tensor& linear_weight, const MaybeTensor& linear_bias,
                                    const Tensor& target, const MaybeTensor& weight, const MaybeTensor& row_weight,
                                    int64_t ignore_index, double label_smoothing, double logit_scale, double softcap,
                                    bool skip_masked_rows, int64_t chunk_size, bool compact, double z_loss, bool reduce,
                                    int64_t gradients) {
  const RowOptions o{ignore_index, label_smoothing, logit_scale, softcap, skip_masked_rows};
  if (!reduce) {
    return linear_cross_entropy_by_rows(input, linear_weight, linear_bias, target, weight, row_weight,
                                        {o, chunk_size, compact}, z_loss, reduce);
  }
  const Tensor loss = row_forward(meta_logits(input, linear_weight), target, weight, o, RowLoss::wanted(z_loss)).loss;
  auto [x, w, b] = meta_gradients(input, linear_weight, linear_bias, gradients, acc_type({&input}));
  return {at::empty({}, loss.options()), loss, x, w, b};
}
LinearRows linear_token_statistics_forward_meta(const Tensor& input, const Tensor& linear_weight, const MaybeTensor&,
                                                const MaybeTensor& target, const MaybeTensor& weight,
                                                int64_t ignore_index, double label_smoothing, double logit_scale,
                                                double softcap, bool skip_masked_rows, int64_t, bool, int64_t wanted) {
  return rows_of(row_forward(meta_logits(input, linear_weight), target, weight,
                             {ignore_index, label_smoothing, logit_scale, softcap, skip_masked_rows}, wanted),
                 input);
}
LinearGradients linear_token_statistics_backward_meta(const MaybeTensor&, const MaybeTensor&, const MaybeTensor&,
                                                      const MaybeTensor&, const Tensor& input,
                                                      const Tensor& linear_weight, const MaybeTensor& linear_bias,
                                                      const MaybeTensor&, const MaybeTensor&, const Tensor&, int64_t,
                                                      double, double, double, bool, int64_t, bool, int64_t,
                                                      int64_t gradients) {
  return meta_gradients(input, linear_weight, linear_bias, gradients, input.scalar_type());
}

}  // namespace

LinearRows call_linear_rows(const Tensor& x, const Tensor& linear_weight, const MaybeTensor& linear_bias,
                            const MaybeTensor& target, const MaybeTensor& weight, const LinearOptions& o,
                            int64_t wanted) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("cece::linear_token_statistics_forward", "")
          .typed<LinearRows(const Tensor&, const Tensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&,
                            int64_t, double, double, double, bool, int64_t, bool, int64_t)>();
  const RowOptions& r = o.row;
  return op.call(x, linear_weight, linear_bias, target, weight, r.ignore_index, r.label_smoothing, r.logit_scale,
                 r.softcap, r.skip_masked_rows, o.chunk_size, o.compact, wanted);
}

LinearSum linear_cross_entropy_by_rows(const Tensor& x, const Tensor& linear_weight, const MaybeTensor& linear_bias,
                                       const Tensor& target, const MaybeTensor& weight, const MaybeTensor& row_weight,
                                       const LinearOptions& o, double z_loss, bool reduce) {
  RowOutputs rows;
  std::tie(rows.loss, std::ignore, rows.logsumexp, std::ignore, std::ignore, std::ignore) =
      call_linear_rows(x, linear_weight, linear_bias, target, weight, o, RowLoss::wanted(z_loss));
  const Tensor loss = RowLoss(rows, target, o.row, z_loss).times(row_weight);
  const Tensor none = at::empty({0}, loss.options());
  return {reduce ? sum_of_rows(loss) : loss, none, none, none, none};
}

}  // namespace cece

#define CECE_LINEAR(key, suffix)                                                                \
  TORCH_LIBRARY_IMPL(cece, key, m) {                                                            \
    m.impl("linear_cross_entropy", cece::linear_cross_entropy##suffix);                         \
    m.impl("linear_token_statistics_forward", cece::linear_token_statistics_forward##suffix);   \
    m.impl("linear_token_statistics_backward", cece::linear_token_statistics_backward##suffix); \
  }
CECE_LINEAR(CPU, )
CECE_LINEAR(CUDA, )
CECE_LINEAR(Meta, _meta)
