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
  // Behind a matrix, in chunks of rows; sizes in linear.h. loss: () the sum of the rows' losses, or each row's; losses:
  // each row's before its factor row_weight; the gradients of the sum that bits 1 input, 2 linear_weight, 4 linear_bias
  // of `gradients` ask for. compact: rows without a label are left out, their count read on the host.
  m.def(
      "linear_cross_entropy(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, "
      "Tensor? row_weight, int ignore_index, float label_smoothing, float logit_scale, float softcap, "
      "bool skip_masked_rows, int chunk_size, bool compact, float z_loss, bool reduce, int gradients=0) -> "
      "(Tensor loss, Tensor losses, Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
      tags);
  m.def(
      "linear_token_statistics_forward(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor? target, "
      "Tensor? weight, int ignore_index, float label_smoothing, float logit_scale, float softcap, "
      "bool skip_masked_rows, int chunk_size, bool compact, int wanted) -> (Tensor loss, Tensor entropy, "
      "Tensor logsumexp, Tensor collision, Tensor argmax, Tensor stats)",
      tags);
  m.def(
      "linear_token_statistics_backward(Tensor? grad_loss, Tensor? grad_entropy, Tensor? grad_logsumexp, "
      "Tensor? grad_collision, Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor? target, "
      "Tensor? weight, Tensor stats, int ignore_index, float label_smoothing, float logit_scale, float softcap, "
      "bool skip_masked_rows, int chunk_size, bool compact, int wanted, int gradients) -> (Tensor grad_input, "
      "Tensor grad_weight, Tensor grad_bias)",
      tags);
}
