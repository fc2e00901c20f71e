// The loops over the classes of a row. Included once for each instruction set, hence the anonymous namespace.
//
// A row stays in the processor's cache, so that it is cheap to go over it several times in short loops that vectorise:
// inspect it; exponentials and their sums; sums of the deviations of d from its mean; gradients. Sums run in REAL over
// CHUNK classes, in double over the chunks.

#pragma once

#include <cmath>
#include <type_traits>

#include "cpu.h"
#include "row.h"

// APART: a loop of its own, with what it calls, keeps its numbers in registers.
#if defined(_MSC_VER)
#define APART __declspec(noinline)
#define SIMD_OF(lanes, ...) __pragma(omp simd __VA_ARGS__)
#else
#define APART __attribute__((noinline, flatten))
#define SIMD_OF(lanes, ...) PRAGMA(omp simd simdlen(lanes.value) __VA_ARGS__)
#endif

namespace {

// In vectors a chunk's sum is several short ones. A compiler that makes no vectors is told of shorter chunks.
#ifndef GKLX_CHUNK
#define GKLX_CHUNK 512
#endif
constexpr int64_t CHUNK = GKLX_CHUNK;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T> T larger(T a, T b) { return a > b ? a : b; }

#if defined(__AVX512F__)
constexpr int VECTOR = 64;  // bytes
#elif defined(__AVX2__)
constexpr int VECTOR = 32;
#else
constexpr int VECTOR = 16;
#endif
template <int N> using Lanes = std::integral_constant<int, N>;

// In guarded rows logits and their differences are multiplied by this before they are added up: a sum does not overflow
// where the mean is finite. What underflows is below the rounding of the rest.
template <bool Guarded> constexpr double summed_part = Guarded ? 0x1p-30 : 1;

// `work(lanes, begin, end)` for chunks of the classes [0, n). What fills no vector of 64 bytes runs in vectors of 16:
// compilers would take it one class at a time, each as long as a whole vector.
template <class R, class Work> void in_chunks(int64_t n, Work work) {
  constexpr Lanes<VECTOR / sizeof(R)> lanes;
  const int64_t whole = VECTOR == 64 ? n - n % lanes : n;
  for (int64_t begin = 0, end; begin < whole; begin = end) work(lanes, begin, end = smaller(begin + CHUNK, whole));
  if (whole < n) work(Lanes<16 / sizeof(R)>(), whole, n);
}

// Where the same classes of the next row lie, which the processor is asked to fetch while it works on this row.
struct Ahead {
  const char *row;  // null: there is none, or rows are so long that two of them would leave the cache
  int64_t bytes;    // of a logit

  void fetch(int64_t begin, int64_t end) const {
#if defined(__GNUC__)
    if (!row) return;
    for (const char *at = row + begin * bytes; at < row + end * bytes; at += 64) __builtin_prefetch(at, 0, 2);
#else
    (void)begin, (void)end;
#endif
  }
};

// A row of valid classes. `w` are the class weights but for a factor.
//
// Differences d are taken from that of a reference, the class that weighs most: where it has nearly all weight, what d is
// rounded by is as large as the differences that matter.
template <class R> struct RowData {
  int64_t n;
  const R *s, *t, *w;
  R *es, *et;  // exp((x - top) / T)
  R s_top, t_top, s_reference, t_reference, per_temperature;
  double s_total, t_total, w_total;  // the sums of es, et, w
  R of_s, of_t;                      // 1 / s_total, 1 / t_total
  double z_student;                  // the sum of et (s - s_top), as `summed_part` of it
  R mean;                            // the weighted mean of d, less d at the reference
  Ahead student_ahead, teacher_ahead;
};

template <class R> struct Inspected {
  R s_top, t_top;
  bool bounded;  // all logits are finite, and so are a chunk's sums of squares of their differences
};

template <class R> APART Inspected<R> inspect(const R *s, const R *t, int64_t n) {
  using Word = typename Real<R>::Word;
  constexpr R limit = Real<R>::logit_bound;
  Order<R> s_top = order_of(-Real<R>::inf), t_top = s_top;
  Word beyond = 0;
  in_chunks<R>(n, [&](auto lanes, int64_t begin, int64_t end) {
    Order<R> s_max = s_top, t_max = t_top;
    Word outside = 0;
    SIMD_OF(lanes, reduction(max : s_max, t_max) reduction(| : outside))
    for (int64_t j = begin; j < end; ++j) {
      s_max = larger(order_of(s[j]), s_max);
      t_max = larger(order_of(t[j]), t_max);
      outside |= (size_of(s[j]) <= limit ? Word(0) : Word(1)) | (size_of(t[j]) <= limit ? Word(0) : Word(1));
    }
    s_top = s_max;
    t_top = t_max;
    beyond |= outside;
  });
  return {number_of<R>(s_top), number_of<R>(t_top), beyond == 0};
}

// The class of the largest logit `top`, the first of several: NumPy's argmax, to which a NaN is the largest.
template <class R> APART int64_t top_class(const R *x, int64_t n, R top, bool bounded) {
  using Word = typename Real<R>::Word;
  for (int64_t j = 0; !bounded && j < n; ++j) {
    if (is_nan(x[j])) return j;
  }
  constexpr int64_t block = 16;
  int64_t begin = 0;
  for (; n - begin > block; begin += block) {
    Word found = 0;
    SIMD(reduction(| : found))
    for (int64_t j = 0; j < block; ++j) found |= x[begin + j] == top ? Word(1) : Word(0);
    if (found) break;
  }
  int64_t first = begin;  // in a fixed number of steps: a branch on the logits would be mispredicted
  for (int64_t j = smaller(begin + block, n) - 1; j > begin; --j) first = x[j] == top ? j : first;
  return x[begin] == top ? begin : first;
}

// x in a class that weighs most, elsewhere less than any x.
template <class R> Order<R> where_heaviest(R x, R w, R largest_weight) {
  return order_of(w == largest_weight ? x : -Real<R>::inf);
}

// Fills es, et and their sums, and finds the part of CE; with weights other than the teacher's own, the reference as well.
template <class R, bool Guarded, bool Tempered, bool Weighed>
APART void exponentials(RowData<R> &x, R largest_weight = 0) {
  const R *s = x.s, *t = x.t, *w = x.w;
  Order<R> s_reference = order_of(-Real<R>::inf), t_reference = s_reference;
  R *es = x.es, *et = x.et;
  const R s_top = x.s_top, t_top = x.t_top, per_temperature = x.per_temperature;
  double s_total = 0, t_total = 0, z_student = 0;
  in_chunks<R>(x.n, [&](auto lanes, int64_t begin, int64_t end) {
    x.student_ahead.fetch(begin, end);
    x.teacher_ahead.fetch(begin, end);
    R a = 0, b = 0, c = 0;
    Order<R> s_max = s_reference, t_max = t_reference;
    SIMD_OF(lanes, reduction(+ : a, b, c) reduction(max : s_max, t_max))
    for (int64_t j = begin; j < end; ++j) {
      if (Weighed) {
        // Not by `larger`: GCC's loop is then slower, even where nothing is `Weighed`.
        Order<R> s_here = where_heaviest(s[j], w[j], largest_weight), t_here = where_heaviest(t[j], w[j], largest_weight);
        s_max = s_here > s_max ? s_here : s_max;
        t_max = t_here > t_max ? t_here : t_max;
      }
      R z_s = s[j] - s_top, z_t = t[j] - t_top;
      R of_s = exponential(Tempered ? z_s * per_temperature : z_s);
      R of_t = exponential(Tempered ? z_t * per_temperature : z_t);
      a += of_s;
      b += of_t;
      if (Guarded) {
        const R halved = R(0.5) * s[j] - R(0.5) * s_top;
        c += of_t == R(0) || s[j] == -Real<R>::inf ? R(0) : of_t * (halved * R(2 * summed_part<Guarded>));
      } else {
        c += of_t * z_s;
      }
      es[j] = of_s;  // after all reads, which Clang takes for aliases of it
      et[j] = of_t;
    }
    s_total += double(a);
    t_total += double(b);
    z_student += double(c);
    s_reference = s_max;
    t_reference = t_max;
  });
  x.s_total = s_total;
  x.t_total = t_total;
  x.of_s = R(1 / s_total);
  x.of_t = R(1 / t_total);
  x.z_student = z_student;
  if (Weighed && x.w_total > 0) {
    x.s_reference = number_of<R>(s_reference);
    x.t_reference = number_of<R>(t_reference);
  }
}

// The reference alone, where no softmax is asked for.
template <class R> APART void find_reference(RowData<R> &x, R largest_weight) {
  const R *s = x.s, *t = x.t, *w = x.w;
  Order<R> s_reference = order_of(-Real<R>::inf), t_reference = s_reference;
  SIMD(reduction(max : s_reference, t_reference))
  for (int64_t j = 0; j < x.n; ++j) {
    s_reference = larger(where_heaviest(s[j], w[j], largest_weight), s_reference);
    t_reference = larger(where_heaviest(t[j], w[j], largest_weight), t_reference);
  }
  x.s_reference = number_of<R>(s_reference);
  x.t_reference = number_of<R>(t_reference);
}

struct Sums {
  double moment, squares;  // of w and the deviations of d from its mean, as `summed_part` of them
  double gap;              // of q - p
  double kl, reverse_kl;
};

// The type in which products of weights and differences are summed: in guarded rows a float may overflow.
template <class R, bool Guarded> struct Widest { using Type = R; };
template <> struct Widest<float, true> { using Type = double; };

template <class R, bool Guarded, bool Spread, bool Gap, bool Kl, bool Reverse = false>
APART Sums sums(const RowData<R> &x) {
  const R *s = x.s, *t = x.t, *es = x.es, *et = x.et, *w = x.w;
  const R mean = Gap || Kl ? R(0) : x.mean;  // which is known when nothing else is asked for anymore
  const R of_s = x.of_s, of_t = x.of_t;
  using Product = typename Widest<R, Guarded>::Type;
  const Difference<R> reference = difference_at<R, Guarded>(x.t_reference, x.s_reference);
  // In two factors: of the smallest temperature, four times the inverse is infinite.
  const R doubled = R(Guarded ? 2 : 1) * x.per_temperature, half_scale = R(difference_scale<Guarded> / (Guarded ? 2 : 1));
  const Difference<R> top = difference_at<R, Guarded>(x.t_top, x.s_top);
  const R normalizers = Kl ? R(std::log(x.t_total) - std::log(x.s_total)) : R(0);
  Sums found = {};
  in_chunks<R>(x.n, [&](auto lanes, int64_t begin, int64_t end) {
    Product a = 0, b = 0;
    R g = 0, k = 0, r = 0;
    SIMD_OF(lanes, reduction(+ : a, b, g, k, r))
    for (int64_t j = begin; j < end; ++j) {
      const Difference<R> d = difference_at<R, Guarded>(t[j], s[j]);
      const bool infinite = Guarded && is_infinite(d.high);
      if (Spread) {
        R deviation = ((d.high - reference.high) + (d.low - reference.low)) - mean;
        if (Guarded) deviation = infinite ? R(0) : deviation;
        Product weighted = Product(w[j]) * (Product(deviation) * Product(summed_part<Guarded>));
        a += weighted;
        b += weighted * Product(deviation);
      }
      if (Gap || Kl) {
        R p = et[j] * of_t, q = es[j] * of_s;
        if (Gap) g += q - p;
        if (Kl) {
          const R apart = ((d.high - top.high) + (d.low - top.low)) * half_scale;
          const R ratio = apart * doubled - normalizers;
          R part = divergence(p, q, ratio);
          // Where log p - log q is too large for R, p times it need not be.
          if (Guarded) part = infinite || p == R(0) ? q : is_infinite(ratio) ? (p * apart) * doubled : part;
          k += part;
          if (Reverse) {
            part = reverse_divergence(p, q, ratio);
            if (Guarded) part = infinite || q == R(0) ? p : is_infinite(ratio) ? -(q * apart) * doubled : part;
            r += part;
          }
        }
      }
    }
    found.moment += double(a);
    found.squares += double(b);
    found.gap += double(g);
    found.kl += double(k);
    found.reverse_kl += double(r);
  });
  return found;
}

// What the gradients of one row are multiplied by.
template <class R> struct GradientScales {
  R difference;  // of w (d - its mean)
  R gap;         // of q - p
};

enum Student { NOT, GAP, GAP_AND_DIFFERENCE };

template <class R, bool Guarded, Student To, bool Teacher>
APART void gradients(const RowData<R> &x, GradientScales<R> scales, R gap_sum, R *to_s, R *to_t) {
  const R *s = x.s, *t = x.t, *es = x.es, *et = x.et, *w = x.w;
  const R mean = x.mean, of_s = x.of_s, of_t = x.of_t;
  const Difference<R> reference = difference_at<R, Guarded>(x.t_reference, x.s_reference);
  in_chunks<R>(x.n, [&](auto lanes, int64_t begin, int64_t end) {
    SIMD_OF(lanes)
    for (int64_t j = begin; j < end; ++j) {
      R of_difference = 0, of_gap = 0;
      if (To == GAP_AND_DIFFERENCE || Teacher) {
        Difference<R> d = difference_at<R, Guarded>(t[j], s[j]);
        R c = ((d.high - reference.high) + (d.low - reference.low)) - mean;
        if (Guarded) c = is_infinite(d.high) ? R(0) : c;
        of_difference = scales.difference * (w[j] * c);
      }
      if (To != NOT) {
        R p = et[j] * of_t, q = es[j] * of_s;
        of_gap = scales.gap * ((q - p) - p * gap_sum);
      }
      if (To == GAP) to_s[j] = of_gap;
      if (To == GAP_AND_DIFFERENCE) to_s[j] = of_gap - of_difference;
      if (Teacher) to_t[j] = of_difference;
    }
  });
}

// --- class weights ---------------------------------------------------------------------------------------------------

template <class R> struct Weighing {
  const R *w;
  double total;       // the sum of w
  double mass, base;  // as in Row
  R largest;          // w
};

// exp(gamma z / tau), 1 where gamma is 0 though the logit be -inf. W's base is left out unless `Normalizer`.
template <class R, bool Normalizer>
APART Weighing<R> teacher_power(const R *t, R t_top, int64_t n, R gamma, R per_tau, R *w) {
  constexpr R lowest = -Real<R>::largest / 2;
  double mass = 0, normalizer = 0;
  in_chunks<R>(n, [&](auto lanes, int64_t begin, int64_t end) {
    R a = 0, b = 0;
    SIMD_OF(lanes, reduction(+ : a, b))
    for (int64_t j = begin; j < end; ++j) {
      R z = (t[j] - t_top) * per_tau;
      z = z < lowest ? lowest : z;
      if (Normalizer) b += exponential(z);
      w[j] = exponential(gamma * z);
      a += w[j];
    }
    mass += double(a);
    normalizer += double(b);
  });
  return {w, mass, mass, Normalizer ? 1 / normalizer : 1, R(1)};
}

// Whether a row of weights with this largest one can be used as it is: as large as it would be after division by a power
// of two, so that products with differences neither overflow nor lose digits below the normal numbers. A number and the
// power of two below it, which is all that a powered prior keeps of it, give the same answer.
bool usable_unscaled(double largest) { return largest >= 0.5 && largest < 2; }

template <class R> struct PriorSeen {
  R largest;
  bool wrong;  // an entry is negative or NaN
};

template <class R> APART PriorSeen<R> inspect_prior(const R *x, int64_t n) {
  using Word = typename Real<R>::Word;
  Order<R> largest = order_of(R(0));
  Word wrong = 0;
  in_chunks<R>(n, [&](auto lanes, int64_t begin, int64_t end) {
    Order<R> max = largest;
    Word invalid = 0;
    SIMD_OF(lanes, reduction(max : max) reduction(| : invalid))
    for (int64_t j = begin; j < end; ++j) {
      max = larger(order_of(x[j]), max);
      invalid |= x[j] >= R(0) ? Word(0) : Word(1);
    }
    largest = max;
    wrong |= invalid;
  });
  return {number_of<R>(largest), wrong != 0};
}

// (x / base)^gamma. The base is the largest x, or where gamma is 0 or 1 a power of two near it. Where gamma is 1 and the
// largest x is near 1, the weights are x itself, and need not be written.
template <class R> APART Weighing<R> prior_power(const R *x, int64_t n, R gamma, R *w) {
  const PriorSeen<R> seen = inspect_prior(x, n);
  const bool as_they_are = gamma == R(1) && usable_unscaled(double(seen.largest));
  const R scale = as_they_are ? seen.largest : power_of_two_below(seen.largest), per_scale = R(1) / scale;
  const bool raises = gamma != R(0) && gamma != R(1) && seen.largest > R(0);
  const R log_base = raises ? logarithm(seen.largest * per_scale) : R(0), base = raises ? seen.largest : scale;
  double total = 0;
  R largest = as_they_are ? base : R(0);
  in_chunks<R>(n, [&](auto lanes, int64_t begin, int64_t end) {
    R a = 0;
    if (as_they_are) {
      SIMD_OF(lanes, reduction(+ : a))
      for (int64_t j = begin; j < end; ++j) a += x[j];
    } else if (gamma == R(0)) {
      for (int64_t j = begin; j < end; ++j) w[j] = R(1);
      a = R(end - begin);
      largest = R(1);
    } else if (gamma == R(1)) {
      SIMD_OF(lanes, reduction(+ : a))
      for (int64_t j = begin; j < end; ++j) {
        w[j] = x[j] * per_scale;
        a += w[j];
      }
      largest = seen.largest * per_scale;
    } else {
      // Two short loops: in one, each exponential would have to wait for its logarithm.
      SIMD_OF(lanes)
      for (int64_t j = begin; j < end; ++j) w[j] = log_power(x[j] * per_scale, gamma, log_base);
      Order<R> max = order_of(largest);
      SIMD_OF(lanes, reduction(+ : a) reduction(max : max))
      for (int64_t j = begin; j < end; ++j) {
        R here = exponential(w[j]);
        w[j] = here;
        a += here;
        max = larger(order_of(here), max);
      }
      largest = number_of<R>(max);
    }
    total += double(a);
  });
  double mass = seen.wrong ? double(nan_of<R>()) : as_they_are ? total / double(base) : total;
  return {as_they_are ? x : w, total, mass, double(base), largest};
}

}  // namespace
