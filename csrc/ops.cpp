// The operators, one screen of schemas. Kernels: cpu/ops.cpp, cuda/ops.cpp. Derivatives: autograd/.
// Shapes for tracing: meta.cpp. Batching rules: cece/ops.py. reduction: 0 none, 1 mean, 2 sum, as in torch.
#include <torch/library.h>

// The last arguments of a backward: logits are a shard of the classes, whose others `ranks` processes have.
#define CECE_SHARD ", int first_class=0, int? all_classes=None, int ranks=1, str group=''"

TORCH_LIBRARY(cece, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  // loss: () or the rows' shape. stats: (3, rows...) max, log_sum and mass. total_weight: () what a mean divides by.
  m.def(
      "cross_entropy_forward(Tensor logits, Tensor target, Tensor? weight, int reduction, int ignore_index, "
      "float label_smoothing, bool inplace_backward=False) -> (Tensor loss, Tensor stats, Tensor total_weight)",
      tags);
  m.def(
      "cross_entropy_backward(Tensor grad, Tensor logits, Tensor target, Tensor? weight, Tensor stats, "
      "Tensor total_weight, int reduction, int ignore_index, float label_smoothing" CECE_SHARD ") -> Tensor",
      tags);
  m.def(
      "cross_entropy_backward_(Tensor grad, Tensor(a!) logits, Tensor target, Tensor? weight, Tensor stats, "
      "Tensor total_weight, int reduction, int ignore_index, float label_smoothing" CECE_SHARD ") -> ()",
      tags);
  // Each of the rows' shape, or of shape (0) if it is not wanted (1 loss, 2 entropy, 4 logsumexp, 8 collision, 16
  // argmax). stats: (5, rows...) max, log_sum, mass, heat and spread. softcap 0: none.
  m.def(
      "token_statistics_forward(Tensor logits, Tensor? target, Tensor? weight, int ignore_index, float "
      "label_smoothing, "
      "float logit_scale, float softcap, bool skip_masked_rows, int wanted) -> (Tensor loss, Tensor entropy, "
      "Tensor logsumexp, Tensor collision, Tensor argmax, Tensor stats)",
      tags);
  m.def(
      "token_statistics_backward(Tensor? grad_loss, Tensor? grad_entropy, Tensor? grad_logsumexp, "
      "Tensor? grad_collision, Tensor logits, Tensor? target, Tensor? weight, Tensor stats, int ignore_index, "
      "float label_smoothing, float logit_scale, float softcap, bool skip_masked_rows" CECE_SHARD ") -> Tensor",
      tags);
  m.def(
      "token_statistics_backward_(Tensor? grad_loss, Tensor? grad_entropy, Tensor? grad_logsumexp, "
      "Tensor? grad_collision, Tensor(a!) logits, Tensor? target, Tensor? weight, Tensor stats, int ignore_index, "
      "float label_smoothing, float logit_scale, float softcap, bool skip_masked_rows" CECE_SHARD ") -> ()",
      tags);
  // Classes over several processes: what a shard of the classes leaves of each row, (4, 5 or 8, rows...) numbers
  // (parts.h); the rows from those of all ranks, (ranks, numbers, rows...); and both, with the exchange in between.
  // stats: as above, and behind them, of 5 and of 8 numbers, the weight of the row's label.
  m.def(
      "row_parts(Tensor logits, Tensor? target, Tensor? weight, int ignore_index, float label_smoothing, "
      "float logit_scale, float softcap, int first_class, int all_classes, bool full) -> Tensor",
      tags);
  m.def(
      "finish_parts(Tensor parts, Tensor? target, int ignore_index, float label_smoothing, bool skip_masked_rows, "
      "int all_classes, int wanted) -> (Tensor loss, Tensor entropy, Tensor logsumexp, Tensor collision, "
      "Tensor argmax, Tensor stats)",
      tags);
  m.def(
      "sharded_statistics_forward(Tensor logits, Tensor? target, Tensor? weight, int ignore_index, float "
      "label_smoothing, float logit_scale, float softcap, bool skip_masked_rows, int wanted, int first_class, "
      "int all_classes, int ranks, str group) -> (Tensor loss, Tensor entropy, Tensor logsumexp, Tensor collision, "
      "Tensor argmax, Tensor stats)",
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
  // loss: the rows' shape. stats: (8, rows...) a numerics.h Pair. symmetric: Jensen-Shannon's, else KL(other ||
  // logits). With ranks, of a process group by its size and name, the classes are those of all ranks; parts: (ranks, 7,
  // rows...) of each rank's stats, which a merge makes those of the whole rows.
  m.def(
      "divergence_forward(Tensor logits, Tensor other, Tensor? mask, float temperature, bool symmetric) "
      "-> (Tensor loss, Tensor stats)",
      tags);
  m.def("divergence_merge(Tensor parts, float temperature) -> (Tensor loss, Tensor stats)", tags);
  m.def(
      "sharded_divergence_forward(Tensor logits, Tensor other, Tensor? mask, float temperature, int ranks, str group) "
      "-> (Tensor loss, Tensor stats)",
      tags);
  m.def(
      "divergence_backward(Tensor grad, Tensor logits, Tensor other, Tensor? mask, Tensor stats, float temperature, "
      "bool symmetric, bool of_other, int ranks=1, str group='') -> Tensor",
      tags);
  // Behind a matrix, in chunks of rows; sizes in linear.h. losses: each row's before its token_weight; total: what the
  // loss is divided by; the gradients: of the undivided sum, those that bits 1 input, 2 linear_weight, 4 linear_bias of
  // `gradients` ask for. compact: rows without a label are left out, their count read on the host.
  m.def(
      "linear_cross_entropy(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, "
      "Tensor? token_weight, int ignore_index, float label_smoothing, float logit_scale, float softcap, "
      "bool skip_masked_rows, int chunk_size, bool compact, float z_loss, int reduction, int gradients=0" CECE_SHARD
      ") -> "
      "(Tensor loss, Tensor losses, Tensor total, Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
      tags);
  m.def(
      "linear_token_statistics_forward(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor? target, "
      "Tensor? weight, int ignore_index, float label_smoothing, float logit_scale, float softcap, "
      "bool skip_masked_rows, int chunk_size, bool compact, int wanted" CECE_SHARD
      ") -> (Tensor loss, Tensor entropy, "
      "Tensor logsumexp, Tensor collision, Tensor argmax, Tensor stats)",
      tags);
  m.def(
      "linear_token_statistics_backward(Tensor? grad_loss, Tensor? grad_entropy, Tensor? grad_logsumexp, "
      "Tensor? grad_collision, Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor? target, "
      "Tensor? weight, Tensor stats, int ignore_index, float label_smoothing, float logit_scale, float softcap, "
      "bool skip_masked_rows, int chunk_size, bool compact, int wanted, int gradients" CECE_SHARD
      ") -> (Tensor grad_input, "
      "Tensor grad_weight, Tensor grad_bias)",
      tags);
  // Of a group of processes by its name: the sum of all ranks' tensors, or this one's, and so its gradient (ranks.h).
  m.def("across_ranks(Tensor input, int ranks, str group, bool sum, bool sum_gradient) -> Tensor", tags);
}
