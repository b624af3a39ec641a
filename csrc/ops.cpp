// The operators, one screen of schemas. Kernels: cpu/ops.cpp, cuda/ops.cpp. Derivatives: autograd/.
// Shapes for tracing: meta.cpp. Batching rules: cece/ops.py. reduction: 0 none, 1 mean, 2 sum, as in torch.
#include <torch/library.h>

TORCH_LIBRARY(cece, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  // loss: () or the rows' shape. stats: (3, rows...) max, log_sum and mass. total_weight: () what a mean divides by.
  m.def(
      "cross_entropy_forward(Tensor logits, Tensor target, Tensor? weight, int reduction, int ignore_index, "
      "float label_smoothing, bool inplace_backward=False) -> (Tensor loss, Tensor stats, Tensor total_weight)",
      tags);
  m.def(
      "cross_entropy_backward(Tensor grad, Tensor logits, Tensor target, Tensor? weight, Tensor stats, "
      "Tensor total_weight, int reduction, int ignore_index, float label_smoothing) -> Tensor",
      tags);
  m.def(
      "cross_entropy_backward_(Tensor grad, Tensor(a!) logits, Tensor target, Tensor? weight, Tensor stats, "
      "Tensor total_weight, int reduction, int ignore_index, float label_smoothing) -> ()",
      tags);
  m.def(
      "binary_cross_entropy_forward(Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, "
      "bool with_logits, int reduction) -> Tensor",
      tags);
  m.def(
      "binary_cross_entropy_backward(Tensor grad, Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, "
      "bool with_logits, int reduction) -> Tensor",
      tags);
  // loss: the rows' shape. stats: (8, rows...) a numerics.h Pair. symmetric: Jensen-Shannon's, else KL(other ||
  // logits).
  m.def(
      "divergence_forward(Tensor logits, Tensor other, Tensor? mask, float temperature, bool symmetric) "
      "-> (Tensor loss, Tensor stats)",
      tags);
  m.def(
      "divergence_backward(Tensor grad, Tensor logits, Tensor other, Tensor? mask, Tensor stats, float temperature, "
      "bool symmetric, bool of_other) -> Tensor",
      tags);
}
