// A row in parts: what a shard of its classes leaves of it, which is all that ranks exchange, and the whole row from
// the parts of all. Merged in double and in the order of the classes, so that every rank comes to the same bits.
//
// A part is 4 numbers: max, rest, gaps and mass (numerics.h's LogSumExp and TargetGaps, the label's own mass among
// them); with class weights and labels 5, where a mean divides by the weights of labels that others have; with all
// statistics 8. In a row without a loss all are NaN, so that ranks which disagree about that see it.
#pragma once
#include <type_traits>

#include "args.h"
#include "numerics.h"

namespace cece {

enum : int { kPlainPart = 4, kWeightedPart = 5, kFullPart = 8 };

// Where a label is another shard's, its weight here is NaN: exactly one shard must have it.
template <class A, class T>
CECE_HD void write_part(const CrossEntropyArgs& a, int64_t row, const RowPart<T>& s, T label_weight) {
  A* const out = static_cast<A*>(a.parts) + row;
  const T numbers[] = {s.sums.max, s.sums.rest, s.target.gaps, s.target.mass, label_weight, s.sums.heat, s.sums.square};
#pragma unroll
  for (int i = 0; i < 7; i++) {
    if (i < a.part_numbers) out[i * a.rows.count] = A(numbers[i]);
  }
  // An integer in the place of a number: a float would not hold 2^24 + 1. Never among classes: the largest.
  if (a.part_numbers == kFullPart) {
    using Index = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
    constexpr Index kNone = std::numeric_limits<Index>::max();
    reinterpret_cast<Index*>(out)[7 * a.rows.count] = s.argmax == s.kNowhere ? kNone : Index(s.argmax);
  }
}
template <class A>
CECE_HD void write_no_part(const CrossEntropyArgs& a, int64_t row) {
  for (int i = 0; i < a.part_numbers; i++) {
    (static_cast<A*>(a.parts) + row)[i * a.rows.count] = std::numeric_limits<A>::quiet_NaN();
  }
}

// The index of the first NaN is written as its complement: it comes before any largest.
CECE_HD int64_t nan_at(int64_t index) { return -1 - index; }

struct WholeRow : RowPart<double> {
  double label_weight = 1;
};
// `labelled`: the row has a label, which exactly one shard must have found among its classes. Where ranks were given
// different labels (data loaders out of step) the row is NaN.
template <class A>
CECE_HD WholeRow whole_row(const FinishPartsArgs& a, int64_t row, bool labelled) {
  WholeRow all;
  int64_t labels = 0, first_nan = -1;
  for (int64_t rank = 0; rank < a.ranks; rank++) {
    const A* const in = static_cast<const A*>(a.parts) + rank * a.part_numbers * a.rows.count + row;
    const auto number = [&](int i) { return double(in[i * a.rows.count]); };
    RowPart<double> part;
    part.sums.max = number(0), part.sums.rest = number(1);
    part.target = {number(2), number(3)};
    if (a.part_numbers >= kWeightedPart) {
      const double weight = number(4);
      if (weight == weight) all.label_weight = weight, labels++;
    }
    if (a.part_numbers == kFullPart) {
      using Index = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
      part.sums.heat = number(5), part.sums.square = number(6);
      const Index argmax = reinterpret_cast<const Index*>(in)[7 * a.rows.count];
      if (argmax < 0 && first_nan < 0) first_nan = nan_at(argmax);
      if (argmax >= 0 && argmax < std::numeric_limits<Index>::max()) part.argmax = argmax;
    }
    rank == 0 ? void(static_cast<RowPart<double>&>(all) = part) : all.merge(part);
  }
  if (first_nan >= 0) all.argmax = first_nan;
  // Without class weights the masses add up to 1, and a label too few or too many is off by 1 - label_smoothing.
  const bool agreed = a.part_numbers >= kWeightedPart
                          ? labels == 1
                          : !(abs_(all.target.mass - 1) > 0.5 * (1 - a.label_smoothing) + 1e-3);
  if (labelled && !agreed) all.target.gaps = all.target.mass = std::numeric_limits<double>::quiet_NaN();
  return all;
}
// Behind the statistics that a backward reads: where parts with label weights leave that of the row; else null.
template <class A>
CECE_HD A* label_weight_of(const FinishPartsArgs& a, int64_t row) {
  const int64_t at = a.part_numbers == kFullPart ? 5 : 3;
  return a.part_numbers == kPlainPart ? nullptr : static_cast<A*>(a.stats) + at * a.rows.count + row;
}
// Whether no rank had anything to say of a row.
template <class A>
CECE_HD bool nobody_has(const FinishPartsArgs& a, int64_t row) {
  bool none = true;
  for (int64_t rank = 0; rank < a.ranks; rank++) {
    const A mass = static_cast<const A*>(a.parts)[(rank * a.part_numbers + 3) * a.rows.count + row];
    none = none && mass != mass;
  }
  return none;
}

}  // namespace cece
