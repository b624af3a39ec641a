// Processes that share a row: what they tell each other, by torch's own collectives (gloo, NCCL), which are reached
// through the dispatcher, so that nothing of torch.distributed is included or linked. A dead or late process ends in
// the collective's own error.
#pragma once
#include <ATen/core/Tensor.h>

#include <string>

namespace cece {

// A process group by its size and its name in torch's registry; one rank exchanges nothing.
struct Ranks {
  int64_t count = 1;
  std::string group;
};

// (count, ...): x of every rank, in rank order; x has the same shape and dtype everywhere. Not differentiable.
at::Tensor gather(const at::Tensor& x, const Ranks& ranks);

// Linear in x and differentiable, each by another of them, so in every order. A value is one rank's (a shard, a partial
// sum, whatever is made of it) or common to all. What is common has a common gradient, a sum over the ranks' uses of
// it.
at::Tensor sum_for_shards(const at::Tensor& x, const Ranks& ranks);  // sum of one rank's each, used by each rank's own
at::Tensor sum_of_shards(const at::Tensor& x, const Ranks& ranks);   // the same, used in common; gradient: as it comes
at::Tensor copy_to_shards(const at::Tensor& x,
                          const Ranks& ranks);  // common, used by each rank's own; gradient: summed

}  // namespace cece
