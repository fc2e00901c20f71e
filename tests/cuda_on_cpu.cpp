// The kernels of cuda.cu without a GPU: the functions that a thread runs, one thread after the other.

#include <cmath>

#include "cuda.cu"

extern "C" int bytes_of_row() { return sizeof(RowStatistics); }

extern "C" void statistics(GIVEN, RowStatistics *found, REAL *weight, REAL *mass, REAL *base) {
  const Given g = GATHERED;
  for (int64_t row = 0; row < rows; ++row) {
    Partial partials[GROUP];
    for (int lane = 0; lane < GROUP; ++lane) partials[lane] = thread_statistics(g, row, lane);
    for (int half = GROUP / 2; half; half /= 2)
      for (int lane = 0; lane < half; ++lane) partials[lane] = merged(g, partials[lane], partials[lane + half]);
    const RowStatistics r = finished(g, row, partials[0]);
    found[row] = r;
    weight[row] = sample_weight(g, row, r);
    mass[row] = r.mass;
    base[row] = r.base;
  }
}

extern "C" void gradients(GIVEN, const RowStatistics *found, ASKED) {
  const Given g = GATHERED;
  const Asked a = {ce_factor, energy_factor, to_student, to_teacher, kl, ce, energy, symmetric != 0};
  for (int64_t row = 0; row < rows; ++row) {
    Sums sums[GROUP];
    for (int lane = 0; lane < GROUP; ++lane) sums[lane] = thread_gradients(g, a, found[row], row, lane);
    for (int half = GROUP / 2; half; half /= 2)
      for (int lane = 0; lane < half; ++lane) sums[lane] = added(sums[lane], sums[lane + half]);
    finish_values(g, a, found[row], row, sums[0]);
  }
}
