// Derivatives of a row's statistics.
#include <torch/library.h>

#include "rows.h"

namespace cece {
namespace {

// z = the logits as they are used; the rows' formulas are in z. The four statistics are loss, entropy, logsumexp and
// collision, in this order.
struct TokenFormulas {
  Tensor x, w, stats;
  MaybeTensor t;
  TokenOptions o;
  RowFormulas rows;

  TokenFormulas(const Tensor& x, const Tensor& t, const Tensor& w, const Tensor& stats, const TokenOptions& o)
      : x(x), w(w), stats(stats), t(maybe(t)), o(o), rows(x, t, w, stats, Tensor(), without_reduction(o)) {
    if (o.skip_masked_rows) rows.stats = stats.masked_fill(masked(), 0);
    rows.x = transformed();
  }
  Tensor masked() const { return stats.select(0, 1) == -std::numeric_limits<double>::infinity(); }
  // 0 for ignored and, where they count as ignored, masked rows.
  Tensor used(const Tensor& a) const {
    const Tensor b = rows.used(a);
    return o.skip_masked_rows ? b.masked_fill(masked().unsqueeze(rows.dim), 0) : b;
  }
  Tensor scaled() const { return used(x).to(rows.acc) * o.logit_scale; }
  Tensor transformed() const { return o.softcap > 0 ? o.softcap * (scaled() / o.softcap).tanh() : scaled(); }
  Tensor sech2() const {  // 1 - tanh^2
    const Tensor e = (-2 * (scaled() / o.softcap).abs()).exp();
    return 4 * e / (1 + e).square();
  }
  Tensor slope(const Tensor& v) const {  // dz/dx v
    const Tensor s = used(v) * o.logit_scale;
    return o.softcap > 0 ? s * sech2() : s;
  }
  Tensor curvature() const {
    return (-2 * o.logit_scale * o.logit_scale / o.softcap) * (scaled() / o.softcap).tanh() * sech2();
  }

  // The gradient of the statistics, weighted by g, in logits of the type sums are formed in.
  Tensor gradient(const TokenGrads& g) const { return row_backward(g, x.to(rows.acc), t, maybe(w), stats, o); }
  Tensor along(int64_t which, const Tensor& v) const {
    TokenGrads ones;
    ones[which] = at::ones_like(stats.select(0, 0));
    return rows.sum_of(gradient(ones) * used(v));
  }

  // What that gradient changes by along a change v of the logits. Symmetric, so it is also the gradient of (gradient .
  // v).
  Tensor along_x(const TokenGrads& g, const Tensor& v) const {
    const auto row = [&](int64_t i) { return used(rows.row(*g[i])); };
    const Tensor dz = slope(v), p = rows.softmax(), mean_dz = rows.sum(p * dz), dp = p * (dz - mean_dz);
    Tensor d;
    if (present(g[0])) d = plus(d, rows.along_x(row(0), dz));
    if (present(g[1])) {  // p (n - H), n = -log p, whose own change is sum(p dz) - dz
      const Tensor n = rows.minus_log_softmax(), h = rows.sum(times(p, n));
      const Tensor dn = mean_dz - dz, dh = rows.sum(times(dp, n));
      d = plus(d, row(1) * (times(dp, n - h) + p * (dn - dh)));
    }
    if (present(g[2])) d = plus(d, row(2) * dp);
    if (present(g[3])) {  // 2 p (p - sum p^2)
      const Tensor s = rows.sum(p.square()), ds = 2 * rows.sum(p * dp);
      d = plus(d, 2 * row(3) * (dp * (p - s) + p * (dp - ds)));
    }
    d = slope(d);
    if (o.softcap <= 0) return d;
    const TokenOptions plain{o.ignore_index, o.label_smoothing, 1, 0, o.skip_masked_rows, o.shard};
    return d + call_backward(g, rows.x, t, maybe(w), stats, plain) * curvature() * used(v);
  }
};

struct TokenStatisticsBackward {
  using Options = TokenOptions;
  static constexpr const char* kName = "TokenStatisticsBackward";
  static constexpr size_t kEdges = 3, kSaved = 4;  // logits, target, weight; stats

  static variable_list derive(const Options& o, const Needs& needs, const Tensors& saved, const variable_list& grads) {
    const Tensor &x = saved[0], &t = saved[1], &w = saved[2], &stats = saved[3];
    variable_list out(kEdges);
    if (needs[0]) {
      out[0] = row_backward({maybe(grads[0]), maybe(grads[1]), maybe(grads[2]), maybe(grads[3])}, x, maybe(t), maybe(w),
                            stats, o);
    }
    if ((needs[1] || needs[2]) && grads[0].defined()) {
      const TokenFormulas f(x, t, w, stats, o);
      const Tensor g = f.used(f.rows.row(grads[0]));
      if (needs[1]) out[1] = like(g * f.rows.target_slope(), t);
      if (needs[2]) {
        f.rows.check_weight_slope();
        out[2] = like((g * f.rows.weight_slope()).movedim(f.rows.dim, -1), w);
      }
    }
    return out;
  }
};

TokenOutputs forward(const Tensor& x, const MaybeTensor& t, const MaybeTensor& w, const TokenOptions& o,
                     int64_t wanted) {
  if (!all_plain(x, get(t), get(w))) check_token_statistics_shapes(x, t, w, o);
  TokenOutputs out;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    out = o.shard.all ? row_forward(x, t, w, o, wanted) : call_forward(x, t, w, o, wanted);
  }
  const auto& [loss, entropy, logsumexp, collision, argmax, stats] = out;
  const Tensor all[] = {loss, entropy, logsumexp, collision};
  const auto asked = [&](int64_t i) { return wanted >> i & 1 ? all[i] : Tensor(); };
  record<TokenStatisticsBackward>({asked(0), asked(1), asked(2), asked(3)}, o, {x, get(t), get(w), stats});
  if (has_tangent(x, get(t), get(w))) {
    const TokenFormulas f(primal(x), primal(get(t)), primal(get(w)), stats, o);
    const Tensor dx = tangent(x), dt = tangent(get(t)), dw = tangent(get(w));
    for (int64_t i = 0; i < 4; i++) {
      if (!(wanted >> i & 1)) continue;
      Tensor d;
      if (dx.defined()) d = f.along(i, dx);
      if (i == 0 && dt.defined()) d = plus(d, f.rows.sum_of(f.used(times(dt, f.rows.target_slope()))));
      if (i == 0 && dw.defined()) {
        f.rows.check_weight_slope();
        d = plus(d, f.rows.sum_of(f.used(times(f.rows.by_class(dw), f.rows.weight_slope()))));
      }
      set_tangent(all[i], d);
    }
  }
  return out;
}
TokenOutputs token_statistics_forward(const Tensor& x, const MaybeTensor& t, const MaybeTensor& w, int64_t ignore_index,
                                      double label_smoothing, double logit_scale, double softcap, bool skip_masked_rows,
                                      int64_t wanted) {
  return forward(x, t, w, {ignore_index, label_smoothing, logit_scale, softcap, skip_masked_rows}, wanted);
}
TokenOutputs sharded_statistics_forward(const Tensor& x, const MaybeTensor& t, const MaybeTensor& w,
                                        int64_t ignore_index, double label_smoothing, double logit_scale,
                                        double softcap, bool skip_masked_rows, int64_t wanted, int64_t first_class,
                                        int64_t all_classes, int64_t ranks, const std::string& group) {
  return forward(x, t, w, {ignore_index, label_smoothing, logit_scale, softcap, skip_masked_rows, CECE_SHARD}, wanted);
}

struct TokenStatisticsBackwardBackward {
  using Options = TokenOptions;
  static constexpr const char* kName = "TokenStatisticsBackwardBackward";
  static constexpr size_t kEdges = 7, kSaved = 8;  // four gradients, logits, target, weight; stats

  static variable_list derive(const Options& o, const Needs& needs, const Tensors& saved, const Tensor& v) {
    const TokenGrads g{maybe(saved[0]), maybe(saved[1]), maybe(saved[2]), maybe(saved[3])};
    const Tensor &x = saved[4], &t = saved[5], &w = saved[6];
    const TokenFormulas f(x, t, w, saved[7], o);
    variable_list out(kEdges);
    for (size_t i = 0; i < 4; i++) {
      if (needs[i]) out[i] = f.along(i, v).to(g[i]->scalar_type());
    }
    if (needs[4]) out[4] = f.along_x(g, v).to(x.scalar_type());
    if ((needs[5] || needs[6]) && present(g[0])) {
      const Tensor q = f.rows.onto_q(f.used(f.rows.row(*g[0])), f.slope(v));
      if (needs[5]) out[5] = like(f.rows.keep() * f.rows.weighted(q), t);
      if (needs[6]) {
        f.rows.check_weight_slope();
        out[6] = like((f.rows.smoothed() * q).movedim(f.rows.dim, -1), w);
      }
    }
    return out;
  }
};

Tensor token_statistics_backward(const MaybeTensor& g_loss, const MaybeTensor& g_entropy,
                                 const MaybeTensor& g_logsumexp, const MaybeTensor& g_collision, const Tensor& x,
                                 const MaybeTensor& t, const MaybeTensor& w, const Tensor& stats, int64_t ignore_index,
                                 double label_smoothing, double logit_scale, double softcap, bool skip_masked_rows,
                                 CECE_SHARD_PARAMETERS) {
  const TokenOptions o{ignore_index, label_smoothing, logit_scale, softcap, skip_masked_rows, CECE_SHARD};
  const TokenGrads g{g_loss, g_entropy, g_logsumexp, g_collision};
  Tensor grad;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    grad = call_backward(g, x, t, w, stats, o);
  }
  record<TokenStatisticsBackwardBackward>({grad}, o,
                                          {get(g[0]), get(g[1]), get(g[2]), get(g[3]), x, get(t), get(w), stats});
  if (has_tangent(get(g[0]), get(g[1]), get(g[2]), get(g[3]), x, get(t), get(w))) {
    const Tensor px = primal(x), pt = primal(get(t)), pw = primal(get(w));
    TokenGrads pg, dg;
    bool any = false;
    for (size_t i = 0; i < 4; i++) {
      pg[i] = maybe(primal(get(g[i]))), dg[i] = maybe(tangent(get(g[i])));
      any = any || present(dg[i]);
    }
    const Tensor dx = tangent(x), dt = tangent(get(t)), dw = tangent(get(w));
    const TokenFormulas f(px, pt, pw, stats, o);
    Tensor d;
    if (any) d = call_backward(dg, px, maybe(pt), maybe(pw), stats, o);
    if (dx.defined()) d = plus(d, f.along_x(pg, dx));
    if ((dt.defined() || dw.defined()) && present(pg[0])) {
      const Tensor s = f.used(f.rows.row(*pg[0]));
      if (dt.defined()) d = plus(d, f.slope(f.rows.along_q(s, f.rows.keep() * f.rows.weighted(dt))));
      if (dw.defined()) {
        f.rows.check_weight_slope();
        d = plus(d, f.slope(f.rows.along_q(s, f.rows.smoothed() * f.rows.by_class(dw))));
      }
    }
    set_tangent(grad, d);
  }
  return grad;
}

}  // namespace
}  // namespace cece

TORCH_LIBRARY_IMPL(cece, Autograd, m) {
  m.impl("token_statistics_forward", cece::token_statistics_forward);
  m.impl("token_statistics_backward", cece::token_statistics_backward);
  m.impl("sharded_statistics_forward", cece::sharded_statistics_forward);
}
