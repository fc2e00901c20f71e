// What happens to one class and to one row. Free functions of numbers, without loops over classes and without memory of
// their own, so that every processor's loops can use them.
//
// s, t are the logits of student and teacher, T the temperature, p = softmax(t/T), q = softmax(s/T), w the class weights,
// W their sum over the classes, u = w/W, d = t - s.

#pragma once

#if defined(__CUDACC_RTC__)  // NVIDIA's compiler at run time, which has no standard headers
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef long long int64_t;
namespace std { using ::memcpy; using ::pow; }
#define GKLX_BOTH __device__ __forceinline__
#define GKLX_INFINITY __builtin_bit_cast(double, 0x7ff0000000000000ull)
#else
#include <cmath>
#include <cstdint>
#include <cstring>
#define GKLX_INFINITY __builtin_huge_val()
#if defined(_MSC_VER)
#define GKLX_BOTH static __forceinline
#else
#define GKLX_BOTH static inline __attribute__((always_inline))
#endif
#endif

// --- numbers ---------------------------------------------------------------------------------------------------------

template <class R> struct Real;

template <> struct Real<float> {
  using Word = uint32_t;
  using Signed = int;
  static constexpr float inf = float(GKLX_INFINITY), largest = 3.402823466e38f;
  static constexpr float smallest_normal = 1.17549435e-38f, two_to_fraction = 8388608.0f;
  static constexpr float logit_bound = 0x1p56f;  // sums of 2^11 squares of four times as much are finite
  static constexpr int fraction = 23, bias = 127;
  // Adding it rounds to an integer, which then stands in the low bits.
  static constexpr float rounder = 12582912.0f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;  // their sum is ln 2; the first is short
  static constexpr float exponential_is_0 = -87.33654f;
};

template <> struct Real<double> {
  using Word = uint64_t;
  using Signed = int64_t;
  static constexpr double inf = GKLX_INFINITY, largest = 1.7976931348623157e308;
  static constexpr double smallest_normal = 2.2250738585072014e-308, two_to_fraction = 4503599627370496.0;
  static constexpr double logit_bound = 0x1p504;
  static constexpr int fraction = 52, bias = 1023;
  static constexpr double rounder = 6755399441055744.0;
  static constexpr double ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
  static constexpr double exponential_is_0 = -708.396418532264;
};

GKLX_BOTH uint32_t bits_of(float x) { uint32_t i; std::memcpy(&i, &x, sizeof i); return i; }
GKLX_BOTH uint64_t bits_of(double x) { uint64_t i; std::memcpy(&i, &x, sizeof i); return i; }
GKLX_BOTH float real_of(uint32_t i) { float x; std::memcpy(&x, &i, sizeof x); return x; }
GKLX_BOTH double real_of(uint64_t i) { double x; std::memcpy(&x, &i, sizeof x); return x; }
GKLX_BOTH float size_of(float x) { return real_of(uint32_t(bits_of(x) & 0x7fffffffu)); }
GKLX_BOTH double size_of(double x) { return real_of(uint64_t(bits_of(x) & 0x7fffffffffffffffull)); }

template <class R> GKLX_BOTH bool is_nan(R x) { return x != x; }
template <class R> GKLX_BOTH bool is_infinite(R x) { return size_of(x) == Real<R>::inf; }
template <class R> GKLX_BOTH R nan_of() { return Real<R>::inf - Real<R>::inf; }

// The nearest number of which neither it nor its inverse is below the normal numbers, which a processor may take for 0.
template <class R> GKLX_BOTH R invertible(R x) {
  constexpr R smallest = Real<R>::smallest_normal;
  return x < smallest ? smallest : x > 1 / smallest ? 1 / smallest : x;
}

// The largest power of two that is not above x, as far as it and its inverse are normal.
template <class R> GKLX_BOTH R power_of_two_below(R x) {
  return real_of(typename Real<R>::Word(bits_of(invertible(x)) >> Real<R>::fraction << Real<R>::fraction));
}

// The key by which numbers are compared to find the largest. Clang does not vectorise a floating-point maximum, because of
// NaN, but that of integers: its key is the number's bits as an integer in the same order, in which a NaN may be the largest.
#if defined(__clang__)
template <class R> using Order = typename Real<R>::Signed;
// Reverses the order of the negative integers; its own inverse.
template <class Signed> GKLX_BOTH Signed reorder(Signed bits) {
  constexpr int size = 8 * sizeof(Signed);
  return bits ^ ((bits >> (size - 1)) & ~(Signed(1) << (size - 1)));
}
template <class R> GKLX_BOTH Order<R> order_of(R x) { return reorder(Order<R>(bits_of(x))); }
template <class R> GKLX_BOTH R number_of(Order<R> order) { return real_of(typename Real<R>::Word(reorder(order))); }
#else
template <class R> using Order = R;
template <class R> GKLX_BOTH R order_of(R x) { return x; }
template <class R> GKLX_BOTH R number_of(R x) { return x; }
#endif

// --- half precisions -------------------------------------------------------------------------------------------------

// Bits of float16 and bfloat16 to a float and back, rounded to even.
GKLX_BOTH float float_of_half(uint16_t half) {
  uint32_t sign = uint32_t(half & 0x8000u) << 16, size = half & 0x7fffu;
  float normal = real_of(uint32_t((size << 13) + (112u << 23)));
  float subnormal = float(size) * real_of(uint32_t(103u << 23));  // 2^-24
  float unbounded = real_of(uint32_t((size << 13) | 0x7f800000u));
  float x = size >= 0x7c00u ? unbounded : size < 0x400u ? subnormal : normal;
  return real_of(bits_of(x) | sign);
}

GKLX_BOTH uint16_t half_of_float(float x) {
  uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
  uint32_t normal = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
  uint32_t subnormal = bits_of(real_of(size) + 0.5f) - 0x3f000000u;  // the sum rounds to a multiple of 2^-24
  uint32_t half = size > 0x7f800000u ? 0x7e00u : size >= 0x477ff000u ? 0x7c00u : size < 0x38800000u ? subnormal : normal;
  return uint16_t(half | sign);
}

GKLX_BOTH uint16_t brain_of_float(float x) {
  uint32_t bits = bits_of(x);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// A float such that rounding it again to fewer digits gives what rounding `x` itself gives: odd where inexact.
GKLX_BOTH float rounded_to_odd(double x) {
  float nearest = float(x);
  uint32_t bits = bits_of(nearest);
  if (double(nearest) == x || (bits & 1u)) return nearest;
  return real_of(size_of(double(nearest)) > size_of(x) ? bits - 1u : bits + 1u);
}

// --- exponential and logarithm ----------------------------------------------------------------------------------------

// Polynomials by Estrin's scheme: a processor waits less for it than for Horner's.
template <class R> GKLX_BOTH R quartic(R x, R x2, R a0, R a1, R a2, R a3) { return (a0 + a1 * x) + (a2 + a3 * x) * x2; }

// (exp(r) - 1 - r) / r^2 for |r| <= ln(2)/2. This and `divergence_tail`, for |x| <= 1, are Chebyshev fits, relative
// errors below a tenth of a unit in the last place.
GKLX_BOTH float exponential_tail(float r, float r2) {
  return quartic(r, r2, 0.5f, 0.16666573382f, 0.04166655011f, 0.00836377387f) + 0.00139269266f * (r2 * r2);
}
GKLX_BOTH double exponential_tail(double r, double r2) {
  double low = quartic(r, r2, 0.5, 1.66666666666666675e-1, 4.16666666666206386e-2, 8.3333333333297935e-3);
  double high = quartic(r, r2, 1.38888889189391678e-3, 1.98412698643805133e-4, 2.48015186413959936e-5,
                        2.75572664186123037e-6);
  double r4 = r2 * r2, highest = 2.76213386691429238e-7 + 2.51013469283503402e-8 * r;
  return low + r4 * (high + r4 * highest);
}
// (exp(-x) - 1 + x) / x^2 as its even and its odd part: their difference is that of -x.
template <class R> struct Tail {
  R even, odd;
};

GKLX_BOTH Tail<float> divergence_tail(float x) {
  float x2 = x * x, x4 = x2 * x2;
  float even = quartic(x2, x4, 0.5f, 4.16667365952e-2f, 1.38853969118e-3f, 2.53585122446e-5f);
  float odd = quartic(x2, x4, -1.66666666468e-1f, -8.33333967592e-3f, -1.98381019687e-4f, -2.80628025823e-6f);
  return {even, x * odd};
}
GKLX_BOTH Tail<double> divergence_tail(double x) {
  double x2 = x * x, x4 = x2 * x2, x8 = x4 * x4;
  double even = quartic(x2, x4, 0.5, 4.16666666666660883e-2, 1.38888888889814045e-3, 2.48015872460968169e-5) +
                x8 * ((2.75573350689337267e-7 + 2.08744355758642747e-9 * x2) + 1.16391941241505224e-11 * x4);
  double odd = quartic(x2, x4, -1.66666666666666667e-1, -8.33333333333329936e-3, -1.98412698413241979e-4,
                       -2.7557319191381817e-6) +
               x8 * ((-2.50521176959078236e-8 - 1.60576796238016377e-10 * x2) - 7.74617859301882749e-13 * x4);
  return {even, x * odd};
}

#if defined(__CUDACC_RTC__)  // a GPU has an instruction for the most of each
GKLX_BOTH float exponential(float x) { return expf(x); }
GKLX_BOTH double exponential(double x) { return exp(x); }
GKLX_BOTH float logarithm(float x) { return logf(x); }
GKLX_BOTH double logarithm(double x) { return log(x); }
#else
// exp(x) for x <= 80, 0 below the normal numbers.
template <class R> GKLX_BOTH R exponential(R x) {
  using Word = typename Real<R>::Word;
  constexpr R rounder = Real<R>::rounder + R(Real<R>::bias);  // so that n comes with the bias of an exponent
  R n = x * R(1.44269504088896340736) + rounder;
  R two_to_n = real_of(Word(bits_of(n) << Real<R>::fraction));
  n -= rounder;
  R r = x - n * Real<R>::ln2_high;
  r = r - n * Real<R>::ln2_low;
  R r2 = r * r, y = (exponential_tail(r, r2) * r2 + r) + R(1);
  return x < Real<R>::exponential_is_0 ? R(0) : y * two_to_n;
}

// log(1 + f) for 1 + f from sqrt(1/2) to sqrt(2): the fit of Cephes' logf, and 2 artanh(f / (2 + f)).
GKLX_BOTH float logarithm_near_1(float f) {
  float f2 = f * f;
  float low = quartic(f, f2, 3.3333331174e-1f, -2.4999993993e-1f, 2.0000714765e-1f, -1.6668057665e-1f);
  float high = quartic(f, f2, 1.4249322787e-1f, -1.2420140846e-1f, 1.1676998740e-1f, -1.1514610310e-1f);
  float f4 = f2 * f2;
  return f + (f2 * f * (low + f4 * (high + f4 * 7.0376836292e-2f)) - 0.5f * f2);
}
GKLX_BOTH double logarithm_near_1(double f) {
  double z = f / (2.0 + f), z2 = z * z, z4 = z2 * z2;
  double low = quartic(z2, z4, 1.0 / 3, 1.0 / 5, 1.0 / 7, 1.0 / 9);
  double high = quartic(z2, z4, 1.0 / 11, 1.0 / 13, 1.0 / 15, 1.0 / 17);
  return 2.0 * (z + z * z2 * (low + z4 * z4 * (high + z4 * z4 * (1.0 / 19))));
}

// log(x) for finite x > 0: x = 2^n (1 + f).
template <class R> GKLX_BOTH R logarithm(R x) {
  using Word = typename Real<R>::Word;
  constexpr Word one = Word(Real<R>::bias) << Real<R>::fraction;
  bool small = x < Real<R>::smallest_normal;
  x = small ? x * Real<R>::two_to_fraction : x;
  Word above_root = bits_of(x) + (one - bits_of(R(0.70710678118654752440)));  // so that m lies within sqrt(1/2), sqrt(2)
  Word n_biased = above_root >> Real<R>::fraction;
  R m = real_of(Word(bits_of(x) - (n_biased << Real<R>::fraction) + one));
  R n = real_of(Word(bits_of(Real<R>::rounder) + n_biased)) - Real<R>::rounder - R(Real<R>::bias);
  n = small ? n - R(Real<R>::fraction) : n;
  R f = m - R(1);
  return n * Real<R>::ln2_high + (logarithm_near_1(f) + n * Real<R>::ln2_low);
}
#endif

// gamma (log(x) - log(base)), whose exponential is (x / base)^gamma, for x >= 0 and gamma > 0; -inf for 0, NaN for NaN.
template <class R> GKLX_BOTH R log_power(R x, R gamma, R log_base) {
  return x > R(0) ? gamma * (logarithm(x) - log_base) : x - Real<R>::inf;
}

// --- one class -------------------------------------------------------------------------------------------------------

// d as an exact sum of two numbers: opposite offsets of the networks, or the same low fill in both, cost it no digits.
template <class R> struct Difference {
  R high, low;
};

template <class R> GKLX_BOTH Difference<R> difference(R t, R s) {
  R high = t - s, s_part = t - high;
  R low = (t - (high + s_part)) + (s_part - s);  // Knuth's two-sum
  return {high, low};
}

// `Guarded` functions take masks, infinities, NaN and logits beyond `logit_bound`, which most rows do not have. There a
// difference is a quarter of d, so that no finite logits overflow.
template <class R, bool Guarded> GKLX_BOTH Difference<R> difference_at(R t, R s) {
  return Guarded ? difference(R(0.25) * t, R(0.25) * s) : difference(t, s);
}

template <bool Guarded> constexpr double difference_scale = Guarded ? 4 : 1;

// A class's part of KL: p L + q - p with L = log p - log q. It is >= 0, and so is their sum, which is KL since p and q
// each sum to 1. Near L = 0 it is p (L + exp(-L) - 1), without the cancellation that would leave nothing of the KL of two
// close rows.
template <class R> GKLX_BOTH R divergence(R p, R q, R ratio) {
  Tail<R> tail = divergence_tail(ratio);
  R far = p * ratio + (q - p);
  R close = p * (ratio * ratio) * (tail.even + tail.odd);
  return size_of(ratio) < R(1) ? close : far;
}

// The same with p and q exchanged, and so -L for L.
template <class R> GKLX_BOTH R reverse_divergence(R p, R q, R ratio) {
  Tail<R> tail = divergence_tail(ratio);
  R far = (p - q) - q * ratio;
  R close = q * (ratio * ratio) * (tail.even - tail.odd);
  return size_of(ratio) < R(1) ? close : far;
}

// --- one row ---------------------------------------------------------------------------------------------------------

// What is known of a row that the batch needs. W = mass * base^gamma.
struct Row {
  double weight;  // of the sample; 0 where no class is valid
  double mass;    // sum of (w_j / base)^gamma; NaN where W is not a number
  double base;    // about the largest weight before the power
  double loss_kl, loss_mse, loss_ce;  // the mse is that of W = 1
  double reverse_kl;
};

// The sums that a batch shares, made of numbers between 0 and 1 so that no scale of the weights overflows.
template <class R> struct Totals {
  R largest_weight, largest_base;  // V and P: the largest sample weight, rounded down to a power of two, and the largest base
  R weight;                        // sum of v/V
  R squared_mass;                  // sum of (v/V) R^2, R = mass (base/P)^gamma
};

// base^gamma, where base may itself be relative to that of a batch.
template <class R> GKLX_BOTH R power_of_base(R base, R gamma) {
  return gamma == R(1) ? base : gamma == R(0) ? R(1) : std::pow(base, gamma);
}

// Factor * x, but 0 where the factor is 0 though x be infinite or NaN, or x is 0 though the factor overflowed.
template <class R> GKLX_BOTH R scaled(R factor, R x) {
  return factor == R(0) || (x == R(0) && is_infinite(factor)) ? R(0) : factor * x;
}

// What a row's loss is multiplied by in the batch's: its sample weight, divided by their sum for a mean (over `ranks`
// batches).
template <class R> GKLX_BOTH R reduction_weight(R weight, bool mean, R ranks, const Totals<R> &totals) {
  if (!mean) return weight;
  return totals.weight == R(0) ? R(0) : ranks * (weight / totals.largest_weight / totals.weight);
}

// What a wMSE with W = 1 is multiplied by: W^2, or R^2 over its mean over the batch. `base_power` is base^gamma, and
// (base/P)^gamma for a batch.
template <class R> GKLX_BOTH R mass_factor(R mass, R base_power, bool batch, const Totals<R> &totals) {
  R w = mass * base_power;
  if (!batch || totals.squared_mass == R(0)) return w * w;
  return w * w * (totals.weight / totals.squared_mass);
}
