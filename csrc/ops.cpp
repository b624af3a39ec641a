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
  // kind: which loss, a row of visit_loss (numerics.h): 0 on probabilities, 1 with logits, 2 focal, 3 asymmetric.
  // parameters: none, or keep and spread (the truth counts as keep y + spread) and the loss's own. padding: given where
  // target lists the classes that are true, (N, K) or, with offsets (N + 1), (K). reduction 3: (2), sum and count.
  m.def(
      "binary_cross_entropy_forward(Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, int kind, "
      "int reduction, Tensor? mask=None, float[] parameters=[], Tensor? offsets=None, int? padding=None) -> Tensor",
      tags);
  m.def(
      "binary_cross_entropy_backward(Tensor grad, Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, "
      "int kind, int reduction, Tensor? mask=None, float[] parameters=[], Tensor? offsets=None, int? padding=None) "
      "-> Tensor",
      tags);
}
