// Rows of arrays of any type, as REAL, and back. Included once for each instruction set, hence the anonymous namespace.

#pragma once

#include "cpu.h"
#include "row.h"

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

int64_t bytes_of(int32_t type) { return type == F64 ? 8 : type == F32 ? 4 : 2; }

template <class R> constexpr int32_t type_of = sizeof(R) == 8 ? F64 : F32;

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

}  // namespace
