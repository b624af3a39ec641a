// Derivatives of the divergences of two rows.
#include <torch/library.h>

#include "../ranks.h"
#include "node.h"

namespace cece {
namespace {

struct DivergenceOptions {
  double temperature;
  bool symmetric;
  Ranks ranks;            // that share the classes
  bool of_other = false;  // of a backward: whose gradient it is

  auto all() { return std::tie(temperature, symmetric, ranks.count, ranks.group, of_other); }
};

std::tuple<Tensor, Tensor> call_divergence_forward(const Tensor& x, const Tensor& y, const MaybeTensor& mask,
                                                   const DivergenceOptions& o) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("cece::divergence_forward", "")
          .typed<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const MaybeTensor&, double, bool)>();
  return op.call(x, y, mask, o.temperature, o.symmetric);
}
std::tuple<Tensor, Tensor> call_divergence_merge(const Tensor& parts, double temperature) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("cece::divergence_merge", "")
                             .typed<std::tuple<Tensor, Tensor>(const Tensor&, double)>();
  return op.call(parts, temperature);
}
std::tuple<Tensor, Tensor> call_sharded_divergence_forward(const Tensor& x, const Tensor& y, const MaybeTensor& mask,
                                                           const DivergenceOptions& o) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("cece::sharded_divergence_forward", "")
                             .typed<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const MaybeTensor&, double,
                                                               int64_t, const std::string&)>();
  return op.call(x, y, mask, o.temperature, o.ranks.count, o.ranks.group);
}
Tensor call_divergence_backward(const Tensor& g, const Tensor& x, const Tensor& y, const MaybeTensor& mask,
                                const Tensor& stats, const DivergenceOptions& o, bool of_other) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("cece::divergence_backward", "")
                             .typed<Tensor(const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&,
                                           const Tensor&, double, bool, bool, int64_t, const std::string&)>();
  return op.call(g, x, y, mask, stats, o.temperature, o.symmetric, of_other, o.ranks.count, o.ranks.group);
}

// A row's numbers but the one that its parts have no use for, of all ranks, as one row's.
std::tuple<Tensor, Tensor> sharded(const Tensor& x, const Tensor& y, const MaybeTensor& mask, double temperature,
                                   int64_t ranks, const std::string& group) {
  const DivergenceOptions o{temperature, /*symmetric=*/false, {ranks, group}};
  auto out = call_divergence_forward(x, y, mask, o);
  if (ranks == 1) return out;
  return call_divergence_merge(gather(std::get<1>(out).narrow(0, 0, kPartNumbers), o.ranks), temperature);
}

// One call in plain torch operators; shapes (N, C, d...), rows (N, 1, d...). The gradients of a row's divergence are
//   KL   in x: (p - q) / T                              in y: q (log(q / p) - KL) / T
//   JS   in x: p (log(p / m) - KL(p || m)) / (2 T)      in y: the same with p and q in each other's place
struct DivergenceFormulas {
  Tensor x, y, mask, stats;
  DivergenceOptions o;
  int64_t dim;
  at::ScalarType acc;
  Tensor p, q, log_p, log_q;

  DivergenceFormulas(const Tensor& x, const Tensor& y, const Tensor& mask, const Tensor& stats,
                     const DivergenceOptions& o)
      : x(x), y(y), mask(mask), stats(stats), o(o), dim(x.dim() == 1 ? 0 : 1), acc(acc_type({&x, &y})) {
    std::tie(p, log_p) = softmax(x, 0);
    std::tie(q, log_q) = softmax(y, 1);
  }

  // a, but 0 in rows that are left out, whatever is in them. Of inputs, not of results: what came of a NaN would be
  // NaN again in the next derivative.
  Tensor used(const Tensor& a) const {
    return mask.defined() ? a.masked_fill(mask.logical_not().unsqueeze(dim), 0) : a;
  }
  Tensor scaled(const Tensor& grad) const { return used(copy_to_shards(grad, o.ranks).unsqueeze(dim)); }
  Tensor sum(const Tensor& a) const { return sum_for_shards(a.sum(dim, true), o.ranks); }

  // The change of the gradient in x, or in y (of_other), of a divergence, along a change of x and of y, either of which
  // may be absent. Second derivatives are symmetric: what a gradient along v is in x and y is its change along v.
  Tensor change(const Tensor& dx, const Tensor& dy) const {
    const double square = o.temperature * o.temperature;
    if (!o.symmetric) {
      Tensor d;
      if (dx.defined()) d = o.of_other ? -of_softmax(q, dx) : of_softmax(p, dx);
      if (dy.defined()) d = plus(d, o.of_other ? of_target(dy) : -of_softmax(q, dy));
      return d / square;
    }
    const Tensor both = p + q, log_m = at::log(at::where(both > 0, both, 1) / 2);
    // of log p and log q, if p is whose gradient it is, else of log q and log p
    const Tensor dp = dx.defined() ? centred(p, dx) : at::zeros_like(p);
    const Tensor dq = dy.defined() ? centred(q, dy) : at::zeros_like(q);
    const Tensor& mine = o.of_other ? q : p;
    const Tensor& own = o.of_other ? dq : dp;
    const Tensor& other = o.of_other ? dp : dq;
    const Tensor share = (o.of_other ? p : q) / at::where(both > 0, both, 1);
    const Tensor lambda = times(mine, (o.of_other ? log_q : log_p) - log_m);  // mine log(mine / m)
    const Tensor rise = mine * share * (own - other);
    const Tensor level = sum(lambda), level_rise = sum(lambda * own + rise);
    return (lambda * own - mine * level * own + rise - mine * level_rise) / (2 * square);
  }
  Tensor along(const Tensor& g, const Tensor& dx, const Tensor& dy) const {
    return scaled(g) * change(dx.defined() ? used(dx) : dx, dy.defined() ? used(dy) : dy);
  }

  // d(divergence), for a change v of x or of y. Not in their dtype: it is added up before it is rounded.
  Tensor along_gradient(const Tensor& v, bool of_other) const {
    const Tensor ones = at::ones_like(stats.select(0, 0));
    const Tensor slope = call_divergence_backward(ones, x.to(acc), y.to(acc), maybe(mask), stats, o, of_other);
    return sum_of_shards((slope * used(v)).sum(dim), o.ranks);
  }

 private:
  // Masses and their logarithms. In a row that is one certain class, whose maximum is +inf, finite numbers far apart
  // say so too.
  std::tuple<Tensor, Tensor> softmax(const Tensor& a, int64_t row) const {
    const Tensor max = stats.select(0, row);
    const Tensor proper = stats.narrow(0, 2, 2).gt(-1).all(0);
    const Tensor certain = (max == std::numeric_limits<double>::infinity()).logical_and(proper);
    const double far = largest() * std::min(1.0, o.temperature);  // finite, too, when it is divided by that
    const Tensor most = at::full_like(max, std::numeric_limits<double>::infinity()).masked_fill(certain, far);
    const Tensor u = at::minimum(used(a).to(acc), most.unsqueeze(dim)) / o.temperature;
    if (o.ranks.count == 1) return {at::softmax(u, dim), bounded(at::log_softmax(u, dim))};
    const Tensor d = u - at::minimum(max, most).unsqueeze(dim) / o.temperature, log_mass = d - sum(d.exp()).log();
    return {log_mass.exp(), bounded(log_mass)};
  }
  double largest() const {
    return acc == at::kDouble ? std::numeric_limits<double>::max() : std::numeric_limits<float>::max();
  }
  Tensor bounded(const Tensor& log) const { return log.clamp_min(-largest() / 4); }
  Tensor centred(const Tensor& p, const Tensor& v) const { return v - sum(p * v); }
  Tensor of_softmax(const Tensor& p, const Tensor& v) const { return p * centred(p, v); }
  Tensor of_target(const Tensor& v) const {  // of q (d - KL), along v of y
    const Tensor d = log_q - log_p, e = centred(q, v);
    return q * (e * (d - sum(q * d) + 1) - sum(q * e * d));
  }
};

struct DivergenceBackward {
  using Options = DivergenceOptions;
  static constexpr const char* kName = "DivergenceBackward";
  static constexpr size_t kEdges = 2, kSaved = 4;  // logits, other; mask, stats

  static variable_list derive(const Options& o, const Needs& needs, const Tensors& saved, const Tensor& g) {
    variable_list out(kEdges);
    for (const bool of_other : {false, true}) {
      if (needs[of_other]) {
        out[of_other] = call_divergence_backward(g, saved[0], saved[1], maybe(saved[2]), saved[3], o, of_other);
      }
    }
    return out;
  }
};

template <class Call>
std::tuple<Tensor, Tensor> forward(Call&& call, const Tensor& x, const Tensor& y, const MaybeTensor& mask,
                                   const DivergenceOptions& o) {
  if (!all_plain(x, y, get(mask))) check_divergence_shapes(x, y, mask, o.temperature, o.symmetric);
  std::tuple<Tensor, Tensor> out;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    out = call(x, y, mask, o);
  }
  const auto& [loss, stats] = out;
  record<DivergenceBackward>({loss}, o, {x, y, get(mask), stats});
  if (has_tangent(x, y)) {
    const DivergenceFormulas f(primal(x), primal(y), get(mask), stats, o);
    const Tensor dx = tangent(x), dy = tangent(y);
    Tensor d;
    if (dx.defined()) d = f.along_gradient(dx, false);
    if (dy.defined()) d = plus(d, f.along_gradient(dy, true));
    set_tangent(loss, d);
  }
  return out;
}

std::tuple<Tensor, Tensor> divergence_forward(const Tensor& x, const Tensor& y, const MaybeTensor& mask,
                                              double temperature, bool symmetric) {
  return forward(call_divergence_forward, x, y, mask, {temperature, symmetric});
}
std::tuple<Tensor, Tensor> sharded_divergence_forward(const Tensor& x, const Tensor& y, const MaybeTensor& mask,
                                                      double temperature, int64_t ranks, const std::string& group) {
  return forward(call_sharded_divergence_forward, x, y, mask, {temperature, /*symmetric=*/false, {ranks, group}});
}

struct DivergenceBackwardBackward {
  using Options = DivergenceOptions;
  static constexpr const char* kName = "DivergenceBackwardBackward";
  static constexpr size_t kEdges = 3, kSaved = 5;  // grad, logits, other; mask, stats

  static variable_list derive(const Options& o, const Needs& needs, const Tensors& saved, const Tensor& v) {
    const Tensor &g = saved[0], &x = saved[1], &y = saved[2];
    variable_list out(kEdges);
    const auto formulas = [&](bool of_other) {
      return DivergenceFormulas(x, y, saved[3], saved[4], {o.temperature, o.symmetric, o.ranks, of_other});
    };
    if (needs[0]) out[0] = formulas(o.of_other).along_gradient(v, o.of_other).to(g.scalar_type());
    // The change of x's (y's) gradient along v, where v is in the place of this gradient's own logits.
    for (const bool other : {false, true}) {
      if (!needs[1 + other]) continue;
      const Tensor none;
      out[1 + other] =
          formulas(other).along(g, o.of_other ? none : v, o.of_other ? v : none).to((other ? y : x).scalar_type());
    }
    return out;
  }
};

Tensor divergence_backward(const Tensor& g, const Tensor& x, const Tensor& y, const MaybeTensor& mask,
                           const Tensor& stats, double temperature, bool symmetric, bool of_other, int64_t ranks,
                           const std::string& group) {
  const DivergenceOptions o{temperature, symmetric, {ranks, group}, of_other};
  Tensor grad;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    grad = call_divergence_backward(g, x, y, mask, stats, o, of_other);
  }
  record<DivergenceBackwardBackward>({grad}, o, {g, x, y, get(mask), stats});
  if (has_tangent(g, x, y)) {
    const Tensor px = primal(x), py = primal(y), dg = tangent(g), dx = tangent(x), dy = tangent(y);
    Tensor d;
    if (dg.defined()) d = call_divergence_backward(dg, px, py, mask, stats, o, of_other);
    if (dx.defined() || dy.defined()) {
      d = plus(d, DivergenceFormulas(px, py, get(mask), stats, o).along(primal(g), dx, dy));
    }
    set_tangent(grad, d);
  }
  return grad;
}

}  // namespace
}  // namespace cece

TORCH_LIBRARY_IMPL(cece, CPU, m) { m.impl("sharded_divergence_forward", cece::sharded); }
TORCH_LIBRARY_IMPL(cece, CUDA, m) { m.impl("sharded_divergence_forward", cece::sharded); }
TORCH_LIBRARY_IMPL(cece, Autograd, m) {
  m.impl("divergence_forward", cece::divergence_forward);
  m.impl("sharded_divergence_forward", cece::sharded_divergence_forward);
  m.impl("divergence_backward", cece::divergence_backward);
}
