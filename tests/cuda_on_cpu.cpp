// The kernels of rows.cu without a GPU: the functions that a thread runs, one thread after the other.

#include "rows.cu"

#define GIVEN                                                                                              \
  const STUDENT *student, const TEACHER *teacher, const REAL *prior, const long long *labels,              \
      const REAL *sample_weight, const Flag *where, long long rows, long long classes, double temperature, \
      double weight_temperature, double gamma

#define GATHERED \
  {student, teacher, prior, labels, sample_weight, where, rows, classes, temperature, weight_temperature, gamma, \
   1.0 / temperature, 1.0 / weight_temperature}

extern "C" int bytes_of_row() { return sizeof(Row); }

extern "C" void statistics(GIVEN, Row* found, REAL* weight, REAL* mass) {
  Given g = GATHERED;
  for (long long row = 0; row < rows; ++row) {
    Partial partials[GROUP];
    for (int lane = 0; lane < GROUP; ++lane) partials[lane] = thread_statistics(g, row, lane);
    for (int half = GROUP / 2; half; half /= 2)
      for (int lane = 0; lane < half; ++lane) partials[lane] = merged(g, partials[lane], partials[lane + half]);
    Row r = finished(g, row, partials[0]);
    found[row] = r;
    weight[row] = effective_weight(g, row, r);
    mass[row] = (REAL)r.mass;
  }
}

extern "C" void gradients(GIVEN, const Row* found, const REAL* teacher_rate, const REAL* student_rate,
                          STUDENT* to_student, TEACHER* to_teacher, REAL* kl, REAL* mse, REAL* ce,
                          long long symmetric, long long tempered) {
  Given g = GATHERED;
  Asked a = {teacher_rate, student_rate, to_student, to_teacher, kl, mse, ce, symmetric, tempered};
  for (long long row = 0; row < rows; ++row) {
    Sums sums[GROUP];
    for (int lane = 0; lane < GROUP; ++lane) sums[lane] = thread_gradients(g, a, found[row], row, lane);
    for (int half = GROUP / 2; half; half /= 2)
      for (int lane = 0; lane < half; ++lane) sums[lane] = added(sums[lane], sums[lane + half]);
    end(g, a, found[row], row, sums[0]);
  }
}
