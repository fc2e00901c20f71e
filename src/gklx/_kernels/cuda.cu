// The loops of a GPU over the classes of a row, in two kernels that each read the logits once, and one over the
// samples.
//
// `statistics` finds what a row must know of itself: maxima, normalisers, W, the mean of d, and its losses as far as
// their sums keep their digits. `batch` adds up what the samples share. `gradients` then has the values and both
// gradients. The formulas, and what becomes of infinities and NaN, are those of _core/formulas.py.
//
// A row belongs to a group of GROUP threads; BLOCK / GROUP rows share a block. What a thread does, how the results of
// two threads merge and how a row ends are plain functions, so that the tests can run them on a CPU, thread by thread.
//
// All is computed in REAL: most GPUs do 32 or 64 times as much in float as in double. Sums therefore keep what their
// additions round off. As in cpu.cpp, d is taken from that of a reference, a class that weighs about most, and
// functions with `Guarded` take masks, infinities, NaN and huge logits, which most rows do not have.
//
// Compiled with: REAL (float or double), STUDENT and TEACHER (types of the logits: float, double, Half or Brain),
// WEIGHTS (where the class weights come from), DECOMPOSED (wMSE and CE are the losses, else KL), VECTOR (how many
// logits one load takes), GROUP, BLOCK.

#include "row.h"

#define PROBABILITIES 1  // p itself: the teacher's softmax at T, to the power 1
#define TEACHER_POWER 2  // softmax(t / weight_temperature)^gamma
#define PRIOR_POWER 3    // prior^gamma

struct Half { uint16_t bits; };
struct Brain { uint16_t bits; };  // bfloat16

#if defined(__CUDACC_RTC__)
#define GKLX_APART static __device__ __noinline__  // what few rows need takes no registers of the others
GKLX_BOTH float power_of_2(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
GKLX_BOTH double power_of_2(double x) { return exp2(x); }
GKLX_BOTH float widened_half(uint16_t x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x)); return y; }
GKLX_BOTH uint16_t narrowed_half(float x) { uint16_t y; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y; }
#else
#define GKLX_APART static
GKLX_BOTH float power_of_2(float x) { return exp2f(x); }
GKLX_BOTH double power_of_2(double x) { return exp2(x); }
GKLX_BOTH float widened_half(uint16_t x) { return float_of_half(x); }
GKLX_BOTH uint16_t narrowed_half(float x) { return half_of_float(x); }
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
GKLX_BOTH uint16_t narrowed_brain(float x) { uint16_t y; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y; }
#else
GKLX_BOTH uint16_t narrowed_brain(float x) { return brain_of_float(x); }
#endif

GKLX_BOTH REAL widened(float x) { return x; }
GKLX_BOTH REAL widened(double x) { return REAL(x); }
GKLX_BOTH REAL widened(Half x) { return widened_half(x.bits); }
GKLX_BOTH REAL widened(Brain x) { return real_of(uint32_t(x.bits) << 16); }

GKLX_BOTH float to_be_rounded(float x) { return x; }
GKLX_BOTH float to_be_rounded(double x) { return rounded_to_odd(x); }
GKLX_BOTH void narrow(REAL x, float &to) { to = float(x); }
GKLX_BOTH void narrow(REAL x, double &to) { to = x; }
GKLX_BOTH void narrow(REAL x, Half &to) { to.bits = narrowed_half(to_be_rounded(x)); }
GKLX_BOTH void narrow(REAL x, Brain &to) { to.bits = narrowed_brain(to_be_rounded(x)); }

GKLX_BOTH float logarithm_of_1_plus(float x) { return log1pf(x); }
GKLX_BOTH double logarithm_of_1_plus(double x) { return log1p(x); }
GKLX_BOTH float product_and_sum(float a, float b, float c) { return fmaf(a, b, c); }  // rounded once
GKLX_BOTH double product_and_sum(double a, double b, double c) { return fma(a, b, c); }
GKLX_BOTH float magnitude(float x) { return fabsf(x); }
GKLX_BOTH double magnitude(double x) { return fabs(x); }
GKLX_BOTH float larger(float a, float b) { return fmaxf(a, b); }  // leaves NaN out
GKLX_BOTH double larger(double a, double b) { return fmax(a, b); }

constexpr REAL INF = Real<REAL>::inf;

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

// A sum of numbers from 0 to AHEAD, stored with AHEAD added: it exceeds every summand, so that Dekker's fast two-sum is
// exact, in half of the steps of Knuth's.
struct Total {
  REAL high, low;
};

constexpr REAL AHEAD = 4;

GKLX_BOTH Sum sum_of(const Total &x) { return {x.high - AHEAD, x.low}; }
GKLX_BOTH Total total_of(const Sum &x) {
  const REAL high = x.high + AHEAD;
  return {high, x.low + (x.high - (high - AHEAD))};
}

GKLX_BOTH void add(Total &x, REAL y) {
  const REAL sum = x.high + y;
  x.low += y - (sum - x.high);
  x.high = sum;
}

GKLX_BOTH void add(Total &x, const Total &y) {
  Sum sum = {x.high, x.low};
  add(sum, sum_of(y));
  x = {sum.high, sum.low};
}

GKLX_BOTH void multiply(Total &x, REAL by) {
  Sum sum = sum_of(x);
  multiply(sum, by);
  x = total_of(sum);
}

GKLX_BOTH REAL value_of(const Total &x) { return value_of(sum_of(x)); }

// A factor of exponents of 2, and what its rounding left.
struct Rate {
  REAL high, low;
};

// 2^(x * rate). An exponent of -40 is rounded by as much as 40 units in the last place of the result. Where not
// Guarded, the exponent is finite.
template <bool Guarded> GKLX_BOTH REAL exponential_of(REAL x, const Rate &rate) {
  const REAL exponent = x * rate.high, y = power_of_2(exponent);
  const REAL rounding = product_and_sum(x, rate.low, product_and_sum(x, rate.high, -exponent));
  if (Guarded && y == REAL(0)) return y;
  return product_and_sum(y * rounding, REAL(0.69314718055994530942), y);
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
  Rate per_temperature, per_weight_temperature;  // times log2(e), as is the next
  Rate weighing;                                 // gamma / weight_temperature
  REAL inverse_temperature, gamma;
  REAL per_class;  // at most 1 / classes, a power of two: sums of weights up to 1 times huge numbers do not overflow
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

// Whether the exponents of a row are finite if its logits are within `logit_bound`.
GKLX_BOTH bool exponents_are_finite(const Given &g) {
  constexpr REAL limit = Real<REAL>::logit_bound * 256;
  return !g.where && g.per_temperature.high < limit && g.per_weight_temperature.high < limit && g.weighing.high < limit;
}

// softmax^gamma of the teacher, relative to that of a class that t is so much below; 0^0 = 1.
template <bool Guarded> GKLX_BOTH REAL teacher_weight(const Given &g, REAL below) {
  if (WEIGHTS == PROBABILITIES) return exponential_of<Guarded>(below, g.per_temperature);
  constexpr REAL lowest = -Real<REAL>::largest / 2;
  return exponential_of<Guarded>(Guarded && below < lowest ? lowest : below, g.weighing);
}

// (x / divisor)^gamma.
GKLX_BOTH REAL prior_weight(const Given &g, REAL x, REAL per_divisor) {
  if (g.gamma == REAL(0)) return REAL(1);
  const REAL relative = x * per_divisor;
  return g.gamma == REAL(1) ? relative : exponential(log_power(relative, g.gamma, REAL(0)));
}

// --- classes ---------------------------------------------------------------------------------------------------------

template <class T> struct alignas(VECTOR * sizeof(T) < 16 ? VECTOR * sizeof(T) : 16) Pack {
  T x[VECTOR];
};

// As many as one load takes.
struct Classes {
  REAL s[VECTOR], t[VECTOR], prior[VECTOR];
  bool valid[VECTOR];
};

// How much a class weighs, as far as comparing two of them goes.
GKLX_BOTH REAL height_of(const Classes &c, int k) { return WEIGHTS == PRIOR_POWER ? c.prior[k] : c.t[k]; }

constexpr REAL NONE = WEIGHTS == PRIOR_POWER ? REAL(-1) : -INF;

// What a row's sums are relative to: about the largest logits and prior, and d of a class that weighs about most.
struct Origin {
  REAL s_top, t_top, base;
  REAL peak;  // the height of the reference
  Difference<REAL> reference;
};

GKLX_BOTH Origin nowhere() { return {-INF, -INF, 0, NONE, {0, 0}}; }

template <bool Guarded> GKLX_BOTH Origin origin_of(const Classes &c) {
  Origin o = nowhere();
#pragma unroll
  for (int k = 0; k < VECTOR; ++k) {
    if (Guarded && !c.valid[k]) continue;
    o.s_top = larger(c.s[k], o.s_top);
    o.t_top = larger(c.t[k], o.t_top);
    if (WEIGHTS == PRIOR_POWER) o.base = larger(c.prior[k], o.base);
    const bool finite = !Guarded || (is_finite(c.s[k]) && is_finite(c.t[k]));
    if (finite && height_of(c, k) > o.peak) {
      o.peak = height_of(c, k);
      o.reference = difference_at<REAL, Guarded>(c.t[k], c.s[k]);
    }
  }
  return o;
}

GKLX_BOTH Origin merged(const Origin &a, const Origin &b) {
  const bool first = a.peak >= b.peak;
  return {larger(a.s_top, b.s_top), larger(a.t_top, b.t_top), larger(a.base, b.base), first ? a.peak : b.peak,
          first ? a.reference : b.reference};
}

// Half of a - b, finite where both are.
GKLX_BOTH REAL half_of(REAL a, REAL b) { return REAL(0.5) * a - REAL(0.5) * b; }

GKLX_BOTH REAL deviation(const Difference<REAL> &d, const Difference<REAL> &reference) {
  return (d.high - reference.high) + (d.low - reference.low);
}

// --- statistics ------------------------------------------------------------------------------------------------------

// What a thread knows of the classes it has seen.
struct Partial {
  Origin origin;
  REAL s_top, t_top;        // the largest logits; NaN is left out
  REAL size;                // the largest absolute value of a logit, where not Guarded
  Total s_total, t_total;   // of the exponentials at T
  Sum tau_total;            // of the teacher's at the weights' temperature
  Sum mass;                 // of the weights w
  // These are multiplied by `per_class`.
  Sum moment, squares;      // of w times what d is larger than at the reference, and times the square of that
  Sum mean_logit;           // of the teacher's exponentials times half of what s is above the origin
  REAL above, below;        // of the classes with d = +inf, and -inf: the largest height; NONE where there is none
  uint32_t seen;            // of the following
};

enum : uint32_t { VALID = 1, STUDENT_NAN = 2, TEACHER_NAN = 4, STUDENT_RULES_OUT = 8, PRIOR_WRONG = 16 };

GKLX_BOTH Partial no_classes(const Origin &origin) {
  const Sum zero = {0, 0};
  const Total none = {AHEAD, 0};
  return {origin, -INF, -INF, 0, none, none, zero, zero, zero, zero, zero, NONE, NONE, 0};
}

GKLX_BOTH Sum mass_of(const Partial &x) { return WEIGHTS == PROBABILITIES ? sum_of(x.t_total) : x.mass; }

// The sums relative to larger maxima and to a heavier reference.
GKLX_BOTH void move_origin(const Given &g, Partial &x, const Origin &to) {
  Origin &from = x.origin;
  if (to.s_top > from.s_top) {
    if (from.s_top != -INF) {
      multiply(x.s_total, exponential_of<true>(from.s_top - to.s_top, g.per_temperature));
      if (DECOMPOSED) add(x.mean_logit, value_of(x.t_total) * g.per_class * half_of(from.s_top, to.s_top));
    }
    from.s_top = to.s_top;
  }
  if (to.t_top > from.t_top) {
    if (from.t_top != -INF) {
      const REAL below = from.t_top - to.t_top, by = exponential_of<true>(below, g.per_temperature);
      multiply(x.t_total, by);
      if (DECOMPOSED) multiply(x.mean_logit, by);
      if (WEIGHTS != PRIOR_POWER) {
        const REAL by_weight = teacher_weight<true>(g, below);
        multiply(x.moment, by_weight);
        if (DECOMPOSED) multiply(x.squares, by_weight);
        if (WEIGHTS == TEACHER_POWER) {
          multiply(x.mass, by_weight);
          multiply(x.tau_total, exponential_of<true>(below, g.per_weight_temperature));
        }
      }
    }
    from.t_top = to.t_top;
  }
  if (WEIGHTS == PRIOR_POWER && to.base > from.base) {
    const REAL by_weight = prior_weight(g, invertible(from.base), REAL(1) / invertible(to.base));
    multiply(x.mass, by_weight);
    multiply(x.moment, by_weight);
    multiply(x.squares, by_weight);
    from.base = to.base;
  }
  const bool same = to.reference.high == from.reference.high && to.reference.low == from.reference.low;
  if (to.peak >= from.peak && !same) {  // of equally heavy classes either one will do, but for all sums the same
    const REAL by = deviation(to.reference, from.reference);
    const Sum mass = mass_of(x);
    if (DECOMPOSED) add(x.squares, by * (mass.high * g.per_class * by - REAL(2) * x.moment.high));
    add(x.moment, -(mass.high * g.per_class * by));
    x.moment.low -= mass.low * g.per_class * by;
    from.reference = to.reference;
  }
  from.peak = larger(to.peak, from.peak);
}

// Of a class, relative to the origin: of_t is its exponential of the teacher at T.
template <bool Guarded>
GKLX_BOTH REAL weight_of(const Given &g, REAL below, REAL of_t, REAL prior, REAL per_divisor) {
  if (WEIGHTS == PRIOR_POWER) return prior_weight(g, prior, per_divisor);
  return WEIGHTS == PROBABILITIES ? of_t : teacher_weight<Guarded>(g, below);
}

// Adds some classes to a thread's sums.
template <bool Guarded> GKLX_BOTH void collect(const Given &g, const Classes &c, Partial &x) {
  const Origin &o = x.origin;
  const REAL per_divisor = WEIGHTS == PRIOR_POWER ? REAL(1) / invertible(o.base) : REAL(0);
  REAL tau_total = 0, mass = 0, moment = 0, squares = 0, mean_logit = 0;
#pragma unroll
  for (int k = 0; k < VECTOR; ++k) {
    if (Guarded && !c.valid[k]) continue;
    const REAL s = c.s[k], t = c.t[k], z_s = s - o.s_top;
    const REAL below = Guarded && t == -INF ? -INF : t - o.t_top;
    const REAL of_s = Guarded && s == -INF ? REAL(0) : exponential_of<Guarded>(z_s, g.per_temperature);
    const REAL of_t = exponential_of<Guarded>(below, g.per_temperature);
    const REAL w = weight_of<Guarded>(g, below, of_t, c.prior[k], per_divisor);
    if (!Guarded || (is_finite(s) && is_finite(t))) {
      const REAL away = deviation(difference_at<REAL, Guarded>(t, s), o.reference);
      const REAL weighted = (g.per_class * w) * away;
      moment += weighted;
      if (DECOMPOSED) squares += weighted * away;
    } else if (s == -INF) {
      x.above = larger(height_of(c, k), x.above);
    } else if (t == -INF) {
      x.below = larger(WEIGHTS == PRIOR_POWER ? c.prior[k] : REAL(0), x.below);
    }
    if (DECOMPOSED && (!Guarded || s != -INF)) mean_logit += (g.per_class * of_t) * half_of(s, o.s_top);
    if (WEIGHTS == TEACHER_POWER) tau_total += exponential_of<Guarded>(below, g.per_weight_temperature);
    if (WEIGHTS != PROBABILITIES) mass += w;
    add(x.s_total, of_s);
    add(x.t_total, of_t);
  }
  add(x.moment, moment);
  if (DECOMPOSED) add(x.squares, squares);
  if (DECOMPOSED) add(x.mean_logit, mean_logit);
  if (WEIGHTS == TEACHER_POWER) add(x.tau_total, tau_total);
  if (WEIGHTS != PROBABILITIES) add(x.mass, mass);
}

// Where the logits and the prior of one sample begin, and how many loads each of them is.
struct Lines {
  const Pack<STUDENT> *student;
  const Pack<TEACHER> *teacher;
  const Pack<REAL> *prior;
  int packs;
};

GKLX_BOTH Lines lines_of(const Given &g, int64_t row) {
  return {(const Pack<STUDENT> *)(g.student + row * g.classes), (const Pack<TEACHER> *)(g.teacher + row * g.classes),
          (const Pack<REAL> *)(WEIGHTS == PRIOR_POWER ? prior_of(g, row) : nullptr), int(g.classes / VECTOR)};
}

// The classes of one load, the i-th of the row.
template <bool Guarded>
GKLX_BOTH Classes classes_of(const Given &g, int64_t row, const Lines &lines, int i, const Pack<STUDENT> &student,
                             const Pack<TEACHER> &teacher) {
  Classes c;
  Pack<REAL> prior;
  if (WEIGHTS == PRIOR_POWER) prior = lines.prior[i];
#pragma unroll
  for (int k = 0; k < VECTOR; ++k) {
    c.s[k] = widened(student.x[k]);
    c.t[k] = widened(teacher.x[k]);
    c.prior[k] = WEIGHTS == PRIOR_POWER ? prior.x[k] : REAL(0);
    c.valid[k] = !Guarded || is_valid(g, row, int64_t(i) * VECTOR + k, c.s[k], c.t[k]);
  }
  return c;
}

// Where the sums of a row begin: what is found by its threads' first loads.
template <bool Guarded> GKLX_BOTH Origin thread_origin(const Given &g, int64_t row, int lane) {
  const Lines lines = lines_of(g, row);
  if (lane >= lines.packs || given_weight(g, row) == REAL(0)) return nowhere();
  return origin_of<Guarded>(classes_of<Guarded>(g, row, lines, lane, lines.student[lane], lines.teacher[lane]));
}

// How far above the origin a class may be before the sums are moved to it, so that few are: no exponential is above 2.
struct Margins {
  REAL student, teacher, prior;
};

template <bool Guarded> GKLX_BOTH Margins margins_of(const Given &g) {
  if (Guarded) return {0, 0, 1};  // sums of huge differences stay finite where no weight is above 1
  REAL rate = g.per_temperature.high;
  if (WEIGHTS == TEACHER_POWER) rate = larger(rate, larger(g.per_weight_temperature.high, g.weighing.high));
  return {REAL(1) / g.per_temperature.high, REAL(1) / rate, 2};
}

template <bool Guarded> GKLX_BOTH void visit(const Given &g, const Classes &c, const Margins &margins, Partial &x) {
  REAL s_top = -INF, t_top = -INF, base = 0;
#pragma unroll
  for (int k = 0; k < VECTOR; ++k) {
    if (Guarded) {
      if (!c.valid[k]) continue;
      x.seen |= VALID | (is_nan(c.s[k]) ? STUDENT_NAN : 0) | (is_nan(c.t[k]) ? TEACHER_NAN : 0);
      if (c.s[k] == -INF) x.seen |= STUDENT_RULES_OUT;
    } else {
      x.size = larger(larger(magnitude(c.s[k]), magnitude(c.t[k])), x.size);
    }
    s_top = larger(c.s[k], s_top);
    t_top = larger(c.t[k], t_top);
    if (WEIGHTS == PRIOR_POWER && !(c.prior[k] >= REAL(0))) x.seen |= PRIOR_WRONG;
    if (WEIGHTS == PRIOR_POWER) base = larger(c.prior[k], base);
  }
  x.s_top = larger(s_top, x.s_top);
  x.t_top = larger(t_top, x.t_top);
  const Origin &o = x.origin;
  bool far = s_top > o.s_top + margins.student || t_top > o.t_top + margins.teacher;
  if (WEIGHTS == PRIOR_POWER) far |= base > margins.prior * o.base;
  if (Guarded) far |= origin_of<Guarded>(c).peak > o.peak;  // of classes whose d is finite, the others may be larger
  if (far) move_origin(g, x, origin_of<Guarded>(c));
  collect<Guarded>(g, c, x);
}

template <bool Guarded>
GKLX_BOTH Partial thread_statistics(const Given &g, int64_t row, int lane, const Origin &origin) {
  Partial x = no_classes(origin);
  if (given_weight(g, row) == REAL(0)) return x;
  const Lines lines = lines_of(g, row);
  const Margins margins = margins_of<Guarded>(g);
  if (!Guarded) x.seen = VALID;
  if (lane >= lines.packs) return x;
  Pack<STUDENT> next_s = lines.student[lane];
  Pack<TEACHER> next_t = lines.teacher[lane];
#pragma unroll 1
  for (int i = lane; i < lines.packs; i += GROUP) {
    const Pack<STUDENT> s = next_s;
    const Pack<TEACHER> t = next_t;
    const int next = i + GROUP < lines.packs ? i + GROUP : i;  // is on its way while this load is worked on
    next_s = lines.student[next];
    next_t = lines.teacher[next];
    visit<Guarded>(g, classes_of<Guarded>(g, row, lines, i, s, t), margins, x);
  }
  return x;
}

GKLX_APART Partial guarded_statistics(const Given &g, int64_t row, int lane, const Origin &origin) {
  return thread_statistics<true>(g, row, lane, origin);
}

GKLX_BOTH Partial merged(const Given &g, Partial a, Partial b) {
  const Origin origin = merged(a.origin, b.origin);
  move_origin(g, a, origin);
  move_origin(g, b, origin);
  a.s_top = larger(a.s_top, b.s_top);
  a.t_top = larger(a.t_top, b.t_top);
  a.size = larger(a.size, b.size);
  a.above = larger(a.above, b.above);
  a.below = larger(a.below, b.below);
  add(a.s_total, b.s_total);
  add(a.t_total, b.t_total);
  add(a.tau_total, b.tau_total);
  add(a.mass, b.mass);
  add(a.moment, b.moment);
  add(a.squares, b.squares);
  add(a.mean_logit, b.mean_logit);
  a.seen |= b.seen;
  return a;
}

// Whether a row's sums are those that `Guarded` would have made: its logits are finite, and so are sums of squares of
// them.
GKLX_BOTH bool logits_are_bounded(const Partial &x) {
  return x.size <= Real<REAL>::logit_bound && !is_nan(x.s_total.high) && !is_nan(x.t_total.high);
}

// What is known of a row. REALs alone, so that it lies in an array of them.
struct RowStatistics {
  REAL weight, mass, base;        // v, 0 where no class is valid, NaN where negative; W = mass * base^gamma
  REAL kl, ce, energy;            // the sample's losses; wMSE = W^2 * energy
  REAL student_peak, teacher_peak;  // the largest probabilities
  REAL has_valid, undefined;      // 0 or 1, as are the five below; these four as in _core/formulas.py
  REAL unreachable, infinite;
  REAL guarded;                   // how the row is to be worked on; the reference and the mean are then in quarters
  REAL knows_kl, knows_energy;    // the sums of the statistics gave these losses with all their digits
  REAL s_top, t_top;              // of the origin, as is the reference
  REAL per_s_total, per_t_total;  // of the sums of exponentials
  REAL gap_of_student;            // q - p is this times the student's exponential, and the difference of both / t_total
  REAL log_ratio;                 // log (t_total / s_total)
  Difference<REAL> reference;
  REAL mean;                      // the weighted mean of d, less d at the reference
  REAL others;                    // d less its mean in the classes where d is finite, of a row where some d is infinite
};
static_assert(sizeof(RowStatistics) == 25 * sizeof(REAL), "_ROW in _run/cuda.py");

// A sample's losses where they are not numbers.
GKLX_BOTH void settle(RowStatistics &r) {
  if (r.infinite) r.energy = INF;
  if (r.unreachable) r.kl = r.ce = INF;
  if (r.undefined) r.kl = r.ce = r.energy = nan_of<REAL>();
  if (is_nan(r.mass)) r.energy = r.mass;
}

// KL is the mean of d / T, less its value at the origins, less log(t_total / s_total), which is known to about a unit in
// the last place of 1; E is half of a mean square less the squared mean. Both cancel where the rows are close: `knows_kl`
// and `knows_energy` say whether enough digits remain, else `gradients` adds up the classes again.
GKLX_BOTH void find_losses(const Given &g, const Partial &x, RowStatistics &r) {
  const Origin &o = x.origin;
  const Sum s_total = sum_of(x.s_total);
  const REAL log_s_total = logarithm(s_total.high) + s_total.low / s_total.high;
  if (DECOMPOSED) {
    const REAL mean_logit = value_of(x.mean_logit) * (r.per_t_total / g.per_class);
    r.ce = log_s_total - mean_logit * g.inverse_temperature * REAL(2);
  }
  if (r.guarded) return;
  const REAL squares = value_of(x.squares) / (r.mass * g.per_class), square = r.mean * r.mean;
  r.energy = r.mass == REAL(0) ? REAL(0) : REAL(0.5) * (squares - square);
  r.knows_energy = r.mass == REAL(0) || squares - square >= squares / 16;
  if (WEIGHTS != PROBABILITIES) return;
  const Difference<REAL> top = difference_at<REAL, false>(o.t_top, o.s_top);
  const REAL difference = (deviation(o.reference, top) + r.mean) * g.inverse_temperature;
  r.kl = difference - r.log_ratio;
  r.knows_kl = r.kl >= larger(REAL(1), larger(magnitude(difference), magnitude(r.log_ratio))) / 8;
}

GKLX_BOTH RowStatistics finished(const Given &g, int64_t row, const Partial &x, bool guarded) {
  RowStatistics r = {};
  r.base = r.per_s_total = r.per_t_total = r.student_peak = r.teacher_peak = 1;
  r.guarded = guarded || !(x.seen & VALID);
  r.knows_kl = r.knows_energy = !(x.seen & VALID);
  if (!(x.seen & VALID)) return r;
  const Origin &o = x.origin;
  const bool teacher_undefined = (x.seen & TEACHER_NAN) || !is_finite(x.t_top);
  const REAL v = given_weight(g, row);
  r.weight = v >= REAL(0) ? v : nan_of<REAL>();
  r.has_valid = 1;
  r.undefined = teacher_undefined || (x.seen & STUDENT_NAN) || !is_finite(x.s_top);
  r.unreachable = (x.seen & STUDENT_RULES_OUT) && !r.undefined;
  r.s_top = o.s_top;
  r.t_top = o.t_top;
  const REAL s_total = value_of(x.s_total), t_total = value_of(x.t_total);
  const REAL difference = (x.t_total.high - x.s_total.high) + (x.t_total.low - x.s_total.low);
  r.per_s_total = REAL(1) / s_total;
  r.per_t_total = REAL(1) / t_total;
  r.gap_of_student = difference / (s_total * t_total);
  r.log_ratio = logarithm_of_1_plus(difference / s_total);
  r.student_peak = r.per_s_total * exponential_of<true>(x.s_top - o.s_top, g.per_temperature);
  r.teacher_peak = r.per_t_total * exponential_of<true>(x.t_top - o.t_top, g.per_temperature);
  if (r.undefined) r.per_s_total = r.per_t_total = r.student_peak = r.teacher_peak = nan_of<REAL>();
  const bool unknown = WEIGHTS == PRIOR_POWER ? (x.seen & PRIOR_WRONG) || !has_label(g, row) : teacher_undefined;
  r.mass = unknown ? nan_of<REAL>() : value_of(mass_of(x));
  if (WEIGHTS == PRIOR_POWER) r.base = invertible(o.base);
  else r.base = REAL(1) / (WEIGHTS == PROBABILITIES ? t_total : value_of(x.tau_total));
  r.reference = o.reference;
  r.mean = r.mass == REAL(0) ? REAL(0) : value_of(x.moment) / (r.mass * g.per_class);
  bool above, below;  // of weight
  if (WEIGHTS == PRIOR_POWER) {
    const REAL per_divisor = REAL(1) / r.base;
    above = x.above != NONE && prior_weight(g, x.above, per_divisor) != REAL(0);
    below = x.below != NONE && prior_weight(g, x.below, per_divisor) != REAL(0);
  } else {
    above = x.above != NONE && teacher_weight<true>(g, x.above - o.t_top) != REAL(0);
    below = x.below != NONE && teacher_weight<true>(g, -INF) != REAL(0);
  }
  r.infinite = above || below;
  r.others = above && below ? nan_of<REAL>() : above ? -INF : INF;  // there is no mean between opposite infinities
  find_losses(g, x, r);
  settle(r);
  return r;
}

// --- the batch -------------------------------------------------------------------------------------------------------

// A thread's part of the maxima V and P, neither rounded nor made invertible; the sums are 0.
GKLX_BOTH Totals<REAL> thread_maxima(const RowStatistics *found, int64_t rows, bool squares, int lane) {
  Totals<REAL> x = {0, 0, 0, 0};
#pragma unroll 8
  for (int64_t row = lane; row < rows; row += BLOCK) {
    const REAL v = found[row].weight, base = squares ? found[row].base : REAL(0);
    x.largest_weight = larger(v, x.largest_weight);
    x.largest_base = larger(v == REAL(0) ? REAL(0) : base, x.largest_base);
  }
  return x;
}

GKLX_BOTH Totals<REAL> merged(const Totals<REAL> &a, const Totals<REAL> &b) {
  return {larger(a.largest_weight, b.largest_weight), larger(a.largest_base, b.largest_base), 0, 0};
}

struct BatchSums {
  Sum weight, squared_mass;
};

GKLX_BOTH BatchSums thread_sums(const RowStatistics *found, int64_t rows, bool squares, REAL gamma,
                                const Totals<REAL> &scales, int lane) {
  BatchSums x = {{0, 0}, {0, 0}};
#pragma unroll 8
  for (int64_t row = lane; row < rows; row += BLOCK) add(x.weight, found[row].weight / scales.largest_weight);
  if (!squares) return x;
#pragma unroll 2
  for (int64_t row = lane; row < rows; row += BLOCK) {
    const REAL v = found[row].weight / scales.largest_weight;
    const REAL mass = found[row].mass * power_of_base(found[row].base / scales.largest_base, gamma);
    add(x.squared_mass, v == REAL(0) ? REAL(0) : v * (mass * mass));
  }
  return x;
}

GKLX_BOTH BatchSums merged(BatchSums a, const BatchSums &b) {
  add(a.weight, b.weight);
  add(a.squared_mass, b.squared_mass);
  return a;
}

// --- values and gradients --------------------------------------------------------------------------------------------

// What is asked for; null where it is not.
struct Asked {
  Totals<REAL> totals;
  bool mean, tempered, symmetric, batch_normalized;
  REAL mse_weight, ce_weight, ranks;
  const REAL *upstream;  // [rows], or one number
  bool upstream_per_row;
  REAL *value, *kl, *ce, *energy;  // [rows]
  STUDENT *to_student;             // [rows, classes]
  TEACHER *to_teacher;
};

// What a sample's CE (or KL) and energy are multiplied by in the value, as `factors_of` in _core/batch.py.
struct Factors {
  REAL ce, energy;
};

GKLX_BOTH Factors factors_of(const Given &g, const Asked &a, const RowStatistics &r) {
  const REAL share = reduction_weight(r.weight, a.mean, a.ranks, a.totals);
  Factors f = {a.ce_weight * share, a.mse_weight * share};
  if (r.weight == REAL(0) || a.mse_weight == REAL(0)) return {f.ce, REAL(0)};
  if (a.tempered) f.energy *= g.inverse_temperature * g.inverse_temperature;
  if (DECOMPOSED) {
    const REAL base = a.batch_normalized ? r.base / a.totals.largest_base : r.base;
    f.energy *= mass_factor(r.mass, power_of_base(base, g.gamma), a.batch_normalized, a.totals);
  }
  return f;
}

GKLX_BOTH void write_losses(const Given &g, const Asked &a, const RowStatistics &r, int64_t row) {
  if (a.kl) a.kl[row] = r.kl;
  if (a.ce) a.ce[row] = r.ce;
  if (a.energy) a.energy[row] = r.energy;
  if (!a.value) return;
  const Factors f = factors_of(g, a, r);
  REAL value = scaled(f.ce, DECOMPOSED ? r.ce : r.kl);
  if (DECOMPOSED && a.mse_weight != REAL(0)) value += scaled(f.energy, r.energy);
  a.value[row] = value;
}

// Losses whose digits cancel in the sums of the statistics.
struct Sums {
  Sum kl, squares;  // the squares are multiplied by `per_class`
};

GKLX_BOTH bool needs_sums(const Asked &a, const RowStatistics &r) {
  const bool kl = a.kl || (a.value && !DECOMPOSED), energy = a.energy || (a.value && DECOMPOSED);
  return (kl && !r.knows_kl) || (energy && !r.knows_energy);
}

GKLX_BOTH Sums merged(Sums a, const Sums &b) {
  add(a.kl, b.kl);
  add(a.squares, b.squares);
  return a;
}

template <bool Guarded> GKLX_BOTH REAL centred(const RowStatistics &r, const Difference<REAL> &d, REAL w) {
  const REAL c = deviation(d, r.reference) - r.mean;
  if (!Guarded) return c;
  if (w == REAL(0)) return REAL(0);
  if (r.undefined) return nan_of<REAL>();
  return !r.infinite ? c : is_infinite(d.high) ? d.high : r.others;
}

GKLX_BOTH RowStatistics settled(const Given &g, RowStatistics r, const Sums &sums) {
  const REAL scale = r.guarded ? REAL(8) : REAL(0.5);  // 16 quarters of quarters
  if (!r.knows_kl) r.kl = value_of(sums.kl);
  const REAL mass = r.mass * g.per_class;
  if (!r.knows_energy) r.energy = mass == REAL(0) ? REAL(0) : scale * value_of(sums.squares) / mass;
  settle(r);
  return r;
}

// Spread: wMSE, or KL's gradient to the teacher, has a part in the gradients. Summed: losses are to be summed again,
// which includes Spread.
template <bool Guarded, bool Spread, bool Summed>
GKLX_BOTH Sums thread_results(const Given &g, const Asked &a, const RowStatistics &r, const Factors &f, int64_t row,
                              int lane) {
  const Lines lines = lines_of(g, row);
  const REAL per_divisor = REAL(1) / r.base;
  const REAL gap_rate = f.ce * g.inverse_temperature;
  const REAL scale = difference_scale<Guarded> / (r.mass == REAL(0) ? REAL(1) : r.mass);
  const REAL of_student = gap_rate * r.gap_of_student, of_both = gap_rate * r.per_t_total, of_spread = f.energy * scale;
  const Difference<REAL> top = difference_at<REAL, Guarded>(r.t_top, r.s_top);
  // In two factors: of the smallest temperature, four times the inverse is infinite.
  constexpr REAL half_scale = difference_scale<Guarded> / 2;
  const REAL doubled = REAL(2) * g.inverse_temperature;
  Pack<STUDENT> *to_student = (Pack<STUDENT> *)(a.to_student + row * g.classes);
  Pack<TEACHER> *to_teacher = (Pack<TEACHER> *)(a.to_teacher + row * g.classes);
  Sums sums = {{0, 0}, {0, 0}};
#pragma unroll 1
  for (int i = lane; i < lines.packs; i += GROUP) {
    Pack<STUDENT> s_pack = lines.student[i];
    Pack<TEACHER> t_pack = lines.teacher[i];
    const Classes c = classes_of<Guarded>(g, row, lines, i, s_pack, t_pack);
    REAL kl = 0, squares = 0;
#pragma unroll
    for (int k = 0; k < VECTOR; ++k) {
      REAL gap = 0, spread = 0;
      if (!Guarded || (r.has_valid && c.valid[k])) {
        const REAL below = c.t[k] - r.t_top;
        const REAL of_s = exponential_of<Guarded>(c.s[k] - r.s_top, g.per_temperature);
        const REAL of_t = exponential_of<Guarded>(below, g.per_temperature);
        if (Guarded) {
          gap = of_s * r.gap_of_student + (of_s - of_t) * r.per_t_total;
          gap = scaled(gap_rate, r.undefined ? nan_of<REAL>() : gap);
        } else {
          gap = of_s * of_student + (of_s - of_t) * of_both;
        }
        if (Spread) {
          const Difference<REAL> d = difference_at<REAL, Guarded>(c.t[k], c.s[k]);
          const REAL w = weight_of<Guarded>(g, below, of_t, c.prior[k], per_divisor);
          const REAL away = centred<Guarded>(r, d, w);
          spread = Guarded ? scaled(f.energy, scale * (w * away)) : of_spread * (w * away);
          if (a.symmetric) gap -= spread;
          if (Summed) {
            squares += ((g.per_class * w) * away) * away;
            const REAL p = of_t * r.per_t_total, q = of_s * r.per_s_total;
            const REAL apart = deviation(d, top) * half_scale, ratio = apart * doubled - r.log_ratio;
            const bool none = Guarded && (is_infinite(d.high) || p == REAL(0));
            // Where log p - log q is too large for REAL, p times it need not be.
            kl += none ? q : Guarded && is_infinite(ratio) ? (p * apart) * doubled : divergence(p, q, ratio);
          }
        }
      }
      if (a.to_student) narrow(gap, s_pack.x[k]);
      if (a.to_teacher) narrow(spread, t_pack.x[k]);
    }
    if (a.to_student) to_student[i] = s_pack;
    if (a.to_teacher) to_teacher[i] = t_pack;
    if (Summed) {
      add(sums.kl, kl);
      add(sums.squares, squares);
    }
  }
  return sums;
}

// Where the gradients' factors overflow, `Guarded` gives 0, and not NaN, if what they multiply is 0. A row that had no need
// of it before is moved to its units: there a difference is a quarter of d.
GKLX_BOTH RowStatistics guarded_for(const Given &g, RowStatistics r, const Factors &f) {
  const bool overflows = is_infinite(f.ce * g.inverse_temperature) || is_infinite(f.energy);
  if (r.guarded || !overflows) return r;
  r.guarded = true;
  r.reference = {REAL(0.25) * r.reference.high, REAL(0.25) * r.reference.low};
  r.mean *= REAL(0.25);
  return r;
}

GKLX_APART Sums guarded_results(const Given &g, const Asked &a, const RowStatistics &r, const Factors &f, int64_t row,
                                int lane) {
  return thread_results<true, true, true>(g, a, r, f, row, lane);
}

GKLX_BOTH Sums thread_results(const Given &g, const Asked &a, const RowStatistics &r, const Factors &f, bool summed,
                              int64_t row, int lane) {
  if (!summed && !a.to_student && !a.to_teacher) return {{0, 0}, {0, 0}};
  if (r.guarded) return guarded_results(g, a, r, f, row, lane);
  if (summed) return thread_results<false, true, true>(g, a, r, f, row, lane);
  const bool spread = f.energy != REAL(0) && (a.to_teacher || a.symmetric);
  if (spread) return thread_results<false, true, false>(g, a, r, f, row, lane);
  return thread_results<false, false, false>(g, a, r, f, row, lane);
}

// --- the kernels -----------------------------------------------------------------------------------------------------

#define GIVEN                                                                                                     \
  const STUDENT *student, const TEACHER *teacher, const REAL *prior, const int64_t *labels,                      \
      const REAL *given_weights, const uint8_t *where, int64_t rows, int64_t classes, int64_t where_row_stride,  \
      int64_t where_class_stride, REAL per_temperature, REAL per_temperature_low, REAL per_weight_temperature,   \
      REAL per_weight_temperature_low, REAL weighing, REAL weighing_low, REAL inverse_temperature, REAL gamma,         \
      REAL per_class

#define GATHERED                                                                                                 \
  {student, teacher, prior, labels, given_weights, where, rows, classes, where_row_stride, where_class_stride,   \
   {per_temperature, per_temperature_low}, {per_weight_temperature, per_weight_temperature_low},                 \
   {weighing, weighing_low}, inverse_temperature, gamma, per_class}

// The four numbers of a batch are null where the samples share nothing.
#define ASKED                                                                                                       \
  const REAL *largest_weight, const REAL *largest_base, const REAL *total_weight, const REAL *squared_mass,         \
      int64_t mean, int64_t tempered, int64_t symmetric, int64_t batch_normalized,                                  \
      REAL mse_weight, REAL ce_weight, REAL ranks, const REAL *upstream, int64_t upstream_per_row, REAL *value,      \
      REAL *kl, REAL *ce, REAL *energy, STUDENT *to_student, TEACHER *to_teacher

#define TOTALS                                                                                                      \
  {largest_weight ? *largest_weight : REAL(1), largest_base ? *largest_base : REAL(1),                              \
   total_weight ? *total_weight : REAL(0), squared_mass ? *squared_mass : REAL(0)}

#define ASKED_FOR                                                                                                    \
  {TOTALS, mean != 0, tempered != 0, symmetric != 0, batch_normalized != 0, mse_weight, ce_weight,  \
   ranks, upstream, upstream_per_row != 0, value, kl, ce, energy, to_student, to_teacher}

GKLX_BOTH Factors with_upstream(const Asked &a, Factors f, int64_t row) {
  if (!a.upstream) return f;
  const REAL by = a.upstream[a.upstream_per_row ? row : 0];
  return {f.ce * by, f.energy * by};
}

#ifdef __CUDACC_RTC__

// What the lane `by` lanes above has.
template <class T> __device__ __forceinline__ T from_above(const T &x, int by) {
  constexpr int words = sizeof(T) / sizeof(uint32_t);
  uint32_t moved[words];
  memcpy(moved, &x, sizeof(T));
#pragma unroll
  for (int i = 0; i < words; ++i) moved[i] = __shfl_down_sync(0xffffffffu, moved[i], by);
  T y;
  memcpy(&y, moved, sizeof(T));
  return y;
}

// What the threads of a group have, merged: for each of them. All threads of the block take part; `store` has an
// element for each warp.
template <class T, class Merge>
__device__ __forceinline__ T all_merged(T own, T *store, int group, const Merge &merge) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = group / 32, first = warp / warps * warps;
  int half = 16;
  for (bool within = true; half;) {  // first within each warp, then of the warps
    own = merge(own, from_above(own, half));
    half /= 2;
    if (half || !within || warps == 1) continue;
    within = false;
    half = warps / 2;
    if (lane == 0) store[warp] = own;
    __syncthreads();
    if (lane < warps) own = store[first + lane];
  }
  __syncthreads();
  if (lane == 0 && warp == first) store[warp] = own;
  __syncthreads();
  own = store[first];
  __syncthreads();
  return own;
}

// Blocks that a multiprocessor shall hold: a thread then has 64 registers, or 128 for double.
#define BLOCKS (sizeof(REAL) == 4 ? 4 : 2)

extern "C" __global__ void __launch_bounds__(BLOCK, BLOCKS) statistics(GIVEN, RowStatistics *found) {
  __shared__ Partial store[BLOCK / 32];
  const Given g = GATHERED;
  const int lane = threadIdx.x % GROUP;
  const int64_t row = (int64_t)blockIdx.x * (BLOCK / GROUP) + threadIdx.x / GROUP;
  bool left = row < rows;  // to be done
#pragma unroll 1
  for (int guarded = !exponents_are_finite(g); guarded < 2 && __syncthreads_or(left); ++guarded) {
    Origin origin = nowhere();
    if (left) origin = guarded ? thread_origin<true>(g, row, lane) : thread_origin<false>(g, row, lane);
    origin = all_merged(origin, (Origin *)store, GROUP, [](const Origin &a, const Origin &b) { return merged(a, b); });
    Partial x = no_classes(origin);
    if (left) x = guarded ? guarded_statistics(g, row, lane, origin) : thread_statistics<false>(g, row, lane, origin);
    x = all_merged(x, store, GROUP, [&](const Partial &a, const Partial &b) { return merged(g, a, b); });
    if (!left || (!guarded && !logits_are_bounded(x))) continue;
    if (lane == 0) found[row] = finished(g, row, x, guarded);
    left = false;
  }
}

extern "C" __global__ void __launch_bounds__(BLOCK)
batch(const RowStatistics *found, int64_t rows, int64_t squares, REAL gamma, REAL *largest_weight, REAL *largest_base,
      REAL *weight, REAL *squared_mass) {
  __shared__ BatchSums store[BLOCK / 32];
  const int at = threadIdx.x;
  Totals<REAL> scales = all_merged(thread_maxima(found, rows, squares != 0, at), (Totals<REAL> *)store, BLOCK,
                                   [](const Totals<REAL> &a, const Totals<REAL> &b) { return merged(a, b); });
  scales.largest_weight = power_of_two_below(scales.largest_weight);
  scales.largest_base = squares ? invertible(scales.largest_base) : REAL(1);
  const BatchSums sums = all_merged(thread_sums(found, rows, squares != 0, gamma, scales, at), store, BLOCK,
                                    [](const BatchSums &a, const BatchSums &b) { return merged(a, b); });
  if (at != 0) return;
  *largest_weight = scales.largest_weight;
  *largest_base = scales.largest_base;
  *weight = value_of(sums.weight);
  *squared_mass = value_of(sums.squared_mass);
}

extern "C" __global__ void __launch_bounds__(BLOCK, BLOCKS) gradients(GIVEN, const RowStatistics *found, ASKED) {
  __shared__ Sums store[BLOCK / 32];
  __shared__ Factors factors[BLOCK / GROUP];
  const Given g = GATHERED;
  const Asked a = ASKED_FOR;
  const int at = threadIdx.x, lane = at % GROUP;
  const int64_t row = (int64_t)blockIdx.x * (BLOCK / GROUP) + at / GROUP;
  const bool in = row < rows;
  const RowStatistics known = found[in ? row : 0];
  if (in && lane == 0) factors[at / GROUP] = with_upstream(a, factors_of(g, a, known), row);
  const bool summed = in && needs_sums(a, known);
  const bool any_summed = __syncthreads_or(summed);
  Sums sums = {{0, 0}, {0, 0}};
  const Factors f = factors[at / GROUP];
  const RowStatistics r = guarded_for(g, known, f);
  if (in) sums = thread_results(g, a, r, f, summed, row, lane);
  if (any_summed) sums = all_merged(sums, store, GROUP, [](const Sums &x, const Sums &y) { return merged(x, y); });
  if (in && lane == 0) write_losses(g, a, summed ? settled(g, r, sums) : r, row);
}

#endif
