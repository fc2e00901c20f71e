// The loops over the classes of a row, compiled once for each instruction set.
//
// A row stays in the processor's cache, so that it is cheap to go over it several times in short loops that vectorise:
// inspect it; exponentials and their sums; sums of the deviations of d from its mean; gradients. Sums run in REAL over
// CHUNK classes, in double over the chunks. Everything is within an anonymous namespace: a function that two instruction
// sets shared by name would become one of them.

#include "cpu.h"

#include <cmath>
#include <initializer_list>

#include "row.h"

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(_MSC_VER)
#define SIMD(...) __pragma(omp simd __VA_ARGS__)
#else
#define PRAGMA(x) _Pragma(#x)
#define SIMD(...) PRAGMA(omp simd __VA_ARGS__)
#endif

namespace {

constexpr int64_t CHUNK = 1024;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// --- types of arrays -------------------------------------------------------------------------------------------------

int64_t bytes_of(int32_t type) { return type == F64 ? 8 : type == F32 ? 4 : 2; }

template <class R> constexpr int32_t type_of = sizeof(R) == 8 ? F64 : F32;

float float_of_half(uint16_t half) {
  uint32_t sign = uint32_t(half & 0x8000u) << 16, size = half & 0x7fffu;
  float normal = real_of(uint32_t((size << 13) + (112u << 23)));
  float subnormal = float(size) * real_of(uint32_t(103u << 23));  // 2^-24
  float unbounded = real_of(uint32_t((size << 13) | 0x7f800000u));
  float x = size >= 0x7c00u ? unbounded : size < 0x400u ? subnormal : normal;
  return real_of(bits_of(x) | sign);
}

uint16_t half_of_float(float x) {
  uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
  uint32_t normal = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
  uint32_t subnormal = bits_of(real_of(size) + 0.5f) - 0x3f000000u;  // the sum rounds to a multiple of 2^-24
  uint32_t half = size > 0x7f800000u ? 0x7e00u : size >= 0x477ff000u ? 0x7c00u : size < 0x38800000u ? subnormal : normal;
  return uint16_t(half | sign);
}

uint16_t brain_of_float(float x) {
  uint32_t bits = bits_of(x);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// A float such that rounding it again to fewer digits gives what rounding `x` itself gives: odd where inexact.
float rounded_to_odd(double x) {
  float nearest = float(x);
  uint32_t bits = bits_of(nearest);
  if (double(nearest) == x || (bits & 1u)) return nearest;
  return real_of(size_of(double(nearest)) > size_of(x) ? bits - 1u : bits + 1u);
}

void widen_halves(const uint16_t *from, float *to, int64_t n) {
  int64_t j = 0;
#if defined(__F16C__)
  for (; j + 8 <= n; j += 8) _mm256_storeu_ps(to + j, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + j))));
#elif defined(__ARM_NEON) && defined(__aarch64__)
  for (; j + 4 <= n; j += 4) vst1q_f32(to + j, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from + j))));
#endif
  for (; j < n; ++j) to[j] = float_of_half(from[j]);
}

void narrow_to_halves(const float *from, uint16_t *to, int64_t n) {
  int64_t j = 0;
#if defined(__F16C__)
  for (; j + 8 <= n; j += 8) _mm_storeu_si128((__m128i *)(to + j), _mm256_cvtps_ph(_mm256_loadu_ps(from + j), 0));
#elif defined(__ARM_NEON) && defined(__aarch64__)
  for (; j + 4 <= n; j += 4) vst1_u16(to + j, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(from + j))));
#endif
  for (; j < n; ++j) to[j] = half_of_float(from[j]);
}

// Row `row` of an array of any type, as REAL: where it lies if it is that, else in `scratch`.
template <class R> const R *widened(const void *array, int32_t type, int64_t row, int64_t n, R *scratch) {
  const char *from = (const char *)array + row * n * bytes_of(type);
  if (type == type_of<R>) return (const R *)from;
  if (type == F64) {
    for (int64_t j = 0; j < n; ++j) scratch[j] = R(((const double *)from)[j]);
  } else if (type == F32) {
    for (int64_t j = 0; j < n; ++j) scratch[j] = R(((const float *)from)[j]);
  } else if (type == BF16) {
    for (int64_t j = 0; j < n; ++j) scratch[j] = R(real_of(uint32_t(((const uint16_t *)from)[j]) << 16));
  } else if constexpr (sizeof(R) == 4) {
    widen_halves((const uint16_t *)from, scratch, n);
  } else {
    for (int64_t j = 0; j < n; ++j) scratch[j] = R(float_of_half(((const uint16_t *)from)[j]));
  }
  return scratch;
}

// A row of gradients, rounded once to the logits' type.
template <class R> void narrow(const R *from, void *array, int32_t type, int64_t row, int64_t n) {
  char *to = (char *)array + row * n * bytes_of(type);
  if (type == type_of<R>) {
    if ((const char *)from != to) std::memcpy(to, from, size_t(n) * sizeof(R));
  } else if (type == F32) {
    for (int64_t j = 0; j < n; ++j) ((float *)to)[j] = float(from[j]);
  } else if constexpr (sizeof(R) == 4) {
    if (type == F16) narrow_to_halves(from, (uint16_t *)to, n);
    else for (int64_t j = 0; j < n; ++j) ((uint16_t *)to)[j] = brain_of_float(from[j]);
  } else {
    for (int64_t j = 0; j < n; ++j) {
      float odd = rounded_to_odd(from[j]);
      ((uint16_t *)to)[j] = type == F16 ? half_of_float(odd) : brain_of_float(odd);
    }
  }
}

// --- loops over the classes of one row -------------------------------------------------------------------------------

// A row of valid classes. `w` are the class weights but for a factor.
//
// Differences d are taken from that of a reference, the class that weighs most: where it has nearly all weight, what d is
// rounded by is as large as the differences that matter.
template <class R> struct Line {
  int64_t n;
  const R *s, *t, *w;
  R *es, *et;  // exp((x - top) / T)
  R s_top, t_top, s_reference, t_reference, per_temperature;
  double s_total, t_total, w_total;  // the sums of es, et, w
  double z_student;                  // the sum of et (s - s_top)
  R mean;                            // of what d is larger than at the reference
};

template <class R> struct Inspected {
  R s_top, t_top;
  bool moderate;  // all logits are finite, and so are sums of their differences
};

template <class R> Inspected<R> inspect(const R *s, const R *t, int64_t n) {
  using Word = typename Real<R>::Word;
  constexpr R limit = Real<R>::largest / R(1ull << 50);
  R s_top = -Real<R>::inf, t_top = -Real<R>::inf;
  Word beyond = 0;
  SIMD(reduction(max : s_top, t_top) reduction(| : beyond))
  for (int64_t j = 0; j < n; ++j) {
    s_top = s[j] > s_top ? s[j] : s_top;
    t_top = t[j] > t_top ? t[j] : t_top;
    beyond |= (size_of(s[j]) <= limit ? Word(0) : Word(1)) | (size_of(t[j]) <= limit ? Word(0) : Word(1));
  }
  return {s_top, t_top, beyond == 0};
}

// Fills es, et and their sums, and finds the part of CE. With `Own`, where the teacher's own softmax weighs the classes,
// also the reference: the largest of several does, as any number between their differences would.
template <class R, bool Careful, bool Own> void exponentials(Line<R> &x) {
  const R *s = x.s, *t = x.t;
  R *es = x.es, *et = x.et;
  const R s_top = x.s_top, t_top = x.t_top, per_temperature = x.per_temperature;
  double s_total = 0, t_total = 0, z_student = 0;
  R s_reference = -Real<R>::inf;
  for (int64_t begin = 0; begin < x.n; begin += CHUNK) {
    const int64_t end = smaller(begin + CHUNK, x.n);
    R a = 0, b = 0, c = 0;
    SIMD(reduction(+ : a, b, c) reduction(max : s_reference))
    for (int64_t j = begin; j < end; ++j) {
      R z_s = s[j] - s_top;
      R of_s = exponential(z_s * per_temperature), of_t = exponential((t[j] - t_top) * per_temperature);
      es[j] = of_s;
      et[j] = of_t;
      a += of_s;
      b += of_t;
      // By a part of z, so that no sum of finite logits overflows; what it underflows is nothing beside log(s_total).
      if (Careful) c += of_t == R(0) || z_s == -Real<R>::inf ? R(0) : of_t * (z_s * R(0x1p-30));
      else c += of_t * z_s;
      if (Own) {
        R at_top = t[j] == t_top ? s[j] : -Real<R>::inf;
        s_reference = at_top > s_reference ? at_top : s_reference;
      }
    }
    s_total += double(a);
    t_total += double(b);
    z_student += double(c);
  }
  x.s_total = s_total;
  x.t_total = t_total;
  x.z_student = Careful ? z_student * 0x1p30 : z_student;
  if (!Own) return;
  x.w_total = t_total;
  x.s_reference = s_reference;
}

// The reference where a prior or a power of the teacher's softmax weighs the classes.
template <class R> void find_reference(Line<R> &x, R largest_weight) {
  const R *s = x.s, *t = x.t, *w = x.w;
  R s_reference = -Real<R>::inf, t_reference = -Real<R>::inf;
  SIMD(reduction(max : s_reference, t_reference))
  for (int64_t j = 0; j < x.n; ++j) {
    R s_here = w[j] == largest_weight ? s[j] : -Real<R>::inf, t_here = w[j] == largest_weight ? t[j] : -Real<R>::inf;
    s_reference = s_here > s_reference ? s_here : s_reference;
    t_reference = t_here > t_reference ? t_here : t_reference;
  }
  x.s_reference = s_reference;
  x.t_reference = t_reference;
}

struct Sums {
  double moment, squares;  // of w and the deviations of d from its mean
  double gap;              // of q - p
  double kl;
};

template <class R, bool Careful, bool Spread, bool Gap, bool Kl> Sums sums(const Line<R> &x) {
  const R *s = x.s, *t = x.t, *es = x.es, *et = x.et, *w = x.w;
  const R mean = x.mean, of_s = R(1 / x.s_total), of_t = R(1 / x.t_total);
  const Difference<R> reference = difference_at<R, Careful>(x.t_reference, x.s_reference);
  const R scale = R(difference_scale<Careful>) * x.per_temperature;
  const Difference<R> top = difference_at<R, Careful>(x.t_top, x.s_top);
  const R normalizers = Kl ? R(std::log(x.t_total) - std::log(x.s_total)) : R(0);
  Sums found = {0, 0, 0, 0};
  for (int64_t begin = 0; begin < x.n; begin += CHUNK) {
    const int64_t end = smaller(begin + CHUNK, x.n);
    R a = 0, b = 0, g = 0, k = 0;
    SIMD(reduction(+ : a, b, g, k))
    for (int64_t j = begin; j < end; ++j) {
      const Difference<R> d = difference_at<R, Careful>(t[j], s[j]);
      const bool infinite = Careful && is_infinite(d.high);
      if (Spread) {
        R deviation = ((d.high - reference.high) + (d.low - reference.low)) - mean;
        if (Careful) deviation = infinite ? R(0) : deviation;
        R weighted = w[j] * deviation;
        a += weighted;
        b += weighted * deviation;
      }
      if (Gap || Kl) {
        R p = et[j] * of_t, q = es[j] * of_s;
        if (Gap) g += q - p;
        if (Kl) {
          R part = divergence(p, q, ((d.high - top.high) + (d.low - top.low)) * scale - normalizers);
          if (Careful) part = infinite || p == R(0) ? q : part;
          k += part;
        }
      }
    }
    found.moment += double(a);
    found.squares += double(b);
    found.gap += double(g);
    found.kl += double(k);
  }
  return found;
}

// What the gradients of one row are multiplied by.
template <class R> struct Rates {
  R difference;  // of w (d - its mean)
  R gap;         // of q - p
};

enum Student { NOT, GAP, GAP_AND_DIFFERENCE };

template <class R, bool Careful, Student To, bool Teacher>
void gradients(const Line<R> &x, Rates<R> rates, R gap_sum, R *to_s, R *to_t) {
  const R *s = x.s, *t = x.t, *es = x.es, *et = x.et, *w = x.w;
  const R mean = x.mean, of_s = R(1 / x.s_total), of_t = R(1 / x.t_total);
  const Difference<R> reference = difference_at<R, Careful>(x.t_reference, x.s_reference);
  SIMD()
  for (int64_t j = 0; j < x.n; ++j) {
    R of_difference = 0, of_gap = 0;
    if (To == GAP_AND_DIFFERENCE || Teacher) {
      Difference<R> d = difference_at<R, Careful>(t[j], s[j]);
      R c = ((d.high - reference.high) + (d.low - reference.low)) - mean;
      if (Careful) c = is_infinite(d.high) ? R(0) : c;
      of_difference = rates.difference * (w[j] * c);
    }
    if (To != NOT) {
      R p = et[j] * of_t, q = es[j] * of_s;
      of_gap = rates.gap * ((q - p) - p * gap_sum);
    }
    if (To == GAP) to_s[j] = of_gap;
    if (To == GAP_AND_DIFFERENCE) to_s[j] = of_gap - of_difference;
    if (Teacher) to_t[j] = of_difference;
  }
}

// --- class weights ---------------------------------------------------------------------------------------------------

template <class R> struct Weighing {
  const R *w;
  double total;       // the sum of w
  double mass, base;  // as in Row
  R largest;          // w
};

// exp(gamma z / tau), 1 where gamma is 0 though the logit be -inf.
template <class R> Weighing<R> teacher_power(const R *t, R t_top, int64_t n, R gamma, R per_tau, R *w) {
  constexpr R lowest = -Real<R>::largest / 2;
  double mass = 0, normalizer = 0;
  for (int64_t begin = 0; begin < n; begin += CHUNK) {
    const int64_t end = smaller(begin + CHUNK, n);
    R a = 0, b = 0;
    SIMD(reduction(+ : a, b))
    for (int64_t j = begin; j < end; ++j) {
      R z = (t[j] - t_top) * per_tau;
      z = z < lowest ? lowest : z;
      b += exponential(z);
      w[j] = exponential(gamma * z);
      a += w[j];
    }
    mass += double(a);
    normalizer += double(b);
  }
  return {w, mass, mass, 1 / normalizer, R(1)};
}

// Whether sums of numbers up to this neither overflow nor lose digits.
bool is_ordinary(double base) { return base > 1e-18 && base < 1e18; }

// (x / base)^gamma with base the largest x: x itself, where gamma is 1 and no scale is in the way.
template <class R> Weighing<R> prior_power(const R *x, int64_t n, R gamma, R *w) {
  using Word = typename Real<R>::Word;
  R base = 0;
  Word wrong = 0;
  SIMD(reduction(max : base) reduction(| : wrong))
  for (int64_t j = 0; j < n; ++j) {
    base = x[j] > base ? x[j] : base;
    wrong |= x[j] >= R(0) ? Word(0) : Word(1);
  }
  const bool as_they_are = gamma == R(1) && is_ordinary(double(base));
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += CHUNK) {
    const int64_t end = smaller(begin + CHUNK, n);
    R a = 0;
    if (as_they_are) {
      SIMD(reduction(+ : a))
      for (int64_t j = begin; j < end; ++j) a += x[j];
    } else if (gamma == R(0) || base == R(0)) {
      for (int64_t j = begin; j < end; ++j) w[j] = gamma == R(0) ? R(1) : R(0);
      a = gamma == R(0) ? R(end - begin) : R(0);
    } else if (gamma == R(1)) {
      SIMD(reduction(+ : a))
      for (int64_t j = begin; j < end; ++j) a += w[j] = x[j] / base;
    } else {
      SIMD(reduction(+ : a))
      for (int64_t j = begin; j < end; ++j) a += w[j] = power(x[j] / base, gamma);
    }
    total += double(a);
  }
  double mass = wrong ? double(nan_of<R>()) : as_they_are ? total / double(base) : total;
  return {as_they_are ? x : w, total, mass, double(base), as_they_are ? base : R(1)};
}

// --- one row ---------------------------------------------------------------------------------------------------------

template <class R> struct Scratch {
  R *s, *t, *es, *et, *w, *raw, *to_s, *to_t;
  uint8_t *valid;

  static constexpr int arrays = 8;

  static int64_t stride(int64_t classes) { return (classes + 15) / 16 * 16; }

  static size_t bytes(int64_t classes) { return size_t(stride(classes)) * (arrays * sizeof(R) + 1); }

  Scratch(void *memory, int64_t classes) {
    R *at = (R *)memory;
    for (R **line : {&s, &t, &es, &et, &w, &raw, &to_s, &to_t}) {
      *line = at;
      at += stride(classes);
    }
    valid = (uint8_t *)at;
  }
};

template <class R> const R *compacted(const R *x, const uint8_t *valid, int64_t n, R *to) {
  int64_t m = 0;
  for (int64_t j = 0; j < n; ++j) {
    R kept = x[j];  // `x` may be `to`
    to[m] = kept;
    m += valid[j];
  }
  return to;
}

// Marks the valid classes and returns their number.
template <class R> int64_t mark_valid(const gklx_call &c, int64_t row, const R *s, const R *t, uint8_t *valid) {
  const uint8_t *where = c.where ? c.where + row * c.where_row_stride : nullptr;
  int64_t found = 0;
  for (int64_t j = 0; j < c.classes; ++j) {
    bool in = !(s[j] == -Real<R>::inf && t[j] == -Real<R>::inf) && (!where || where[j * c.where_class_stride]);
    valid[j] = in;
    found += in;
  }
  return found;
}

// What a row that is not moderate holds.
struct Exceptions {
  bool student_nan, teacher_nan;
  bool student_rules_out;  // -inf, alone
};

template <class R> Exceptions exceptions_of(const R *s, const R *t, int64_t n) {
  Exceptions found = {false, false, false};
  for (int64_t j = 0; j < n; ++j) {
    found.student_nan |= is_nan(s[j]);
    found.teacher_nan |= is_nan(t[j]);
    found.student_rules_out |= s[j] == -Real<R>::inf;
  }
  return found;
}

template <class R> struct Rower {
  const Pass &pass;
  const gklx_call &call;
  Scratch<R> scratch;
  const R temperature, gamma;

  Rower(const Pass &pass, void *memory)
      : pass(pass), call(*pass.call), scratch(memory, pass.call->classes), temperature(R(call.temperature)),
        gamma(R(call.gamma)) {}

  bool student_has_difference() const { return call.decomposed && call.symmetric && call.mse_weight != 0; }
  bool teacher_has_difference() const { return !call.decomposed || call.mse_weight != 0; }
  bool has_gap() const { return !call.decomposed || call.ce_weight != 0; }
  bool spread() const {
    return pass.mse || (pass.to_teacher && teacher_has_difference()) || (pass.to_student && student_has_difference());
  }

  void set(void *array, int64_t row, double x) const {
    if (array) ((R *)array)[row] = R(x);
  }

  // Of a row without softmaxes: NaN, but 0 in a class without weight and where a factor is 0.
  void undefined_gradients(int64_t row, const uint8_t *valid, int64_t n, const R *w, const Row &found) {
    if (!pass.to_student && !pass.to_teacher) return;
    const R nan = nan_of<R>();
    const Rates<R> rates = rates_of(row, found, 1);
    const R gap = rates.gap == 0 ? R(0) : nan;
    for (int64_t j = 0; j < n; ++j) {
      const bool none = rates.difference == 0 || (w && w[j] == 0 && !is_nan(found.mass));
      const R difference = none ? R(0) : nan;
      scratch.to_s[j] = student_has_difference() ? gap - difference : gap;
      scratch.to_t[j] = difference;
    }
    if (pass.to_student) give(scratch.to_s, call.to_student, call.student_type, row, valid);
    if (pass.to_teacher) give(scratch.to_t, call.to_teacher, call.teacher_type, row, valid);
  }

  void report(int64_t row, const Row &found, bool valid, bool undefined, double s_total, double t_total) const {
    pass.rows[row] = found;
    double w = found.mass == 0 ? 0 : found.mass * power_of_base(found.base);
    double mse = found.loss_mse == 0 ? 0 : w * w * found.loss_mse;
    set(call.kl, row, found.loss_kl);
    set(call.mse, row, mse);
    set(call.ce, row, found.loss_ce);
    set(call.mass, row, w);
    set(call.student_peak, row, 1 / s_total);
    set(call.teacher_peak, row, 1 / t_total);
    if (call.has_valid) call.has_valid[row] = valid;
    if (call.undefined) call.undefined[row] = undefined;
  }

  double power_of_base(double base) const {
    return gamma == 1 ? base : gamma == 0 ? 1 : std::pow(base, double(gamma));
  }

  void run(int64_t row) {
    const int64_t classes = call.classes;
    double weight = call.sample_weight ? double(((const R *)call.sample_weight)[row]) : 1;
    if (weight == 0) return absent(row);
    if (weight < 0) weight = double(nan_of<R>());
    Line<R> x;
    x.n = classes;
    x.s = widened(call.student, call.student_type, row, classes, scratch.s);
    x.t = widened(call.teacher, call.teacher_type, row, classes, scratch.t);
    Inspected<R> seen = inspect(x.s, x.t, classes);
    const uint8_t *valid = nullptr;
    if (call.where || !seen.moderate) {
      x.n = mark_valid(call, row, x.s, x.t, scratch.valid);
      if (x.n == 0) return absent(row);
      if (x.n < classes) {
        valid = scratch.valid;
        x.s = compacted(x.s, valid, classes, scratch.s);
        x.t = compacted(x.t, valid, classes, scratch.t);
        seen = inspect(x.s, x.t, x.n);
      }
    }
    x.s_top = seen.s_top;
    x.t_top = seen.t_top;
    x.per_temperature = R(1) / temperature;
    if (seen.moderate) return finish<false>(row, weight, valid, x, {false, false, false});
    finish<true>(row, weight, valid, x, exceptions_of(x.s, x.t, x.n));
  }

  void absent(int64_t row) {
    report(row, {0, 0, 0, 0, 0, 0}, false, false, 1, 1);
    zero(row);
  }

  void zero(int64_t row) const {
    for (int side = 0; side < 2; ++side) {
      if (!(side ? pass.to_teacher : pass.to_student)) continue;
      int64_t size = call.classes * bytes_of(side ? call.teacher_type : call.student_type);
      std::memset((char *)(side ? call.to_teacher : call.to_student) + row * size, 0, size_t(size));
    }
  }

  template <bool Careful>
  void finish(int64_t row, double weight, const uint8_t *valid, Line<R> &x, Exceptions exceptions) {
    const bool student_defined = !exceptions.student_nan && !is_infinite(x.s_top);
    const bool teacher_defined = !exceptions.teacher_nan && !is_infinite(x.t_top);
    const double nan = double(nan_of<R>());
    Row found = {weight, 1, 1, 0, 0, 0};
    Weighing<R> weighing = weights_of(row, valid, x, teacher_defined);
    found.mass = weighing.mass;
    found.base = weighing.base;
    if (!student_defined || !teacher_defined) {
      found.loss_kl = found.loss_mse = found.loss_ce = nan;
      report(row, found, true, true, nan, nan);
      if (!weighing.w && teacher_defined) weighing = teacher_power(x.t, x.t_top, x.n, R(1), x.per_temperature, scratch.w);
      return undefined_gradients(row, valid, x.n, weighing.w, found);
    }
    const bool to_s_in_place = pass.to_student && !valid && call.student_type == type_of<R>;
    const bool to_t_in_place = pass.to_teacher && !valid && call.teacher_type == type_of<R>;
    R *to_s = to_s_in_place ? (R *)call.to_student + row * call.classes : scratch.to_s;
    R *to_t = to_t_in_place ? (R *)call.to_teacher + row * call.classes : scratch.to_t;
    x.es = pass.to_student ? to_s : scratch.es;  // the gradients take the place of what they are made of
    x.et = pass.to_teacher ? to_t : scratch.et;
    x.w = weighing.w;
    x.w_total = weighing.total;
    x.mean = 0;
    x.s_reference = x.s_top;
    x.t_reference = x.t_top;
    x.s_total = x.t_total = 1;
    const bool own = !x.w, spread = this->spread();
    if (own && spread) exponentials<R, Careful, true>(x);
    else if (needs_softmax()) exponentials<R, Careful, false>(x);
    if (own) x.w = x.et;
    else if (spread && x.w_total > 0) find_reference(x, weighing.largest);
    if (Careful && is_infinite(x.t_reference - x.s_reference)) {  // so is the mean of d, which is not summed then
      x.s_reference = x.s_top;
      x.t_reference = x.t_top;
    }
    const Sums of_row = sums_of<Careful>(x, spread);
    const int infinite = Careful && spread ? infinite_differences(x) : 0;

    if (pass.kl) found.loss_kl = exceptions.student_rules_out ? double(Real<R>::inf) : of_row.kl;
    if (pass.ce) {
      double mean = x.z_student / x.t_total * double(x.per_temperature);
      found.loss_ce = exceptions.student_rules_out ? double(Real<R>::inf) : std::log(x.s_total) - mean;
    }
    if (pass.mse) {
      constexpr double scale = difference_scale<Careful> * difference_scale<Careful>;
      found.loss_mse = x.w_total == 0 ? 0 : 0.5 * scale * of_row.squares / x.w_total;
      if (call.tempered) found.loss_mse /= double(temperature) * double(temperature);
      if (infinite) found.loss_mse = double(Real<R>::inf);
      if (is_nan(found.mass)) found.loss_mse = nan;
    }
    report(row, found, true, false, x.s_total, x.t_total);
    if (!pass.to_student && !pass.to_teacher) return;
    const Rates<R> rates = rates_of(row, found, difference_scale<Careful> / (x.w_total == 0 ? 1 : x.w_total));
    R gap_sum = R(of_row.gap);
    const bool difference_to_s = pass.to_student && student_has_difference();
    const bool difference_to_t = pass.to_teacher && teacher_has_difference();
    if ((infinite && rates.difference != 0) || is_infinite(rates.difference)) {
      unbounded_gradients<Careful>(x, infinite, rates, gap_sum, difference_to_s, difference_to_t, to_s, to_t);
    } else if (difference_to_s) {
      if (difference_to_t) gradients<R, Careful, GAP_AND_DIFFERENCE, true>(x, rates, gap_sum, to_s, to_t);
      else gradients<R, Careful, GAP_AND_DIFFERENCE, false>(x, rates, gap_sum, to_s, to_t);
    } else if (pass.to_student) {
      if (difference_to_t) gradients<R, Careful, GAP, true>(x, rates, gap_sum, to_s, to_t);
      else gradients<R, Careful, GAP, false>(x, rates, gap_sum, to_s, to_t);
    } else if (difference_to_t) {
      gradients<R, Careful, NOT, true>(x, rates, gap_sum, to_s, to_t);
    }
    if (pass.to_teacher && !difference_to_t) {
      for (int64_t j = 0; j < x.n; ++j) to_t[j] = 0;
    }
    if (pass.to_student) give(to_s, call.to_student, call.student_type, row, valid);
    if (pass.to_teacher) give(to_t, call.to_teacher, call.teacher_type, row, valid);
  }

  bool needs_softmax() const {
    return pass.kl || pass.ce || pass.to_student || pass.to_teacher || call.student_peak || call.teacher_peak;
  }

  // The gradients of a row's valid classes, to their places in the result.
  void give(R *line, void *array, int32_t type, int64_t row, const uint8_t *valid) {
    if (valid) {
      int64_t m = 0;
      for (int64_t j = 0; j < call.classes; ++j) m += valid[j];
      for (int64_t j = call.classes - 1; j >= 0; --j) line[j] = valid[j] ? line[--m] : R(0);
    }
    narrow(line, array, type, row, call.classes);
  }

  // No weights (null) are those of the teacher's probabilities, which are not made yet.
  Weighing<R> weights_of(int64_t row, const uint8_t *valid, const Line<R> &x, bool teacher_defined) {
    const double nan = double(nan_of<R>());
    if (pass.weights == PROBABILITIES) return {nullptr, 0, teacher_defined ? 1 : nan, 1, R(1)};
    if (pass.weights == TEACHER_POWER) {
      if (!teacher_defined) return {nullptr, 0, nan, 1, R(1)};
      return teacher_power(x.t, x.t_top, x.n, gamma, R(1) / R(call.weight_temperature), scratch.w);
    }
    int64_t source = row;
    if (const RaisedPrior *raised = pass.raised) {
      const int64_t at = raised->of_row[row];
      if (at < 0) return {nullptr, 0, nan, 1, R(1)};
      source = raised->source[at];
      if (!valid) {
        const bool as_it_is = !raised->weights && is_ordinary(raised->base[at]);
        const R *w = raised->weights ? (const R *)raised->weights + at * call.classes
                                     : (const R *)call.prior + source * call.classes;
        if (raised->weights || as_it_is) return {w, raised->total[at], raised->mass[at], raised->base[at], R(raised->largest[at])};
      }
    }
    const R *prior = widened(call.prior, call.prior_type, source, call.classes, scratch.raw);
    if (valid) prior = compacted(prior, valid, call.classes, scratch.raw);
    return prior_power(prior, x.n, gamma, scratch.w);
  }

  template <bool Careful> Sums sums_of(Line<R> &x, bool spread) const {
    const bool gap = pass.to_student && has_gap();
    if (!spread) {
      if (pass.kl) return gap ? sums<R, Careful, false, true, true>(x) : sums<R, Careful, false, false, true>(x);
      return gap ? sums<R, Careful, false, true, false>(x) : Sums{0, 0, 0, 0};
    }
    Sums found = pass.kl ? gap ? sums<R, Careful, true, true, true>(x) : sums<R, Careful, true, false, true>(x)
                         : gap ? sums<R, Careful, true, true, false>(x) : sums<R, Careful, true, false, false>(x);
    if (x.w_total == 0) return found;
    const double mean = found.moment / x.w_total, off = found.moment * mean;
    x.mean = R(mean);
    // The squares about the reference are too large by `off`: where that is most of them, they are summed again.
    if (pass.mse && (!(2 * off <= found.squares) || is_infinite(off))) found.squares = sums<R, Careful, true, false, false>(x).squares;
    else found.squares -= off;
    return found;
  }

  // 1: some d of weight is +inf, 2: some is -inf; their sum where both.
  int infinite_differences(const Line<R> &x) const {
    int found = 0;
    for (int64_t j = 0; j < x.n; ++j) {
      const R d = R(0.25) * x.t[j] - R(0.25) * x.s[j];
      if (is_infinite(d) && x.w[j] > 0) found |= d > 0 ? 1 : 2;
    }
    return found;
  }

  // Of a row in which differences of weight are infinite: their mean is, too, and between opposite ones there is none.
  // Or of one whose factor is beyond the largest number: what it multiplies may be 0.
  template <bool Careful>
  void unbounded_gradients(const Line<R> &x, int infinite, Rates<R> rates, R gap_sum, bool difference_to_s,
                           bool difference_to_t, R *to_s, R *to_t) const {
    constexpr R inf = Real<R>::inf;
    const R others = infinite == 1 ? -inf : infinite == 2 ? inf : nan_of<R>();
    const R of_s = R(1 / x.s_total), of_t = R(1 / x.t_total);
    const Difference<R> reference = difference_at<R, Careful>(x.t_reference, x.s_reference);
    for (int64_t j = 0; j < x.n; ++j) {
      const Difference<R> d = difference_at<R, Careful>(x.t[j], x.s[j]);
      R c = is_infinite(d.high) ? d.high : others;
      if (!infinite) c = ((d.high - reference.high) + (d.low - reference.low)) - x.mean;
      const R weighted = x.w[j] == 0 ? R(0) : infinite ? c : x.w[j] * c;
      const R of_difference = weighted == 0 ? R(0) : rates.difference * weighted;
      const R p = x.et[j] * of_t, q = x.es[j] * of_s;
      if (pass.to_student) {
        const R of_gap = rates.gap * ((q - p) - p * gap_sum);
        to_s[j] = difference_to_s ? of_gap - of_difference : of_gap;
      }
      if (difference_to_t) to_t[j] = of_difference;
    }
  }

  Rates<R> rates_of(int64_t row, const Row &found, double per_total) const {
    const Totals &totals = *pass.totals;
    double share = share_of(found.weight, call.reduction == MEAN, call.ranks, totals);
    if (call.upstream) share *= double(((const R *)call.upstream)[call.upstream_per_row ? row : 0]);
    const double per_square = 1 / (double(temperature) * double(temperature));
    if (!call.decomposed) return {R(share * per_square * per_total), R(share / double(temperature))};
    double base = found.base;
    if (call.batch_normalized) base /= totals.largest_base;
    double factor = mass_factor(found.mass, power_of_base(base), call.batch_normalized, totals) * per_total;
    if (call.tempered) factor *= per_square;
    // A factor of 0 keeps what it multiplies out, be it infinite.
    double of_difference = call.mse_weight == 0 || share == 0 ? 0 : share * call.mse_weight * factor;
    double of_gap = call.ce_weight == 0 ? 0 : share * call.ce_weight / double(temperature);
    return {R(of_difference), R(of_gap)};
  }
};

template <class R> void run_rows(const Pass &pass, int64_t begin, int64_t end, void *memory) {
  Rower<R> rower(pass, memory);
  for (int64_t row = begin; row < end; ++row) rower.run(row);
}

template <class R> void raise_rows(const Pass &pass, int64_t begin, int64_t end, void *memory) {
  const gklx_call &c = *pass.call;
  Scratch<R> scratch(memory, c.classes);
  for (int64_t at = begin; at < end; ++at) {
    const R *raw = widened(c.prior, c.prior_type, pass.raised->source[at], c.classes, scratch.raw);
    R *kept = pass.raised->weights ? (R *)pass.raised->weights + at * c.classes : scratch.w;
    Weighing<R> found = prior_power(raw, c.classes, R(c.gamma), kept);
    if (pass.raised->weights && found.w != kept) std::memcpy(kept, found.w, size_t(c.classes) * sizeof(R));
    pass.raised->base[at] = found.base;
    pass.raised->mass[at] = found.mass;
    pass.raised->total[at] = found.total;
    pass.raised->largest[at] = double(found.largest);
  }
}

bool in_double(const gklx_call &c) { return c.student_type == F64 || c.teacher_type == F64; }

size_t scratch_bytes(const gklx_call &c) {
  return in_double(c) ? Scratch<double>::bytes(c.classes) : Scratch<float>::bytes(c.classes);
}

void run(const Pass &pass, int64_t begin, int64_t end, void *memory) {
  in_double(*pass.call) ? run_rows<double>(pass, begin, end, memory) : run_rows<float>(pass, begin, end, memory);
}

void raise(const Pass &pass, int64_t begin, int64_t end, void *memory) {
  in_double(*pass.call) ? raise_rows<double>(pass, begin, end, memory) : raise_rows<float>(pass, begin, end, memory);
}

}  // namespace

#define JOINED(a, b) a##b
#define LOOPS_OF(set) JOINED(gklx_loops_, set)
#define TEXT(x) #x
#define NAME_OF(set) TEXT(set)

extern const Loops LOOPS_OF(GKLX_SET);
const Loops LOOPS_OF(GKLX_SET) = {NAME_OF(GKLX_SET), scratch_bytes, run, raise};
