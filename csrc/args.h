// What a kernel is given: plain structs of pointers, sizes and strides. No torch here: both backends share them.
//
// A tensor is seen as rows x classes. Rows are the batch and spatial dimensions (N, d1, ..., dk), merged where
// their strides allow, in their logical order: row r is element r of the contiguous loss and index target.
#pragma once
#include <cstdint>

namespace cece {

constexpr int kMaxDims = 12;  // merged dimensions; check.h copies a tensor that needs more

enum class Dtype : int32_t { f64, f32, f16, bf16, u8, i8, i16, i32, i64 };  // bool is u8
// torch's numbers; `counted` is the sum, and beside it how many elements went into it
enum class Reduction : int32_t { none = 0, mean = 1, sum = 2, counted = 3 };

struct Shape {
  int dims;
  int64_t size[kMaxDims];
  int64_t count;  // product of size
};

struct Operand {
  void* data;  // null: absent
  Dtype dtype;
  int64_t class_stride;      // elements; unused by elementwise losses
  int64_t stride[kMaxDims];  // elements, one for each of Shape's dims; 0 where broadcast
};

// Acc is the type sums are formed in: double for f64 logits, else float.
struct CrossEntropyArgs {
  Shape rows;
  int64_t classes;
  int64_t first_class, all_classes;  // of a shard, which has some of a row's classes; labels count from the row's first
  Operand logits;                    // rows x classes
  Operand probabilities;             // rows x classes, or absent: then `labels`
  const void* labels;                // (rows), contiguous: u8, i32 or i64
  Dtype label_dtype;
  const void* weight;  // (classes) Acc, or null
  int64_t ignore_index;
  double label_smoothing;
  Reduction reduction;

  void* stats;         // (3, rows) Acc: max, log_sum, mass
  void* loss;          // (rows) Acc; scratch unless reduction is none
  void* reduced;       // () Acc: the mean or sum
  void* total_weight;  // () Acc: what a mean divides by, 1 with reduction none
  int64_t* bad_row;    // CPU: the first row with an impossible label, or rows.count
  void* parts;         // (part_numbers, rows) Acc: a shard's rows (parts.h), and nothing of the above; or null
  int part_numbers;

  const void* grad_loss;  // Acc: (rows), or () when reduced
  int64_t grad_stride;    // 1 or 0
  Operand grad_logits;    // rows x classes
};

// The divergence of two rows of logits, x and y, for every row.
constexpr int kPairNumbers = 8;  // that are saved of a row: numerics.h's Pair
constexpr int kPartNumbers = 7;  // of these, that tell of a part of it: the first
struct DivergenceArgs {
  Shape rows;
  int64_t classes;
  Operand x, y;         // rows x classes
  const uint8_t* mask;  // (rows): 0 where a row is left out; or null
  bool symmetric;       // Jensen-Shannon's, else KL(y || x)
  double cold;          // 1 / temperature

  void* stats;  // (kPairNumbers, rows) Acc
  void* loss;   // (rows) Acc

  const void* grad_loss;  // (rows) Acc
  bool of_y;              // the gradient is y's, else x's
  Operand grad;           // rows x classes

  const void* parts;  // (count_parts, kPartNumbers, rows) Acc: rows in parts, to be merged
  int64_t count_parts;
};

// Rows with all their statistics (numerics.h), each an array (rows) Acc, null where it is not asked for. Always
// Reduction::none; stats: (5, rows) max, log_sum, mass, heat, spread. Labels and probabilities may both be absent.
struct TokenStatisticsArgs : CrossEntropyArgs {
  double logit_scale, softcap;  // softcap 0: none
  bool skip_masked_rows;        // a row of -inf counts as ignored
  void *entropy, *logsumexp, *collision;
  int64_t* argmax;
  const void *grad_entropy, *grad_logsumexp, *grad_collision;  // beside grad_loss, which may be null here
};

// The rows of all shards from their parts: what TokenStatisticsArgs says of results. Labels are among all classes.
struct FinishPartsArgs : TokenStatisticsArgs {
  int64_t ranks;  // parts: (ranks, part_numbers, rows), in the order of their classes
};

// A truth that is 1 at the listed classes of each row, else 0. Element i of the shape, which is (rows, classes) in
// logical order, is class i % classes of row i / classes; its labels are those from begin(row) to begin(row + 1).
struct ListedTruth {
  Operand labels;          // contiguous, any integer; absent: there is a dense target
  const int64_t* offsets;  // (rows + 1), or null: `each` labels a row
  int64_t each, count;     // count: of all labels
  int64_t classes;
  int64_t padding;  // a label that is none
};

// Elementwise: one loss for each element of `shape`, whose dimensions are in the order of the input's memory, with a
// listed truth in logical order.
struct BinaryCrossEntropyArgs {
  Shape shape;
  Operand input, target;       // target: absent where `listed` has the truth
  Operand weight, pos_weight;  // broadcast by zero strides, or absent
  Operand mask;                // u8, 0 where an element is left out; broadcast, or absent
  ListedTruth listed;
  int64_t kind;         // a row of visit_loss (numerics.h)
  double own[4];        // that loss's parameters
  double keep, spread;  // the truth counts as keep y + spread
  Reduction reduction;

  void* loss;     // shape, Acc, contiguous; null unless reduction is none
  void* partial;  // (chunks, 2) double or null: sums and counts in a fixed order
  int64_t* bad;   // CPU: the first element that is no probability, or label that is no class; INT64_MAX: none
  void* reduced;  // () Acc, or (2) when counted

  Operand grad_loss;   // Acc, broadcast when reduced
  Operand grad_input;  // shape
};

}  // namespace cece
