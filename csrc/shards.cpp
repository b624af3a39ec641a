// Rows whose classes are cut into shards, one a process: what each leaves of a row is gathered, and every process
// finishes the rows by itself. One exchange, of 16 bytes a row for a label's loss and 32 at most.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "row_operators.h"

namespace cece {
namespace {

template <class Gather>
TokenOutputs by_parts(const Tensor& x, const MaybeTensor& t, const MaybeTensor& w, const TokenOptions& o,
                      int64_t wanted, Gather gather) {
  const Tensor parts = call_row_parts(x, t, w, o, !by_cross_entropy(t, o, wanted));
  const bool labels = present(t) && t->dim() < x.dim();
  return call_finish_parts(gather(parts), labels ? t : std::nullopt, o, wanted);
}

TokenOutputs sharded_statistics_forward(const Tensor& x, const MaybeTensor& t, const MaybeTensor& w,
                                        int64_t ignore_index, double label_smoothing, double logit_scale,
                                        double softcap, bool skip_masked_rows, int64_t wanted, int64_t first_class,
                                        int64_t all_classes, int64_t ranks, const std::string& group) {
  const TokenOptions o{ignore_index, label_smoothing, logit_scale, softcap, skip_masked_rows, CECE_SHARD};
  return by_parts(x, t, w, o, wanted, [&](const Tensor& parts) { return gather(parts, o.shard.ranks); });
}
TokenOutputs sharded_statistics_forward_meta(const Tensor& x, const MaybeTensor& t, const MaybeTensor& w,
                                             int64_t ignore_index, double label_smoothing, double logit_scale,
                                             double softcap, bool skip_masked_rows, int64_t wanted, int64_t first_class,
                                             int64_t all_classes, int64_t ranks, const std::string& group) {
  const TokenOptions o{ignore_index, label_smoothing, logit_scale, softcap, skip_masked_rows, CECE_SHARD};
  return by_parts(x, t, w, o, wanted, [&](const Tensor& parts) {
    c10::SymDimVector sizes{ranks};
    sizes.append(parts.sym_sizes().begin(), parts.sym_sizes().end());
    return at::empty_symint(sizes, parts.options());
  });
}

}  // namespace
}  // namespace cece

TORCH_LIBRARY_IMPL(cece, CPU, m) { m.impl("sharded_statistics_forward", cece::sharded_statistics_forward); }
TORCH_LIBRARY_IMPL(cece, CUDA, m) { m.impl("sharded_statistics_forward", cece::sharded_statistics_forward); }
TORCH_LIBRARY_IMPL(cece, Meta, m) { m.impl("sharded_statistics_forward", cece::sharded_statistics_forward_meta); }
