// Derivatives: which node the graph gets, and every formula that is not a kernel's.
//
// Each loss has two differentiable operators, forward and backward. Reverse mode of the forward is the backward
// kernel; what follows from it in closed form, in plain differentiable torch operators, is written here: the
// derivatives of the backward (second order, and through these operators every higher one), forward mode, and the
// seldom asked gradients of targets and weights. The nodes are in C++ because a Python one costs more than the whole
// of torch's own loss at (128, 10): 70 to 117 us against 47. Every torch.func transform, torch.compile and
// torch.export see ordinary operators.
#pragma once
#include <ATen/ATen.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include "../check.h"

namespace cece {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using Tensors = std::vector<Tensor>;

constexpr int64_t kNone = 0, kMean = 1;

inline Tensor get(const MaybeTensor& t) { return t.has_value() ? *t : Tensor(); }

// A tensor of numbers in memory: no wrapper, batch, view with a changed sign or the like between them and the kernel.
inline bool plain(const Tensor& t) {
  if (!t.defined()) return true;
  const auto keys = t.key_set() - c10::autograd_dispatch_keyset_with_ADInplaceOrView - c10::autocast_dispatch_keyset;
  const auto key = keys.highestPriorityTypeId();
  return key == c10::DispatchKey::CPU || key == c10::DispatchKey::CUDA;
}
template <class... Ts>
bool all_plain(const Ts&... tensors) {
  return (plain(tensors) && ...);
}

// A node of the graph, by its rule: `derive` is a function from the call's options, the saved tensors and an incoming
// gradient to the edges' gradients; `needs` says which of them are asked for. Of a call's tensors the first kEdges have
// an edge each, the first kSaved are saved: all of them, but what is linear saves none. torch's own nodes are made like
// this; its C++ autograd::Function refuses torch.func.
using Needs = std::vector<bool>;
template <class Rule>
using CallTensors = std::array<Tensor, std::max(Rule::kEdges, Rule::kSaved)>;

template <class Rule>
struct LossNode : torch::autograd::Node {
  using Options = typename Rule::Options;

  LossNode(const Options& options, const CallTensors<Rule>& tensors) : options_(options) {
    for (size_t i = 0; i < Rule::kSaved; i++) saved_.emplace_back(tensors[i], /*is_output=*/false);
    for (size_t i = 0; i < Rule::kEdges; i++) {
      add_next_edge(tensors[i].defined() ? torch::autograd::impl::gradient_edge(tensors[i]) : torch::autograd::Edge());
    }
  }
  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    return derive(options_, needs(), unpack(), grads);
  }
  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& s : saved_) s.reset_data();
  }
  std::string name() const override { return Rule::kName; }

  // Compiled autograd: what the node depends on, and `derive` as a function of plain values, which is traced through.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    Options options = options_;
    std::apply([&](const auto&... option) { (args.collect(option), ...); }, options.all());
    args.collect(saved_, /*is_output=*/false);
  }
  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    namespace compiled = torch::dynamo::autograd;
    for (SavedVariable& s : saved_) swap.before(s);
    compiled::PackedArgs packed;
    Options options = options_;
    std::apply([&](const auto&... option) { (packed.pack(option), ...); }, options.all());
    for (const bool need : needs()) packed.pack(need);
    for (const Tensor& t : unpack()) packed.pack(t);
    std::vector<at::TypePtr> types;
    for (const at::IValue& v : packed.vec()) types.push_back(v.isTensor() ? at::TensorType::get() : v.type());
    const auto& compiler = compiled::getPyCompilerInterface();
    const std::string function = compiler->bind_function(swap.get_py_compiler(), Rule::kName, derive_packed, types,
                                                         /*is_custom_function=*/true);
    const auto outputs = compiled::IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
        compiled::get_input_metadata(next_edges()));
    variable_list results =
        compiler->call_function(swap.get_py_compiler(), "apply_functional", function, grads, packed.vec(), outputs);
    for (SavedVariable& s : saved_) swap.after(s);
    return results;
  }

 private:
  Needs needs() const {
    Needs needs(Rule::kEdges);
    for (size_t i = 0; i < needs.size(); i++) needs[i] = task_should_compute_output(i);
    return needs;
  }
  Tensors unpack() const {
    Tensors tensors;
    for (const SavedVariable& s : saved_) tensors.push_back(s.unpack());
    return tensors;
  }
  static variable_list derive(const Options& options, const Needs& needs, const Tensors& saved,
                              const variable_list& grads) {
    bool any = false;
    for (const Tensor& grad : grads) any = any || grad.defined();
    if (!any) return variable_list(needs.size());
    if constexpr (std::is_invocable_v<decltype(Rule::derive), const Options&, const Needs&, const Tensors&,
                                      const Tensor&>) {
      return Rule::derive(options, needs, saved, grads[0]);
    } else {  // of an operator with several outputs
      return Rule::derive(options, needs, saved, grads);
    }
  }
  static variable_list derive_packed(const variable_list& grads, const std::vector<at::IValue>& values) {
    torch::dynamo::autograd::PackedArgs packed(values);
    Options options;
    std::apply([&](auto&... option) { ((option = packed.unpack<std::decay_t<decltype(option)>>()), ...); },
               options.all());
    Needs needs(Rule::kEdges);
    for (size_t i = 0; i < needs.size(); i++) needs[i] = packed.unpack<bool>();
    Tensors saved;
    while (saved.size() < Rule::kSaved) saved.push_back(packed.unpack<Tensor>());
    return derive(options, needs, saved, grads);
  }

  const Options options_;
  std::vector<SavedVariable> saved_;
};

// A node as this torch owns one: by c10::intrusive_ptr, before 2.13 by std::shared_ptr.
template <class Node, class... Args>
auto make_node(Args&&... args) {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, Node>) {
    return c10::make_intrusive<Node>(std::forward<Args>(args)...);
  } else {
    return std::shared_ptr<Node>(new Node(std::forward<Args>(args)...), [](auto* node) { deleteNode(node); });
  }
}

// outputs: an undefined one is not differentiable.
template <class Rule>
void record(std::initializer_list<Tensor> outputs, const typename Rule::Options& options,
            const CallTensors<Rule>& tensors) {
  bool wanted = false;
  for (size_t i = 0; i < Rule::kEdges; i++) wanted = wanted || (tensors[i].defined() && tensors[i].requires_grad());
  if (!wanted || !at::GradMode::is_enabled()) return;
  const auto node = make_node<LossNode<Rule>>(options, tensors);
  for (const Tensor& output : outputs) {
    if (output.defined()) {
      torch::autograd::set_history(output, node);
    } else {
      node->add_input_metadata(torch::autograd::Node::undefined_input());
    }
  }
}

// Forward mode: a tensor may carry a tangent.
inline Tensor tangent(const Tensor& t) { return t.defined() ? t._fw_grad(/*level=*/0) : Tensor(); }
inline Tensor primal(const Tensor& t) { return tangent(t).defined() ? t._fw_primal(0) : t; }
template <class... Ts>
bool has_tangent(const Ts&... tensors) {
  return (tangent(tensors).defined() || ...);
}
inline void set_tangent(const Tensor& result, const Tensor& t) {
  if (t.defined()) result._set_fw_grad(t.to(result.scalar_type()), /*level=*/0, /*is_inplace_op=*/false);
}
inline Tensor plus(const Tensor& a, const Tensor& b) { return a.defined() ? a + b : b; }
inline Tensor like(const Tensor& grad, const Tensor& t) {
  return grad.sum_to_size_symint(t.sym_sizes()).to(t.scalar_type());
}
// a * b, but 0 wherever a is 0: what has no weight costs nothing, however much it would.
inline Tensor times(const Tensor& a, const Tensor& b) { return at::where(a == 0, 0, a * b); }

}  // namespace cece
