// Linear losses on a device: chunks of rows, each a few matrix products of torch's around the row operators.
//
// Logits and everything that is added up are at least float32, also where input and linear_weight are float16 or
// bfloat16: a logit of 10 that is rounded to bfloat16 moves its probability by 3 %. On a CPU their products are formed
// from float32 copies of a block of classes, which stay in its caches; on CUDA they come out of the tensor cores so.
#include "linear.h"

#include <torch/library.h>

#include "cpu/memory.h"

namespace cece {

namespace {

// ---- chunks

// So many rows a chunk: a fourteenth, which with what the products need beside it is a tenth of the logits, in whole
// 48s, which products like. But no fewer than 48, nor than fill 16 MiB with logits, and no more than 4096, beyond which
// no product gains.
int64_t rows_a_chunk(int64_t rows, int64_t bytes_a_row) {
  return std::min<int64_t>(4096,
                           std::max<int64_t>({48, rows / 672 * 48, (16 << 20) / std::max<int64_t>(1, bytes_a_row)}));
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
  Ranks ranks;  // that have the other classes
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
        count(x.size(0)),
        ranks(o.row.shard.ranks) {
    logit_sizes.insert(logit_sizes.begin(), 0);
    if (is_labels(t, int64_t(logit_sizes.size()))) {
      if (cpu) check_labels(o.row.shard.all.value_or(linear_weight.size(0)), o.row.ignore_index);
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
    // Of ranks with shards of any sizes as many chunks: each is an exchange.
    const int64_t of_rank = o.row.shard.all ? (*o.row.shard.all + ranks.count - 1) / ranks.count : outputs;
    chunk = o.chunk_size ? o.chunk_size : rows_a_chunk(input.size(0), of_rank * int64_t(elementSize(wide)));
    chunk = std::max<int64_t>(1, std::min(chunk, count));
  }

  void check_labels(int64_t classes, int64_t ignore_index) const {
    const Tensor labels = target.to(at::kLong);
    const Tensor bad = (labels < 0).logical_or(labels >= classes).logical_and(labels != ignore_index);
    if (!bad.any().item<bool>()) return;
    const int64_t row = bad.flatten().nonzero()[0].item<int64_t>(), label = labels.flatten()[row].item<int64_t>();
    TORCH_CHECK_INDEX(false, "cece.linear_cross_entropy: Target ", label, " is out of bounds: target",
                      position(target.sizes(), logical_order(target.dim()), row), " must be in [0, ", classes,
                      ") or equal ignore_index (", ignore_index, "), got ", label);
  }

  // visit(first, n) for each chunk; once, with no row, where there are none.
  template <class F>
  void each(F&& visit) const {
    for (int64_t i = 0; i == 0 || i < count; i += chunk) visit(i, std::min(chunk, count - i));
  }
  // Rows of a chunk, along `dim`; and back.
  Tensor take(const Tensor& t, int64_t i, int64_t n, int64_t dim = 0) const {
    return rows.defined() ? t.index_select(dim, rows.narrow(0, i, n)) : t.narrow(dim, i, n);
  }
  MaybeTensor take(const MaybeTensor& t, int64_t i, int64_t n, int64_t dim = 0) const {
    return present(t) ? MaybeTensor(take(*t, i, n, dim)) : std::nullopt;
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
    std::vector<int64_t> sizes = logit_sizes;
    sizes[0] = x.size(0);
    return out.view(sizes);
  }
  Tensor buffer() const { return fresh({chunk, outputs}); }
  // Large ones on a CPU are memory that the call before gave back: pages of their own would cost 5 % of the products.
  Tensor fresh(at::IntArrayRef sizes) const {
    return cpu ? cpu::empty_gradient(sizes, wide) : at::empty(sizes, input.options().dtype(wide));
  }
};

// The gradients of a chunk's logits on their way to those of input, weight and bias, each in `wide`.
struct Gradients {
  const Linear& l;
  Tensor input, matrix, bias;  // undefined: not wanted

  Gradients(const Linear& l, int64_t wanted) : l(l) {
    if (wanted & 1) input = l.fresh(l.input.sizes());
    if (wanted & 2) matrix = l.fresh(l.matrix.sizes());
    if (wanted & 4) bias = at::zeros({l.outputs}, l.input.options().dtype(l.wide));
    if (l.rows.defined() && input.defined()) input.zero_();
  }
  void add(int64_t i, const Tensor& x, const Tensor& grad_logits) const {
    const int64_t n = x.size(0);
    Tensor g = grad_logits.view({n, l.outputs});
    if (bias.defined()) bias.add_(g.sum(0));
    if (!l.cpu && l.narrow) {
      g = g.to(x.scalar_type());
      if (input.defined()) put_input(i, n, at::mm(g, l.matrix, l.wide));
      if (matrix.defined()) i == 0 ? matrix.copy_(at::mm(g.t(), x, l.wide)) : matrix.add_(at::mm(g.t(), x, l.wide));
      return;
    }
    if (input.defined()) {
      Tensor part = l.rows.defined() ? at::empty({n, l.features}, x.options()) : input.narrow(0, i, n);
      if (l.outputs == 0) part.zero_();  // an empty shard
      if (l.narrow) {
        l.each_block([&](int64_t c, int64_t k) {
          part.addmm_(g.narrow(1, c, k), l.factor(l.matrix.narrow(0, c, k)), /*beta=*/c > 0 ? 1 : 0);
        });
      } else {
        part.addmm_(g, l.matrix, /*beta=*/0);
      }
      put_input(i, n, part);
    }
    if (matrix.defined()) matrix.addmm_(g.t(), x, /*beta=*/i > 0 ? 1 : 0);
  }
  // In the shapes of what they belong to; empty where not wanted. All ranks have the input: its gradient is their sum.
  LinearGradients all(const Tensor& linear_weight) const {
    const auto sizes = linear_weight.sizes();
    const auto one = [&](const Tensor& t, at::IntArrayRef sizes) {
      return t.defined() ? t.view(sizes) : at::empty({0}, l.input.options().dtype(l.wide));
    };
    return {one(input.defined() ? sum_of_shards(input, l.ranks) : input, l.input.sizes()), one(matrix, sizes),
            one(bias, sizes.slice(0, sizes.size() - 1))};
  }

 private:
  void put_input(int64_t i, int64_t n, const Tensor& part) const {
    if (l.used.defined()) const_cast<Tensor&>(part).masked_fill_(l.used.narrow(0, i, n).logical_not().unsqueeze(1), 0);
    if (!part.is_alias_of(input)) l.put(input, i, n, part);
  }
};

LinearOutputs linear_cross_entropy(const Tensor& input, const Tensor& linear_weight, const MaybeTensor& linear_bias,
                                   const Tensor& target, const MaybeTensor& weight, const MaybeTensor& token_weight,
                                   int64_t ignore_index, double label_smoothing, double logit_scale, double softcap,
                                   bool skip_masked_rows, int64_t chunk_size, bool compact, double z_loss,
                                   int64_t reduction, int64_t gradients, CECE_SHARD_PARAMETERS) {
  const LinearOptions o{
      {ignore_index, label_smoothing, logit_scale, softcap, skip_masked_rows, CECE_SHARD}, chunk_size, compact};
  if (Reduction(reduction) == Reduction::none) {
    return linear_cross_entropy_by_rows(input, linear_weight, linear_bias, target, weight, token_weight, o, z_loss,
                                        Reduction::none);
  }
  const Linear l(input, linear_weight, linear_bias, target, weight, o);
  const int64_t wanted = RowLoss::wanted(z_loss);
  const Gradients grads(l, gradients);
  const Tensor buffer = l.buffer();
  Tensor losses, weighted, shares;
  l.each([&](int64_t i, int64_t n) {
    const Tensor x = l.take_input(i, n), t = l.take(target, i, n);
    const MaybeTensor factor = l.take(token_weight, i, n);
    const Tensor logits = l.logits(x, buffer);
    const TokenOutputs rows = row_forward(logits, t, weight, o.row, wanted);
    const RowLoss row(rows, t, o.row, z_loss);
    l.collect(losses, i, n, row.loss);
    l.collect(weighted, i, n, row.weighted(factor));
    l.collect(shares, i, n, row.shares(t, weight));
    if (!gradients) return;
    row_backward_(row.gradients(row.factor(factor)), logits, t, weight, std::get<5>(rows), o.row);
    grads.add(i, x, logits);
  });
  const bool mean = Reduction(reduction) == Reduction::mean;
  const Tensor total = mean ? sum_of_rows(shares) : at::ones({}, losses.options());
  const auto [x, w, b] = grads.all(linear_weight);
  return {sum_of_rows(weighted) / total, losses, total, x, w, b};
}

TokenOutputs linear_token_statistics_forward(const Tensor& input, const Tensor& linear_weight,
                                             const MaybeTensor& linear_bias, const MaybeTensor& target,
                                             const MaybeTensor& weight, int64_t ignore_index, double label_smoothing,
                                             double logit_scale, double softcap, bool skip_masked_rows,
                                             int64_t chunk_size, bool compact, int64_t wanted, CECE_SHARD_PARAMETERS) {
  const LinearOptions o{
      {ignore_index, label_smoothing, logit_scale, softcap, skip_masked_rows, CECE_SHARD}, chunk_size, compact};
  const Linear l(input, linear_weight, linear_bias, target, weight, o);
  const Tensor buffer = l.buffer();
  std::array<Tensor, 6> all;
  l.each([&](int64_t i, int64_t n) {
    const Tensor logits = l.logits(l.take_input(i, n), buffer);
    const auto part = row_forward(logits, l.take(target, i, n), weight, o.row, wanted);
    const auto& [loss, entropy, logsumexp, collision, argmax, stats] = part;
    const Tensor values[] = {loss, entropy, logsumexp, collision, argmax};
    for (int64_t k = 0; k < 5; k++) {
      if (wanted >> k & 1) {
        l.collect(all[k], i, n, values[k]);
      } else if (!all[k].defined()) {
        all[k] = values[k];
      }
    }
    l.collect(all[5], i, n, stats, /*dim=*/1);
  });
  return {all[0], all[1], all[2], all[3], all[4], all[5]};
}

LinearGradients linear_token_statistics_backward(const MaybeTensor& grad_loss, const MaybeTensor& grad_entropy,
                                                 const MaybeTensor& grad_logsumexp, const MaybeTensor& grad_collision,
                                                 const Tensor& input, const Tensor& linear_weight,
                                                 const MaybeTensor& linear_bias, const MaybeTensor& target,
                                                 const MaybeTensor& weight, const Tensor& stats, int64_t ignore_index,
                                                 double label_smoothing, double logit_scale, double softcap,
                                                 bool skip_masked_rows, int64_t chunk_size, bool compact,
                                                 int64_t wanted, int64_t gradients, CECE_SHARD_PARAMETERS) {
  const LinearOptions o{
      {ignore_index, label_smoothing, logit_scale, softcap, skip_masked_rows, CECE_SHARD}, chunk_size, compact};
  const Linear l(input, linear_weight, linear_bias, target, weight, o);
  const Gradients grads(l, gradients);
  const Tensor buffer = l.buffer();
  l.each([&](int64_t i, int64_t n) {
    const Tensor x = l.take_input(i, n), logits = l.logits(x, buffer);
    row_backward_({l.take(grad_loss, i, n), l.take(grad_entropy, i, n), l.take(grad_logsumexp, i, n),
                   l.take(grad_collision, i, n)},
                  logits, l.take(target, i, n), weight, l.take(stats, i, n, /*dim=*/1), o.row);
    grads.add(i, x, logits);
  });
  const auto [x, w, b] = grads.all(linear_weight);
  const auto type = input.scalar_type();
  return {x.to(type), w.to(type), b.to(type)};
}

// ---- without data: sizes may be symbols; what a row operator returns it says itself

Tensor meta_logits(const Tensor& input, const Tensor& linear_weight) {
  return at::empty_symint(linear_logits_sizes(input, linear_weight), input.options().dtype(acc_type({&input})));
}
LinearGradients meta_gradients(const Tensor& input, const Tensor& linear_weight, int64_t gradients,
                               at::ScalarType type) {
  const auto sizes = linear_weight.sym_sizes();
  const auto one = [&](int64_t bit, c10::SymIntArrayRef sizes) {
    const auto options = input.options().dtype(type);
    return gradients & bit ? at::empty_symint(sizes, options) : at::empty({0}, options);
  };
  return {one(1, input.sym_sizes()), one(2, sizes), one(4, sizes.slice(0, sizes.size() - 1))};
}

LinearOutputs linear_cross_entropy_meta(const Tensor& input, const Tensor& linear_weight,
                                        const MaybeTensor& linear_bias, const Tensor& target, const MaybeTensor& weight,
                                        const MaybeTensor& token_weight, int64_t ignore_index, double label_smoothing,
                                        double logit_scale, double softcap, bool skip_masked_rows, int64_t chunk_size,
                                        bool compact, double z_loss, int64_t reduction, int64_t gradients,
                                        CECE_SHARD_PARAMETERS) {
  const LinearOptions o{
      {ignore_index, label_smoothing, logit_scale, softcap, skip_masked_rows, CECE_SHARD}, chunk_size, compact};
  if (Reduction(reduction) == Reduction::none) {
    return linear_cross_entropy_by_rows(input, linear_weight, linear_bias, target, weight, token_weight, o, z_loss,
                                        Reduction::none);
  }
  const Tensor loss =
      std::get<0>(row_forward(meta_logits(input, linear_weight), target, weight, o.row, RowLoss::wanted(z_loss)));
  const auto [x, w, b] = meta_gradients(input, linear_weight, gradients, acc_type({&input}));
  return {at::empty({}, loss.options()), at::empty_like(loss), at::empty({}, loss.options()), x, w, b};
}
TokenOutputs linear_token_statistics_forward_meta(const Tensor& input, const Tensor& linear_weight, const MaybeTensor&,
                                                  const MaybeTensor& target, const MaybeTensor& weight,
                                                  int64_t ignore_index, double label_smoothing, double logit_scale,
                                                  double softcap, bool skip_masked_rows, int64_t, bool, int64_t wanted,
                                                  CECE_SHARD_PARAMETERS) {
  return row_forward(meta_logits(input, linear_weight), target, weight,
                     {ignore_index, label_smoothing, logit_scale, softcap, skip_masked_rows, CECE_SHARD}, wanted);
}
LinearGradients linear_token_statistics_backward_meta(const MaybeTensor&, const MaybeTensor&, const MaybeTensor&,
                                                      const MaybeTensor&, const Tensor& input,
                                                      const Tensor& linear_weight, const MaybeTensor&,
                                                      const MaybeTensor&, const MaybeTensor&, const Tensor&, int64_t,
                                                      double, double, double, bool, int64_t, bool, int64_t,
                                                      int64_t gradients, int64_t, std::optional<int64_t>, int64_t,
                                                      const std::string&) {
  return meta_gradients(input, linear_weight, gradients, input.scalar_type());
}

}  // namespace

TokenOutputs call_linear_rows(const Tensor& x, const Tensor& linear_weight, const MaybeTensor& linear_bias,
                              const MaybeTensor& target, const MaybeTensor& weight, const LinearOptions& o,
                              int64_t wanted) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("cece::linear_token_statistics_forward", "")
          .typed<TokenOutputs(const Tensor&, const Tensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&,
                              int64_t, double, double, double, bool, int64_t, bool, int64_t, int64_t,
                              std::optional<int64_t>, int64_t, const std::string&)>();
  const TokenOptions& r = o.row;
  return op.call(x, linear_weight, linear_bias, target, weight, r.ignore_index, r.label_smoothing, r.logit_scale,
                 r.softcap, r.skip_masked_rows, o.chunk_size, o.compact, wanted, r.shard.first, r.shard.all,
                 r.shard.ranks.count, r.shard.ranks.group);
}

LinearOutputs linear_cross_entropy_by_rows(const Tensor& x, const Tensor& linear_weight, const MaybeTensor& linear_bias,
                                           const Tensor& target, const MaybeTensor& weight,
                                           const MaybeTensor& token_weight, const LinearOptions& o, double z_loss,
                                           Reduction reduction) {
  const RowLoss row(call_linear_rows(x, linear_weight, linear_bias, target, weight, o, RowLoss::wanted(z_loss)), target,
                    o.row, z_loss);
  Tensor loss = row.weighted(token_weight);
  if (reduction != Reduction::none) loss = sum_of_rows(loss);
  if (reduction == Reduction::mean) loss = loss / sum_of_rows(row.shares(target, weight));
  const auto none = [&] { return at::empty({0}, loss.options()); };
  return {loss, none(), none(), none(), none(), none()};
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
