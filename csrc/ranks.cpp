#include "ranks.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "autograd/node.h"

namespace cece {
namespace {

// By name and with boxed arguments: a group's type in these schemas is not the same in every version of torch.
Tensor collective(const char* name, std::vector<at::IValue> arguments) {
  const auto call = [](const char* name, std::vector<at::IValue> stack) {
    c10::Dispatcher::singleton().findSchemaOrThrow(name, "").callBoxed(&stack);
    return stack[0].toTensor();
  };
  return call("_c10d_functional::wait_tensor", {call(name, std::move(arguments))});
}
bool exchanges(const Tensor& x, int64_t ranks) { return ranks > 1 && x.sym_numel() != 0; }

struct AcrossOptions {
  int64_t ranks;
  std::string group;
  bool sum, sum_gradient;

  auto all() { return std::tie(ranks, group, sum, sum_gradient); }
};

// The operator: the sum over the ranks, or x as it is; its gradient is the one or the other too.
Tensor call_across(const Tensor& x, const AcrossOptions& o) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("cece::across_ranks", "")
                             .typed<Tensor(const Tensor&, int64_t, const std::string&, bool, bool)>();
  return op.call(x, o.ranks, o.group, o.sum, o.sum_gradient);
}
Tensor compute(const Tensor& x, int64_t ranks, const std::string& group, bool sum, bool) {
  if (!sum || !exchanges(x, ranks)) return x.clone();
  return collective("_c10d_functional::all_reduce", {x.contiguous(), "sum", group});
}
Tensor meta(const Tensor& x, int64_t, const std::string&, bool, bool) { return at::empty_like(x); }

struct AcrossBackward {
  using Options = AcrossOptions;
  static constexpr const char* kName = "AcrossRanksBackward";
  static constexpr size_t kEdges = 1, kSaved = 0;

  static variable_list derive(const Options& o, const Needs&, const Tensors&, const Tensor& g) {
    return {call_across(g, {o.ranks, o.group, o.sum_gradient, o.sum})};
  }
};
Tensor differentiably(const Tensor& x, int64_t ranks, const std::string& group, bool sum, bool sum_gradient) {
  const AcrossOptions o{ranks, group, sum, sum_gradient};
  Tensor y;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    y = call_across(x, o);
  }
  record<AcrossBackward>({y}, o, {x});
  if (has_tangent(x)) set_tangent(y, call_across(tangent(x), o));
  return y;
}

}  // namespace

Tensor gather(const Tensor& x, const Ranks& ranks) {
  const Tensor mine = x.unsqueeze(0).contiguous();
  if (ranks.count == 1) return mine;
  if (!exchanges(x, ranks.count)) {
    c10::SymDimVector sizes{ranks.count};
    sizes.append(x.sym_sizes().begin(), x.sym_sizes().end());
    return at::empty_symint(sizes, x.options());
  }
  return collective("_c10d_functional::all_gather_into_tensor", {mine, ranks.count, ranks.group});
}
Tensor sum_for_shards(const Tensor& x, const Ranks& ranks) {
  return ranks.count == 1 ? x : call_across(x, {ranks.count, ranks.group, true, true});
}
Tensor sum_of_shards(const Tensor& x, const Ranks& ranks) {
  return ranks.count == 1 ? x : call_across(x, {ranks.count, ranks.group, true, false});
}
Tensor copy_to_shards(const Tensor& x, const Ranks& ranks) {
  return ranks.count == 1 ? x : call_across(x, {ranks.count, ranks.group, false, true});
}

}  // namespace cece

TORCH_LIBRARY_IMPL(cece, CPU, m) { m.impl("across_ranks", cece::compute); }
TORCH_LIBRARY_IMPL(cece, CUDA, m) { m.impl("across_ranks", cece::compute); }
TORCH_LIBRARY_IMPL(cece, Meta, m) { m.impl("across_ranks", cece::meta); }
TORCH_LIBRARY_IMPL(cece, Autograd, m) { m.impl("across_ranks", cece::differentiably); }
