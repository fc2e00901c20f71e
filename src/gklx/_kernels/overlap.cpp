// How many classes are among the k largest of both networks.
//
// Compiled once, with the instructions that every processor of the family has. A function template of the standard
// library that is instantiated for several instruction sets is linked once, perhaps with instructions that the processor
// lacks.

#include <algorithm>

#include "cpu.h"
#include "row.h"

namespace {

// Not NaN, which has no place in an order.
template <class R> R maximum(const R *x, int64_t n) {
  Order<R> found = order_of(-Real<R>::inf);
  SIMD(reduction(max : found))
  for (int64_t j = 0; j < n; ++j) {
    const Order<R> here = order_of(is_nan(x[j]) ? -Real<R>::inf : x[j]);
    found = here > found ? here : found;
  }
  return number_of<R>(found);
}

// The classes of the k largest logits, the largest first and the lower class first of equal ones; NaN is none of them.
// Returns how many there are.
template <class R> int64_t largest(const R *x, int64_t n, int64_t k, R *maxima, int32_t *classes) {
  // Each of the k groups with the largest maxima holds a logit that is not below the k-th maximum. So none of the k
  // largest logits is below it.
  int64_t size = 256;
  while (size > 8 && n / size < 4 * k) size /= 2;
  const int64_t groups = (n + size - 1) / size;
  for (int64_t i = 0; i < groups; ++i) maxima[i] = maximum(x + i * size, std::min(size, n - i * size));
  R bound = -Real<R>::inf;
  if (k < groups) {
    R *const sorted = maxima + groups;
    std::copy(maxima, maxima + groups, sorted);
    std::nth_element(sorted, sorted + k - 1, sorted + groups, [](R a, R b) { return a > b; });
    bound = sorted[k - 1];
  }
  int64_t found = 0;
  for (int64_t i = 0; i < groups; ++i) {
    if (maxima[i] < bound) continue;
    for (int64_t j = i * size; j < std::min((i + 1) * size, n); ++j) {
      classes[found] = int32_t(j);
      found += x[j] >= bound;
    }
  }
  const auto before = [x](int32_t a, int32_t b) { return x[a] > x[b] || (x[a] == x[b] && a < b); };
  if (found > k) std::nth_element(classes, classes + k, classes + found, before);
  found = std::min(found, k);
  std::sort(classes, classes + found, before);
  return found;
}

template <class R> void find_overlaps(const gklx_call &call, int64_t row, const R *s, const R *t, R *const scratch[4]) {
  const int64_t n = call.classes, k = call.top_k[call.top_ks - 1];
  int32_t *const of_student = (int32_t *)scratch[0], *const of_teacher = (int32_t *)scratch[1];
  const int64_t students = largest(s, n, k, scratch[2], of_student);
  const int64_t teachers = largest(t, n, k, scratch[2], of_teacher);
  // The ranks of the student's classes, sorted by class.
  int32_t *const ranks = (int32_t *)scratch[3];
  for (int64_t i = 0; i < students; ++i) ranks[i] = int32_t(i);
  std::sort(ranks, ranks + students, [=](int32_t a, int32_t b) { return of_student[a] < of_student[b]; });
  int32_t *const overlaps = call.overlaps + row * call.top_ks;
  std::fill(overlaps, overlaps + call.top_ks, 0);
  for (int64_t i = 0; i < teachers; ++i) {
    const auto below = [=](int32_t rank, int32_t wanted) { return of_student[rank] < wanted; };
    const int32_t *const at = std::lower_bound(ranks, ranks + students, of_teacher[i], below);
    if (at == ranks + students || of_student[*at] != of_teacher[i]) continue;
    for (int64_t j = 0; j < call.top_ks; ++j) overlaps[j] += std::max(i, int64_t(*at)) < call.top_k[j];
  }
}

}  // namespace

void overlaps_of(const gklx_call &call, int64_t row, const float *s, const float *t, float *const scratch[4]) {
  find_overlaps(call, row, s, t, scratch);
}

void overlaps_of(const gklx_call &call, int64_t row, const double *s, const double *t, double *const scratch[4]) {
  find_overlaps(call, row, s, t, scratch);
}
