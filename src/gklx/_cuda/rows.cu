// The losses of rows of logits and their gradients, in two kernels that each read the logits once.
//
// `statistics` finds what a row must know of itself: maxima, normalisers, W, mu. `gradients` then has every class's
// share of the value and both gradients. The formulas, the names and what becomes of infinities and NaN are those of
// _sweep.py, which this is tested against; sums run in double, so that no second step is needed where _sweep.py takes
// one (mu, q - p).
//
// A row belongs to a group of GROUP threads; BLOCK / GROUP rows share a block. What a thread does, how two threads'
// results merge and how a row ends are plain functions, so that the tests can run them on a CPU, thread by thread.
//
// Compiled with: REAL (float or double, computed in), STUDENT and TEACHER (types of the logits: float, double, Half or
// Brain), VECTOR (how many logits one load takes), GROUP, BLOCK.

#ifdef __CUDACC_RTC__
#define BOTH __device__ __forceinline__
#else
#include <cmath>
#define BOTH inline
#endif

typedef unsigned short Bits;
typedef unsigned char Flag;

struct Half { Bits bits; };
struct Brain { Bits bits; };  // bfloat16

BOTH float float_of(unsigned int bits) {
  union { unsigned int i; float f; } u;
  u.i = bits;
  return u.f;
}

BOTH unsigned int bits_of(float x) {
  union { unsigned int i; float f; } u;
  u.f = x;
  return u.i;
}

BOTH float wide(float x) { return x; }
BOTH double wide(double x) { return x; }
BOTH float wide(Brain x) { return float_of((unsigned int)x.bits << 16); }
BOTH float wide(Half x) {
  unsigned int sign = (x.bits & 0x8000u) << 16, exponent = (x.bits >> 10) & 31u, fraction = x.bits & 1023u;
  if (exponent == 31u) return float_of(sign | 0x7f800000u | (fraction << 13));
  if (exponent) return float_of(sign | ((exponent + 112u) << 23) | (fraction << 13));
  float small = (float)fraction * float_of(0x33800000u);  // 2^-24
  return sign ? -small : small;
}

BOTH void narrow(double x, float& to) { to = (float)x; }
BOTH void narrow(double x, double& to) { to = x; }
BOTH void narrow(double x, Brain& to) {
  unsigned int bits = bits_of((float)x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) to.bits = 0x7fc0;
  else to.bits = (Bits)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
BOTH void narrow(double wide_x, Half& to) {
  unsigned int bits = bits_of((float)wide_x), sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) to.bits = (Bits)(sign | 0x7e00u);
  else if (size >= 0x477ff000u) to.bits = (Bits)(sign | 0x7c00u);
  else if (size >= 0x38800000u) to.bits = (Bits)(sign | ((size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13));
  else to.bits = (Bits)(sign | (bits_of(float_of(size) + 0.5f) - 0x3f000000u));  // the sum rounds to 2^-24
}

BOTH float exponential(float x) { return expf(x); }
BOTH double exponential(double x) { return exp(x); }
BOTH float exponential_minus_1(float x) { return expm1f(x); }
BOTH double exponential_minus_1(double x) { return expm1(x); }
BOTH float power(float x, float y) { return powf(x, y); }
BOTH double power(double x, double y) { return pow(x, y); }

#define INF ((double)float_of(0x7f800000u))
#define NOTHING ((double)float_of(0x7fc00000u))

// What all rows have in common. Null where there is no such array.
struct Given {
  const STUDENT* student;
  const TEACHER* teacher;
  const REAL* prior;          // [C, C] with labels, else [rows, C]
  const long long* labels;    // [rows]
  const REAL* sample_weight;  // [rows]
  const Flag* where;          // [rows, C]
  long long rows, classes;
  double temperature, weight_temperature, gamma;
  double per_temperature, per_weight_temperature;  // 1 / each: a division in double takes as long as all the rest
};

// What `statistics` leaves of a row.
struct Row {
  double student_top, teacher_top;        // maxima over the classes that count
  double student_total, teacher_total;    // sums of exp((x - top) / T); NaN where the softmax is undefined
  double student_zero, teacher_zero;      // logits of the class that weighs most
  double mass, mean;                      // W; mu, of (t - teacher_zero) - (s - student_zero); infinite as in _sweep.py
  double scale;                           // what the teacher's own weights are multiplied by: 1 / normaliser^gamma
  Flag any, infinite, unreachable;        // some class counts; some d of weight is infinite; some d is +inf
};

struct Element {
  double s, t;
  bool counts;
};

BOTH Element element(const Given& g, long long row, long long j, STUDENT s, TEACHER t) {
  Element e = {(double)wide(s), (double)wide(t), true};
  if (g.where && !g.where[row * g.classes + j]) e.counts = false;
  if (e.s == -INF && e.t == -INF) e.counts = false;
  return e;
}

// A sum of exponentials about the largest argument so far.
struct Online {
  double top, total;
};

BOTH REAL decay(double by, double per_temperature) { return exponential((REAL)(by * per_temperature)); }

BOTH void add(Online& x, double value, double per_temperature) {
  if (value > x.top) {
    x.total = (x.top == -INF ? 0.0 : x.total * (double)decay(x.top - value, per_temperature)) + 1.0;
    x.top = value;
  } else if (value != -INF) {  // NaN comes this way, and stays
    x.total += (double)decay(value - x.top, per_temperature);
  }
}

BOTH double rescaled(double total, double from, double to, double per_temperature) {
  return from == -INF || from == to ? total : total * (double)decay(from - to, per_temperature);
}

// What a thread collects in its first pass.
struct Partial {
  Online s, t, weights;   // weights: at tau
  double mass, moment;    // sums of w and of w d; of the teacher's own weights about t.top, to the power gamma
  double peak;            // the largest weight so far, or its logit: d is taken from that of this class, so that where
  double s_zero, t_zero;  // one class has nearly all weight, mu is known to its own digits
  double above, below;    // where d is infinite: the largest logarithm of a weight, by tau / gamma; with a prior 0
  bool any, unreachable;
};

BOTH double larger(double a, double b) { return a > b ? a : b; }

BOTH Partial nothing() {
  Partial x = {{-INF, 0.0}, {-INF, 0.0}, {-INF, 0.0}, 0.0, 0.0, -INF, 0.0, 0.0, -INF, -INF, false, false};
  return x;
}

BOTH bool own_weights(const Given& g) { return !g.prior; }

BOTH double prior_weight(const Given& g, long long row, long long j) {
  long long of = row;
  if (g.labels) {
    of = g.labels[row];
    if (of < 0 || of >= g.classes) of = 0;
  }
  REAL x = g.prior[of * g.classes + j];
  if (!(x >= (REAL)0)) return NOTHING;
  return g.gamma == 1.0 ? (double)x : (double)power(x, (REAL)g.gamma);
}

// exp(gamma (t - top) / tau), 1 where gamma is 0 though t be -inf
BOTH double own_weight(const Given& g, double below_top) {
  if (g.gamma == 0.0) return 1.0;
  return (double)exponential((REAL)(g.gamma * (below_top * g.per_weight_temperature)));
}

BOTH void move_zero(Partial& x, double s, double t) {
  x.moment -= x.mass == 0.0 ? 0.0 : x.mass * ((t - x.t_zero) - (s - x.s_zero));
  x.s_zero = s;
  x.t_zero = t;
}

BOTH void collect(const Given& g, long long row, long long j, const Element& e, Partial& x) {
  if (!e.counts) return;
  x.any = true;
  double old_top = x.t.top, w, height;
  add(x.s, e.s, g.per_temperature);
  add(x.t, e.t, g.per_temperature);
  bool student_finite = e.s - e.s == 0.0, teacher_finite = e.t - e.t == 0.0;
  bool above = e.s == -INF && teacher_finite, below = e.t == -INF && student_finite;
  if (above) x.unreachable = true;
  if (own_weights(g)) {
    if (g.weight_temperature != g.temperature) add(x.weights, e.t, g.per_weight_temperature);
    if (x.t.top > old_top && old_top != -INF) {
      double by = own_weight(g, old_top - x.t.top);
      x.mass *= by;
      x.moment *= by;
    }
    height = e.t;
    w = own_weight(g, e.t == -INF ? -INF : e.t - x.t.top);
    if (above) x.above = larger(x.above, e.t);
    if (below && g.gamma == 0.0) x.below = 0.0;
  } else {
    height = w = prior_weight(g, row, j);
    if (w > 0.0 && above) x.above = 0.0;
    if (w > 0.0 && below) x.below = 0.0;
  }
  if (height > x.peak && student_finite && teacher_finite) {
    x.peak = height;
    move_zero(x, e.s, e.t);
  }
  x.mass += w;
  if (!above && !below && w != 0.0) x.moment += w * ((e.t - x.t_zero) - (e.s - x.s_zero));
}

BOTH Partial merged(const Given& g, Partial a, Partial b) {
  double s = larger(a.s.top, b.s.top), t = larger(a.t.top, b.t.top);
  if (own_weights(g)) {
    Partial* both[2] = {&a, &b};
    for (int i = 0; i < 2; ++i) {
      double from = both[i]->t.top;
      if (from == -INF || from == t) continue;
      double by = own_weight(g, from - t);
      both[i]->mass *= by;
      both[i]->moment *= by;
    }
  }
  if (a.peak >= b.peak) move_zero(b, a.s_zero, a.t_zero);
  else move_zero(a, b.s_zero, b.t_zero);
  Partial x;
  x.s_zero = a.s_zero;
  x.t_zero = a.t_zero;
  x.peak = larger(a.peak, b.peak);
  x.s.total = rescaled(a.s.total, a.s.top, s, g.per_temperature) + rescaled(b.s.total, b.s.top, s, g.per_temperature);
  x.t.total = rescaled(a.t.total, a.t.top, t, g.per_temperature) + rescaled(b.t.total, b.t.top, t, g.per_temperature);
  x.weights.total = rescaled(a.weights.total, a.t.top, t, g.per_weight_temperature)
                  + rescaled(b.weights.total, b.t.top, t, g.per_weight_temperature);
  x.s.top = s;
  x.t.top = x.weights.top = t;
  x.mass = a.mass + b.mass;
  x.moment = a.moment + b.moment;
  x.above = larger(a.above, b.above);
  x.below = larger(a.below, b.below);
  x.any = a.any || b.any;
  x.unreachable = a.unreachable || b.unreachable;
  return x;
}

// --- statistics ------------------------------------------------------------------------------------------------------

template <typename T>
struct alignas(VECTOR * sizeof(T)) Pack {
  T x[VECTOR];
};

BOTH double given_weight(const Given& g, long long row) {
  return g.sample_weight ? (double)g.sample_weight[row] : 1.0;
}

BOTH Partial thread_statistics(const Given& g, long long row, int lane) {
  Partial x = nothing();
  if (given_weight(g, row) == 0.0) return x;
  const STUDENT* s = g.student + row * g.classes;
  const TEACHER* t = g.teacher + row * g.classes;
  for (long long i = lane; i < g.classes / VECTOR; i += GROUP) {
    Pack<STUDENT> of_s = ((const Pack<STUDENT>*)s)[i];
    Pack<TEACHER> of_t = ((const Pack<TEACHER>*)t)[i];
#pragma unroll
    for (int k = 0; k < VECTOR; ++k) {
      long long j = i * VECTOR + k;
      collect(g, row, j, element(g, row, j, of_s.x[k], of_t.x[k]), x);
    }
  }
  return x;
}

BOTH Row finished(const Given& g, long long row, const Partial& x) {
  Row r = {0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0, 0, 0};
  if (!x.any) return r;
  r.any = 1;
  r.unreachable = x.unreachable;
  r.student_top = x.s.top;
  r.teacher_top = x.t.top;
  // Without a finite maximum there is no softmax.
  r.student_total = x.s.top - x.s.top == 0.0 ? x.s.total : NOTHING;
  r.teacher_total = x.t.top - x.t.top == 0.0 ? x.t.total : NOTHING;
  bool above, below;
  r.mass = x.mass;
  if (own_weights(g)) {
    double total = g.weight_temperature == g.temperature ? r.teacher_total : x.weights.total;
    r.scale = total == total ? pow(total, -g.gamma) : NOTHING;
    r.mass *= r.scale;
    above = x.above != -INF && (REAL)(own_weight(g, x.above - x.t.top) * r.scale) > (REAL)0;
    below = x.below != -INF;
  } else {
    above = x.above != -INF;
    below = x.below != -INF;
    if (g.labels && (g.labels[row] < 0 || g.labels[row] >= g.classes)) r.mass = NOTHING;
  }
  r.student_zero = x.s_zero;
  r.teacher_zero = x.t_zero;
  r.mean = x.mass == 0.0 ? 0.0 : x.moment / x.mass;
  r.infinite = above || below;
  if (r.infinite) r.mean = above && below ? NOTHING : above ? INF : -INF;
  return r;
}

// The effective sample weight: 0 where nothing counts, NaN where negative.
BOTH REAL effective_weight(const Given& g, long long row, const Row& r) {
  double v = given_weight(g, row);
  return r.any ? (REAL)(v >= 0.0 ? v : NOTHING) : (REAL)0;
}

// --- values and gradients --------------------------------------------------------------------------------------------

// What is asked for; null where it is not.
struct Asked {
  const REAL* teacher_rate;  // [rows]: of w (d - mu)
  const REAL* student_rate;  // [rows]: of q - p
  STUDENT* to_student;       // [rows, C]
  TEACHER* to_teacher;
  REAL* kl;                  // [rows]
  REAL* mse;
  REAL* ce;
  long long symmetric, tempered;
};

struct Sums {
  double kl, squares, ce;
};

BOTH Sums added(const Sums& a, const Sums& b) {
  Sums x = {a.kl + b.kl, a.squares + b.squares, a.ce + b.ce};
  return x;
}

BOTH Sums thread_gradients(const Given& g, const Asked& a, const Row& r, long long row, int lane) {
  Sums sums = {0.0, 0.0, 0.0};
  const STUDENT* s = g.student + row * g.classes;
  const TEACHER* t = g.teacher + row * g.classes;
  double of_student = 1.0 / r.student_total, of_teacher = 1.0 / r.teacher_total;
  double normalizers = a.kl ? log(r.teacher_total) - log(r.student_total) : 0.0;
  double teacher_rate = a.teacher_rate ? (double)a.teacher_rate[row] : 0.0;
  double student_rate = a.student_rate ? (double)a.student_rate[row] : 0.0;
  bool spread = a.teacher_rate || a.mse;
  for (long long i = lane; i < g.classes / VECTOR; i += GROUP) {
    Pack<STUDENT> of_s = ((const Pack<STUDENT>*)s)[i];
    Pack<TEACHER> of_t = ((const Pack<TEACHER>*)t)[i];
#pragma unroll
    for (int k = 0; k < VECTOR; ++k) {
      long long j = i * VECTOR + k;
      Element e = element(g, row, j, of_s.x[k], of_t.x[k]);
      double student = 0.0, teacher = 0.0;
      if (e.counts && r.any) {
        double z_student = e.s - r.student_top, z_teacher = e.t - r.teacher_top, d = z_teacher - z_student;
        double about_zero = (e.t - r.teacher_zero) - (e.s - r.student_zero);
        bool infinite = d == INF || d == -INF;
        double q = (double)decay(z_student, g.per_temperature) * of_student;
        double p = (double)decay(z_teacher, g.per_temperature) * of_teacher;
        if (spread) {
          double w = own_weights(g) ? own_weight(g, z_teacher) * r.scale : prior_weight(g, row, j);
          if ((REAL)w == (REAL)0) w = 0.0;
          double centred = w == 0.0 ? 0.0 : infinite ? d : about_zero - r.mean;
          teacher = w * centred * teacher_rate;
          sums.squares += w * centred * centred;
        }
        if (a.student_rate) student = (q - p) * student_rate;
        if (a.symmetric) student -= teacher;
        if (a.ce && z_student != -INF) sums.ce += p * z_student;
        if (a.kl) {
          double ratio = (infinite ? 0.0 : d) * g.per_temperature - normalizers;
          double far = (infinite ? 0.0 : p * ratio) + (q - p);
          bool close = !infinite && ratio < 1.0 && ratio > -1.0;
          sums.kl += close ? p * (ratio + (double)exponential_minus_1((REAL)-ratio)) : far;
        }
      }
      narrow(student, of_s.x[k]);
      narrow(teacher, of_t.x[k]);
    }
    if (a.to_student) ((Pack<STUDENT>*)(a.to_student + row * g.classes))[i] = of_s;
    if (a.to_teacher) ((Pack<TEACHER>*)(a.to_teacher + row * g.classes))[i] = of_t;
  }
  return sums;
}

BOTH void end(const Given& g, const Asked& a, const Row& r, long long row, const Sums& sums) {
  bool defined = r.student_total == r.student_total && r.teacher_total == r.teacher_total;
  bool unreachable = r.unreachable && defined;
  if (a.kl) a.kl[row] = (REAL)(unreachable ? INF : sums.kl);
  if (a.ce) a.ce[row] = (REAL)(unreachable ? INF : log(r.student_total) - sums.ce / g.temperature);
  if (a.mse) {
    double mse = 0.5 * r.mass * sums.squares;
    if (a.tempered) mse = mse / g.temperature / g.temperature;
    if (r.infinite && defined && r.mass == r.mass) mse = INF;
    a.mse[row] = (REAL)mse;
  }
}

// --- the kernels -----------------------------------------------------------------------------------------------------

#ifdef __CUDACC_RTC__

#define GIVEN                                                                                                   \
  const STUDENT *student, const TEACHER *teacher, const REAL *prior, const long long *labels,                   \
      const REAL *sample_weight, const Flag *where, long long rows, long long classes, double temperature,      \
      double weight_temperature, double gamma

#define GATHERED \
  {student, teacher, prior, labels, sample_weight, where, rows, classes, temperature, weight_temperature, gamma, \
   1.0 / temperature, 1.0 / weight_temperature}

extern "C" __global__ void __launch_bounds__(BLOCK) statistics(GIVEN, Row* found, REAL* weight, REAL* mass) {
  __shared__ Partial partials[BLOCK];
  Given g = GATHERED;
  int at = threadIdx.x, lane = at % GROUP;
  long long row = (long long)blockIdx.x * (BLOCK / GROUP) + at / GROUP;
  partials[at] = row < rows ? thread_statistics(g, row, lane) : nothing();
  for (int half = GROUP / 2; half; half /= 2) {
    __syncthreads();
    if (lane < half) partials[at] = merged(g, partials[at], partials[at + half]);
  }
  if (lane == 0 && row < rows) {
    Row r = finished(g, row, partials[at]);
    found[row] = r;
    weight[row] = effective_weight(g, row, r);
    mass[row] = (REAL)r.mass;
  }
}

extern "C" __global__ void __launch_bounds__(BLOCK) gradients(
    GIVEN, const Row* found, const REAL* teacher_rate, const REAL* student_rate, STUDENT* to_student,
    TEACHER* to_teacher, REAL* kl, REAL* mse, REAL* ce, long long symmetric, long long tempered) {
  __shared__ Sums sums[BLOCK];
  Given g = GATHERED;
  Asked a = {teacher_rate, student_rate, to_student, to_teacher, kl, mse, ce, symmetric, tempered};
  int at = threadIdx.x, lane = at % GROUP;
  long long row = (long long)blockIdx.x * (BLOCK / GROUP) + at / GROUP;
  Sums none = {0.0, 0.0, 0.0};
  sums[at] = row < rows ? thread_gradients(g, a, found[row], row, lane) : none;
  if (!kl && !mse && !ce) return;
  for (int half = GROUP / 2; half; half /= 2) {
    __syncthreads();
    if (lane < half) sums[at] = added(sums[at], sums[at + half]);
  }
  if (lane == 0 && row < rows) end(g, a, found[row], row, sums[at]);
}

#endif
