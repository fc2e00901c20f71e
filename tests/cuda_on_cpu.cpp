// The kernels of cuda.cu without a GPU: the functions that a thread runs, one thread after the other.

#include <cmath>

#include "cuda.cu"

// In the order of a GPU: within each warp, then the warps.
template <class T, class Merge> const T &all_merged(T *x, int n, Merge merge) {
  for (int warp = 0; warp < n; warp += 32)
    for (int half = 16; half; half /= 2)
      for (int lane = warp; lane < warp + half; ++lane) x[lane] = merge(x[lane], x[lane + half]);
  for (int half = n / 2; half >= 32; half /= 2)
    for (int lane = 0; lane < half; lane += 32) x[lane] = merge(x[lane], x[lane + half]);
  return x[0];
}

template <bool Guarded> Partial partial_of(const Given &g, int64_t row) {
  Origin origins[GROUP];
  Partial partials[GROUP];
  for (int lane = 0; lane < GROUP; ++lane) origins[lane] = thread_origin<Guarded>(g, row, lane);
  const Origin origin = all_merged(origins, GROUP, [](const Origin &a, const Origin &b) { return merged(a, b); });
  for (int lane = 0; lane < GROUP; ++lane) partials[lane] = thread_statistics<Guarded>(g, row, lane, origin);
  return all_merged(partials, GROUP, [&](const Partial &a, const Partial &b) { return merged(g, a, b); });
}

extern "C" int bytes_of_row() { return sizeof(RowStatistics); }

extern "C" void statistics(GIVEN, RowStatistics *found) {
  const Given g = GATHERED;
  for (int64_t row = 0; row < rows; ++row) {
    if (exponents_are_finite(g)) {
      const Partial x = partial_of<false>(g, row);
      if (logits_are_bounded(x)) {
        found[row] = finished(g, row, x, false);
        continue;
      }
    }
    found[row] = finished(g, row, partial_of<true>(g, row), true);
  }
}

extern "C" void batch(const RowStatistics *found, int64_t rows, int64_t squares, REAL gamma, REAL *largest_weight,
                      REAL *largest_base, REAL *weight, REAL *squared_mass) {
  Totals<REAL> maxima[BLOCK];
  BatchSums sums[BLOCK];
  for (int lane = 0; lane < BLOCK; ++lane) maxima[lane] = thread_maxima(found, rows, squares != 0, lane);
  Totals<REAL> scales =
      all_merged(maxima, BLOCK, [](const Totals<REAL> &a, const Totals<REAL> &b) { return merged(a, b); });
  scales.largest_weight = power_of_two_below(scales.largest_weight);
  scales.largest_base = squares ? invertible(scales.largest_base) : REAL(1);
  for (int lane = 0; lane < BLOCK; ++lane) sums[lane] = thread_sums(found, rows, squares != 0, gamma, scales, lane);
  const BatchSums all =
      all_merged(sums, BLOCK, [](const BatchSums &a, const BatchSums &b) { return merged(a, b); });
  *largest_weight = scales.largest_weight;
  *largest_base = scales.largest_base;
  *weight = value_of(all.weight);
  *squared_mass = value_of(all.squared_mass);
}

extern "C" void gradients(GIVEN, const RowStatistics *found, ASKED) {
  const Given g = GATHERED;
  const Asked a = ASKED_FOR;
  for (int64_t row = 0; row < rows; ++row) {
    const Factors f = with_upstream(a, factors_of(g, a, found[row]), row);
    const RowStatistics r = guarded_for(g, found[row], f);
    const bool summed = needs_sums(a, r);
    Sums sums[GROUP];
    for (int lane = 0; lane < GROUP; ++lane) sums[lane] = thread_results(g, a, r, f, summed, row, lane);
    const Sums all = all_merged(sums, GROUP, [](const Sums &x, const Sums &y) { return merged(x, y); });
    write_losses(g, a, summed ? settled(g, r, all) : r, row);
  }
}
