// The loops of a GPU over the classes of a row, in two kernels that each read the logits once.
//
// `statistics` finds what a row must know of itself: maxima, normalisers, W, the mean of d. `gradients` then has every
// class's share of the values and both gradients. The formulas, and what becomes of infinities and NaN, are those of
// _core/formulas.py.
//
// A row belongs to a group of GROUP threads; BLOCK / GROUP rows share a block. What a thread does, how the results of two
// threads merge and how a row ends are plain functions, so that the tests can run them on a CPU, thread by thread.
//
// All is computed in REAL: most GPUs do 32 or 64 times as much in float as in double. Sums therefore keep what their
// additions round off. As in cpu.cpp, d is taken from that of a reference, the class that weighs most.
//
// Compiled with: REAL (float or double), STUDENT and TEACHER (types of the logits: float, double, Half or Brain), WEIGHTS
// (where the class weights come from), VECTOR (how many logits one load takes), GROUP, BLOCK.

#include "row.h"

#define UNWEIGHTED 0     // no class weights are needed
#define PROBABILITIES 1  // p itself: the teacher's softmax at T, to the power 1
#define TEACHER_POWER 2  // softmax(t / weight_temperature)^gamma
#define PRIOR_POWER 3    // prior^gamma

struct Half { uint16_t bits; };
struct Brain { uint16_t bits; };  // bfloat16

GKLX_BOTH REAL widened(float x) { return x; }
GKLX_BOTH REAL widened(double x) { return REAL(x); }
GKLX_BOTH REAL widened(Half x) { return float_of_half(x.bits); }
GKLX_BOTH REAL widened(Brain x) { return real_of(uint32_t(x.bits) << 16); }

GKLX_BOTH float to_be_rounded(float x) { return x; }
GKLX_BOTH float to_be_rounded(double x) { return rounded_to_odd(x); }
GKLX_BOTH void narrow(REAL x, float &to) { to = float(x); }
GKLX_BOTH void narrow(REAL x, double &to) { to = x; }
GKLX_BOTH void narrow(REAL x, Half &to) { to.bits = half_of_float(to_be_rounded(x)); }
GKLX_BOTH void narrow(REAL x, Brain &to) { to.bits = brain_of_float(to_be_rounded(x)); }

GKLX_BOTH float logarithm_of_1_plus(float x) { return log1pf(x); }
GKLX_BOTH double logarithm_of_1_plus(double x) { return log1p(x); }
GKLX_BOTH float product_and_sum(float a, float b, float c) { return fmaf(a, b, c); }  // rounded once
GKLX_BOTH double product_and_sum(double a, double b, double c) { return fma(a, b, c); }

constexpr REAL INF = Real<REAL>::inf;

GKLX_BOTH REAL larger(REAL a, REAL b) { return a > b ? a : b; }
GKLX_BOTH bool is_finite(REAL x) { return x - x == REAL(0); }

// A sum, and what its additions rounded off.
struct Sum {
  REAL high, low;
};

GKLX_BOTH void add(Sum &x, REAL y) {
  REAL sum = x.high + y, part = sum - x.high;
  x.low += (x.high - (sum - part)) + (y - part);  // Knuth's two-sum
  x.high = sum;
}

GKLX_BOTH void add(Sum &x, const Sum &y) {
  add(x, y.high);
  x.low += y.low;
}

GKLX_BOTH void multiply(Sum &x, REAL by) {
  x.high *= by;
  x.low *= by;
}

GKLX_BOTH REAL value_of(const Sum &x) { return is_finite(x.high) ? x.high + x.low : x.high; }

// A factor of exponents, and what its rounding left.
struct Rate {
  REAL high, low;
};

// exp(x * rate) for x <= 0. An exponent of -40 is rounded by as much as 40 units in the last place of the result.
GKLX_BOTH REAL exponential_of(REAL x, const Rate &rate) {
  const REAL product = x * rate.high, y = exponential(product);
  const REAL rounding = product_and_sum(x, rate.high, -product) + x * rate.low;
  return y == REAL(0) ? y : y + y * rounding;
}

// --- what is given ---------------------------------------------------------------------------------------------------

// What all rows have in common. Null where there is no such array.
struct Given {
  const STUDENT *student;
  const TEACHER *teacher;
  const REAL *prior;          // [classes, classes] with labels, else [rows, classes]
  const int64_t *labels;      // [rows]
  const REAL *sample_weight;  // [rows]
  const uint8_t *where;       // with the two strides below, 0 where broadcast
  int64_t rows, classes, where_row_stride, where_class_stride;
  Rate per_temperature, per_weight_temperature;
  Rate weighing;  // gamma / weight_temperature
  REAL gamma;
};

GKLX_BOTH bool is_valid(const Given &g, int64_t row, int64_t j, REAL s, REAL t) {
  if (g.where && !g.where[row * g.where_row_stride + j * g.where_class_stride]) return false;
  return s != -INF || t != -INF;
}

GKLX_BOTH REAL given_weight(const Given &g, int64_t row) { return g.sample_weight ? g.sample_weight[row] : REAL(1); }

GKLX_BOTH bool has_label(const Given &g, int64_t row) {
  return !g.labels || (g.labels[row] >= 0 && g.labels[row] < g.classes);
}

GKLX_BOTH const REAL *prior_of(const Given &g, int64_t row) {
  if (!g.labels) return g.prior + row * g.classes;
  return g.prior + (has_label(g, row) ? g.labels[row] * g.classes : 0);
}

// softmax^gamma of the teacher, relative to that of its largest logit, which t is so much below; 0^0 = 1.
GKLX_BOTH REAL teacher_weight(const Given &g, REAL below_top) {
  if (WEIGHTS == PROBABILITIES) return exponential_of(below_top, g.per_temperature);
  constexpr REAL lowest = -Real<REAL>::largest / 2;
  return exponential_of(below_top < lowest ? lowest : below_top, g.weighing);
}

// (x / base)^gamma for x up to base.
GKLX_BOTH REAL prior_weight(const Given &g, REAL x, REAL base) {
  if (g.gamma == REAL(0)) return REAL(1);
  REAL relative = base == REAL(0) ? x : x / base;
  return g.gamma == REAL(1) ? relative : exponential(log_power(relative, g.gamma));
}

// --- statistics ------------------------------------------------------------------------------------------------------

// What a thread knows of the classes it has seen. Sums of exponentials and of weights are relative to the largest so far.
struct Partial {
  REAL s_top, t_top;        // the largest logits; NaN is left out
  REAL base;                // the largest prior
  Sum s_total, t_total;     // of the exponentials at T
  Sum tau_total;            // of the teacher's at the weights' temperature
  Sum mass, moment;         // of the weights w, and of w times what d is larger than at the reference
  Difference<REAL> reference;
  REAL peak;                // how much the reference weighs: its logit of the teacher, or prior
  REAL above, below;        // of the classes with d = +inf, and -inf: the largest of the same; NONE where there is none
  bool has_valid, student_nan, teacher_nan, student_rules_out, prior_nan;
};

constexpr REAL NONE = WEIGHTS == PRIOR_POWER ? REAL(-1) : -INF;

GKLX_BOTH Partial no_classes() {
  return {-INF, -INF, 0, {0, 0}, {0, 0}, {0, 0}, {0, 0}, {0, 0}, {0, 0}, NONE, NONE, NONE, false, false, false, false, false};
}

GKLX_BOTH const Sum &mass_of(const Partial &x) { return WEIGHTS == PROBABILITIES ? x.t_total : x.mass; }

// The sums relative to larger maxima.
GKLX_BOTH void raise(const Given &g, Partial &x, REAL s_top, REAL t_top, REAL base) {
  if (s_top > x.s_top) {
    if (x.s_top != -INF) multiply(x.s_total, exponential_of(x.s_top - s_top, g.per_temperature));
    x.s_top = s_top;
  }
  if (t_top > x.t_top) {
    if (x.t_top != -INF) {
      REAL by = x.t_top - t_top;
      multiply(x.t_total, exponential_of(by, g.per_temperature));
      if (WEIGHTS == TEACHER_POWER) {
        multiply(x.tau_total, exponential_of(by, g.per_weight_temperature));
        multiply(x.mass, teacher_weight(g, by));
      }
      if (WEIGHTS == PROBABILITIES || WEIGHTS == TEACHER_POWER) multiply(x.moment, teacher_weight(g, by));
    }
    x.t_top = t_top;
  }
  if (WEIGHTS == PRIOR_POWER && base > x.base) {
    REAL by = prior_weight(g, x.base, base);
    multiply(x.mass, by);
    multiply(x.moment, by);
    x.base = base;
  }
}

GKLX_BOTH REAL deviation(const Difference<REAL> &d, const Difference<REAL> &reference) {
  return (d.high - reference.high) + (d.low - reference.low);
}

GKLX_BOTH void move_reference(Partial &x, const Difference<REAL> &to) {
  REAL by = deviation(to, x.reference);
  Sum mass = mass_of(x);
  add(x.moment, -(mass.high * by));
  x.moment.low -= mass.low * by;
  x.reference = to;
}

GKLX_BOTH void collect_one(const Given &g, REAL s, REAL t, REAL prior, Partial &x) {
  REAL of_s = s == -INF ? REAL(0) : exponential_of(s - x.s_top, g.per_temperature);
  REAL below_top = t == -INF ? -INF : t - x.t_top;
  REAL of_t = exponential_of(below_top, g.per_temperature);
  if (WEIGHTS != UNWEIGHTED) {
    REAL height = WEIGHTS == PRIOR_POWER ? prior : t;
    REAL w = WEIGHTS == PRIOR_POWER ? prior_weight(g, prior, x.base)
           : WEIGHTS == PROBABILITIES ? of_t : teacher_weight(g, below_top);
    if (is_finite(s) && is_finite(t)) {
      Difference<REAL> d = difference_at<REAL, true>(t, s);
      if (height > x.peak) {
        move_reference(x, d);
        x.peak = height;
      }
      add(x.moment, w * deviation(d, x.reference));
    } else if (s == -INF) {
      x.above = larger(height, x.above);
    } else if (t == -INF) {
      x.below = larger(WEIGHTS == PRIOR_POWER ? prior : REAL(0), x.below);
    }
    if (WEIGHTS == TEACHER_POWER) add(x.tau_total, exponential_of(below_top, g.per_weight_temperature));
    if (WEIGHTS != PROBABILITIES) add(x.mass, w);
  }
  add(x.s_total, of_s);
  add(x.t_total, of_t);
}

template <class T> struct alignas(VECTOR * sizeof(T)) Pack {
  T x[VECTOR];
};

GKLX_BOTH Partial thread_statistics(const Given &g, int64_t row, int lane) {
  Partial x = no_classes();
  if (given_weight(g, row) == REAL(0)) return x;
  const Pack<STUDENT> *student = (const Pack<STUDENT> *)(g.student + row * g.classes);
  const Pack<TEACHER> *teacher = (const Pack<TEACHER> *)(g.teacher + row * g.classes);
  const REAL *prior = WEIGHTS == PRIOR_POWER ? prior_of(g, row) : nullptr;
  for (int64_t i = lane; i < g.classes / VECTOR; i += GROUP) {
    const Pack<STUDENT> of_s = student[i];
    const Pack<TEACHER> of_t = teacher[i];
    REAL s[VECTOR], t[VECTOR], weight[VECTOR];
    bool valid[VECTOR];
    REAL s_top = x.s_top, t_top = x.t_top, base = x.base;
#pragma unroll
    for (int k = 0; k < VECTOR; ++k) {
      const int64_t j = i * VECTOR + k;
      s[k] = widened(of_s.x[k]);
      t[k] = widened(of_t.x[k]);
      weight[k] = WEIGHTS == PRIOR_POWER ? prior[j] : REAL(0);
      valid[k] = is_valid(g, row, j, s[k], t[k]);
      if (!valid[k]) continue;
      x.has_valid = true;
      x.student_nan |= is_nan(s[k]);
      x.teacher_nan |= is_nan(t[k]);
      x.student_rules_out |= s[k] == -INF;
      x.prior_nan |= !(weight[k] >= REAL(0));
      s_top = larger(s[k], s_top);
      t_top = larger(t[k], t_top);
      base = larger(weight[k], base);
    }
    raise(g, x, s_top, t_top, base);
#pragma unroll
    for (int k = 0; k < VECTOR; ++k) {
      if (valid[k]) collect_one(g, s[k], t[k], weight[k], x);
    }
  }
  return x;
}

GKLX_BOTH Partial merged(const Given &g, Partial a, Partial b) {
  const REAL s_top = larger(a.s_top, b.s_top), t_top = larger(a.t_top, b.t_top), base = larger(a.base, b.base);
  raise(g, a, s_top, t_top, base);
  raise(g, b, s_top, t_top, base);
  if (WEIGHTS != UNWEIGHTED) {
    if (a.peak >= b.peak) move_reference(b, a.reference);
    else move_reference(a, b.reference);
    a.peak = larger(a.peak, b.peak);
    a.above = larger(a.above, b.above);
    a.below = larger(a.below, b.below);
    add(a.tau_total, b.tau_total);
    add(a.mass, b.mass);
    add(a.moment, b.moment);
  }
  add(a.s_total, b.s_total);
  add(a.t_total, b.t_total);
  a.has_valid |= b.has_valid;
  a.student_nan |= b.student_nan;
  a.teacher_nan |= b.teacher_nan;
  a.student_rules_out |= b.student_rules_out;
  a.prior_nan |= b.prior_nan;
  return a;
}

// What `gradients` is told of a row: REALs alone, so that it lies in an array of them.
struct RowStatistics {
  REAL s_top, t_top;
  REAL per_s_total, per_t_total;  // of the sums of exponentials
  REAL gap_of_student;            // q - p is this times the student's exponential, and the difference of both / t_total
  REAL log_s_total, log_ratio;    // log s_total, log (t_total / s_total)
  REAL base, mass;                // W = mass * base^gamma
  Difference<REAL> reference;
  REAL mean;                      // of what d is larger than at the reference
  REAL others;                    // d less its mean in the classes where d is finite, of a row where some d is infinite
  REAL has_valid, undefined, unreachable, infinite;  // 0 or 1, as in _core/formulas.py
};

GKLX_BOTH RowStatistics finished(const Given &g, int64_t row, const Partial &x) {
  RowStatistics r = {0, 0, 1, 1, 0, 0, 0, WEIGHTS == PRIOR_POWER ? REAL(0) : REAL(1), 0, {0, 0}, 0, 0, 0, 0, 0, 0};
  if (!x.has_valid) return r;
  const bool teacher_undefined = x.teacher_nan || !is_finite(x.t_top);
  r.has_valid = 1;
  r.undefined = teacher_undefined || x.student_nan || !is_finite(x.s_top);
  r.unreachable = x.student_rules_out && !r.undefined;
  r.s_top = x.s_top;
  r.t_top = x.t_top;
  const REAL s_total = value_of(x.s_total), t_total = value_of(x.t_total);
  const REAL difference = (x.t_total.high - x.s_total.high) + (x.t_total.low - x.s_total.low);
  r.per_s_total = REAL(1) / s_total;
  r.per_t_total = REAL(1) / t_total;
  r.gap_of_student = difference / (s_total * t_total);
  r.log_s_total = logarithm(x.s_total.high) + x.s_total.low / x.s_total.high;
  r.log_ratio = logarithm_of_1_plus(difference / s_total);
  if (r.undefined) r.per_s_total = r.per_t_total = nan_of<REAL>();
  if (WEIGHTS == UNWEIGHTED) return r;
  const bool unknown = WEIGHTS == PRIOR_POWER ? x.prior_nan || !has_label(g, row) : teacher_undefined;
  r.mass = unknown ? nan_of<REAL>() : value_of(mass_of(x));
  r.base = WEIGHTS == PRIOR_POWER ? x.base : REAL(1) / (WEIGHTS == PROBABILITIES ? t_total : value_of(x.tau_total));
  r.reference = x.reference;
  r.mean = r.mass == REAL(0) ? REAL(0) : value_of(x.moment) / r.mass;
  bool above, below;  // of weight
  if (WEIGHTS == PRIOR_POWER) {
    above = x.above != NONE && prior_weight(g, x.above, x.base) != REAL(0);
    below = x.below != NONE && prior_weight(g, x.below, x.base) != REAL(0);
  } else {
    above = x.above != NONE && teacher_weight(g, x.above - x.t_top) != REAL(0);
    below = x.below != NONE && teacher_weight(g, -INF) != REAL(0);
  }
  r.infinite = above || below;
  r.others = above && below ? nan_of<REAL>() : above ? -INF : INF;  // there is no mean between opposite infinities
  return r;
}

// The sample's weight: 0 where no class is valid, NaN where negative.
GKLX_BOTH REAL sample_weight(const Given &g, int64_t row, const RowStatistics &r) {
  const REAL v = given_weight(g, row);
  return !r.has_valid ? REAL(0) : v >= REAL(0) ? v : nan_of<REAL>();
}

// --- values and gradients --------------------------------------------------------------------------------------------

// What is asked for; null where it is not.
struct Asked {
  const REAL *ce_factor;      // [rows], as `Factors` in _core/formulas.py
  const REAL *energy_factor;  // [rows]
  STUDENT *to_student;        // [rows, classes]
  TEACHER *to_teacher;
  REAL *kl, *ce, *energy;     // [rows]
  bool symmetric;
};

struct Sums {
  Sum kl, mean_logit, squares;
};

GKLX_BOTH Sums nothing() { return {{0, 0}, {0, 0}, {0, 0}}; }

GKLX_BOTH Sums added(Sums a, const Sums &b) {
  add(a.kl, b.kl);
  add(a.mean_logit, b.mean_logit);
  add(a.squares, b.squares);
  return a;
}

// A factor of 0 keeps what it multiplies out, be it infinite.
GKLX_BOTH REAL scaled(REAL factor, REAL x) { return factor == REAL(0) ? REAL(0) : factor * x; }

GKLX_BOTH Sums thread_gradients(const Given &g, const Asked &a, const RowStatistics &r, int64_t row, int lane) {
  Sums sums = nothing();
  const Pack<STUDENT> *student = (const Pack<STUDENT> *)(g.student + row * g.classes);
  const Pack<TEACHER> *teacher = (const Pack<TEACHER> *)(g.teacher + row * g.classes);
  const REAL *prior = WEIGHTS == PRIOR_POWER ? prior_of(g, row) : nullptr;
  const Difference<REAL> top = difference_at<REAL, true>(r.t_top, r.s_top);
  const bool weighs = WEIGHTS != UNWEIGHTED && (a.energy_factor || a.energy);
  const REAL gap_rate = a.ce_factor ? a.ce_factor[row] * g.per_temperature.high : REAL(0);
  const REAL energy_rate = a.energy_factor ? a.energy_factor[row] : REAL(0);
  const REAL scale = REAL(4) / (r.mass == REAL(0) ? REAL(1) : r.mass);  // d is in quarters
  for (int64_t i = lane; i < g.classes / VECTOR; i += GROUP) {
    Pack<STUDENT> of_s = student[i];
    Pack<TEACHER> of_t = teacher[i];
#pragma unroll
    for (int k = 0; k < VECTOR; ++k) {
      const int64_t j = i * VECTOR + k;
      const REAL s = widened(of_s.x[k]), t = widened(of_t.x[k]);
      REAL to_student = 0, to_teacher = 0;
      if (r.has_valid && is_valid(g, row, j, s, t)) {
        const Difference<REAL> d = difference_at<REAL, true>(t, s);
        const bool infinite = is_infinite(d.high);
        const REAL z_s = s - r.s_top, z_t = t - r.t_top;
        const REAL es = exponential_of(z_s, g.per_temperature), et = exponential_of(z_t, g.per_temperature);
        if (weighs) {
          const REAL w = WEIGHTS == PRIOR_POWER ? prior_weight(g, prior[j], r.base)
                       : WEIGHTS == PROBABILITIES ? et : teacher_weight(g, z_t);
          REAL c = deviation(d, r.reference) - r.mean;
          if (r.infinite) c = infinite ? d.high : r.others;
          if (r.undefined) c = nan_of<REAL>();
          if (w == REAL(0)) c = 0;
          to_teacher = scaled(energy_rate, scale * (w * c));
          add(sums.squares, (w * c) * c);
        }
        if (a.to_student) {
          const REAL gap = es * r.gap_of_student + (es - et) * r.per_t_total;
          to_student = scaled(gap_rate, r.undefined ? nan_of<REAL>() : gap);
          if (a.symmetric) to_student -= to_teacher;
        }
        if (a.ce && z_s != -INF) add(sums.mean_logit, et * z_s);
        if (a.kl) {
          const REAL p = et * r.per_t_total, q = es * r.per_s_total;
          const REAL ratio = deviation(d, top) * (REAL(4) * g.per_temperature.high) - r.log_ratio;
          add(sums.kl, infinite || p == REAL(0) ? q : divergence(p, q, ratio));
        }
      }
      narrow(to_student, of_s.x[k]);
      narrow(to_teacher, of_t.x[k]);
    }
    if (a.to_student) ((Pack<STUDENT> *)(a.to_student + row * g.classes))[i] = of_s;
    if (a.to_teacher) ((Pack<TEACHER> *)(a.to_teacher + row * g.classes))[i] = of_t;
  }
  return sums;
}

GKLX_BOTH void finish_values(const Given &g, const Asked &a, const RowStatistics &r, int64_t row, const Sums &sums) {
  REAL kl = value_of(sums.kl);
  REAL ce = r.log_s_total - value_of(sums.mean_logit) * r.per_t_total * g.per_temperature.high;
  REAL energy = REAL(8) * value_of(sums.squares) / (r.mass == REAL(0) ? REAL(1) : r.mass);  // 16 quarters of quarters
  if (r.infinite) energy = INF;
  if (r.unreachable) kl = ce = INF;
  if (r.undefined) kl = ce = energy = nan_of<REAL>();
  if (is_nan(r.mass)) energy = r.mass;
  if (a.kl) a.kl[row] = kl;
  if (a.ce) a.ce[row] = ce;
  if (a.energy) a.energy[row] = energy;
}

// --- the kernels -----------------------------------------------------------------------------------------------------

#define GIVEN                                                                                                     \
  const STUDENT *student, const TEACHER *teacher, const REAL *prior, const int64_t *labels,                      \
      const REAL *given_weights, const uint8_t *where, int64_t rows, int64_t classes, int64_t where_row_stride,  \
      int64_t where_class_stride, REAL per_temperature, REAL per_temperature_low, REAL per_weight_temperature,   \
      REAL per_weight_temperature_low, REAL weighing, REAL weighing_low, REAL gamma

#define GATHERED                                                                                                 \
  {student, teacher, prior, labels, given_weights, where, rows, classes, where_row_stride, where_class_stride,   \
   {per_temperature, per_temperature_low}, {per_weight_temperature, per_weight_temperature_low},                 \
   {weighing, weighing_low}, gamma}

#define ASKED                                                                                                     \
  const REAL *ce_factor, const REAL *energy_factor, STUDENT *to_student, TEACHER *to_teacher, REAL *kl, REAL *ce, \
      REAL *energy, int64_t symmetric

#ifdef __CUDACC_RTC__

extern "C" __global__ void __launch_bounds__(BLOCK)
statistics(GIVEN, RowStatistics *found, REAL *weight, REAL *mass, REAL *base) {
  __shared__ Partial partials[BLOCK];
  const Given g = GATHERED;
  const int at = threadIdx.x, lane = at % GROUP;
  const int64_t row = (int64_t)blockIdx.x * (BLOCK / GROUP) + at / GROUP;
  partials[at] = row < rows ? thread_statistics(g, row, lane) : no_classes();
  for (int half = GROUP / 2; half; half /= 2) {
    __syncthreads();
    if (lane < half) partials[at] = merged(g, partials[at], partials[at + half]);
  }
  if (lane == 0 && row < rows) {
    const RowStatistics r = finished(g, row, partials[at]);
    found[row] = r;
    weight[row] = sample_weight(g, row, r);
    mass[row] = r.mass;
    base[row] = r.base;
  }
}

extern "C" __global__ void __launch_bounds__(BLOCK) gradients(GIVEN, const RowStatistics *found, ASKED) {
  __shared__ Sums sums[BLOCK];
  const Given g = GATHERED;
  const Asked a = {ce_factor, energy_factor, to_student, to_teacher, kl, ce, energy, symmetric != 0};
  const int at = threadIdx.x, lane = at % GROUP;
  const int64_t row = (int64_t)blockIdx.x * (BLOCK / GROUP) + at / GROUP;
  sums[at] = row < rows ? thread_gradients(g, a, found[row], row, lane) : nothing();
  if (!kl && !ce && !energy) return;
  for (int half = GROUP / 2; half; half /= 2) {
    __syncthreads();
    if (lane < half) sums[at] = added(sums[at], sums[at + half]);
  }
  if (lane == 0 && row < rows) finish_values(g, a, found[row], row, sums[at]);
}

#endif
