// Vectors of MOPO_VECTOR_BYTES bytes (the including file says how many) and exp, expm1 and tanh on them, written with
// the vector extension that GCC and Clang share, so that one text serves every instruction set. Everything is inlined
// and sits in an unnamed namespace: objects compiled for different instruction sets share no symbol.
#pragma once

#include <cstdint>

#include "../mopo_math.h"

namespace {

template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float F __attribute__((vector_size(MOPO_VECTOR_BYTES)));
  typedef uint32_t U __attribute__((vector_size(MOPO_VECTOR_BYTES)));
  // Adding 1.5 * 2^23 rounds to an integer, which is then found in the low bits.
  static constexpr float round_bias = 12582912.0f;
  static constexpr uint32_t exponent_shift = 23;
  static constexpr uint32_t exponent_bias = 127;
  // ln 2 in two parts: a multiple of the first by an exponent is exact.
  static constexpr float ln2_high = 0.693359375f;
  static constexpr float ln2_low = -2.12194440e-4f;
  // Between these the result is a normal number.
  static constexpr float lowest = -87.33f;
  static constexpr float highest = 88.37f;
  // |r| <= ln(2) / 2: the first term left out of the series is below 2^-27.
  static constexpr int terms = 7;
};

template <>
struct Simd<double> {
  typedef double F __attribute__((vector_size(MOPO_VECTOR_BYTES)));
  typedef uint64_t U __attribute__((vector_size(MOPO_VECTOR_BYTES)));
  static constexpr double round_bias = 6755399441055744.0;
  static constexpr uint64_t exponent_shift = 52;
  static constexpr uint64_t exponent_bias = 1023;
  static constexpr double ln2_high = 6.93145751953125e-1;
  static constexpr double ln2_low = 1.42860682030941723212e-6;
  static constexpr double lowest = -708.0;
  static constexpr double highest = 709.0;
  static constexpr int terms = 13;
};

constexpr double inverse_factorial(int n) { return n < 2 ? 1.0 : inverse_factorial(n - 1) / n; }

template <class T>
struct SimdMath {
  using S = Simd<T>;
  using F = typename S::F;
  using U = typename S::U;
  static constexpr int lanes = MOPO_VECTOR_BYTES / int(sizeof(T));

  // (exp(r) - 1) / r = 1 + r/2! + r^2/3! + ..., by Horner's rule.
  template <int n>
  static MOPO_INLINE F series(F r) {
    if constexpr (n == S::terms) {
      return F{} + T(inverse_factorial(n));
    } else {
      return series<n + 1>(r) * r + T(inverse_factorial(n));
    }
  }

  struct Reduced {
    F power;  // 2^n
    F r;      // x - n ln 2
    F tail;   // exp(r) - 1 - r
  };

  static MOPO_INLINE Reduced reduce(F x) {
    const F shifted = x * T(1.4426950408889634) + S::round_bias;
    const F n = shifted - S::round_bias;
    const F r = x - n * S::ln2_high - n * S::ln2_low;
    const U bits = ((U)shifted + S::exponent_bias) << S::exponent_shift;
    return {(F)bits, r, r * r * series<2>(r)};
  }

  // exp(x): 0 below the normal range, infinity above it, NaN stays.
  static MOPO_INLINE F exp(F x) {
    const Reduced e = reduce(x > S::highest ? F{} + S::highest : x);
    const F inside = e.power + e.power * (e.r + e.tail);
    const F above = x > S::highest ? F{} + T(__builtin_inf()) : inside;
    return x < S::lowest ? F{} : above;
  }

  // exp(x) - 1 for x <= highest, with its digits kept near 0; NaN stays.
  static MOPO_INLINE F expm1(F x) {
    const Reduced e = reduce(x < S::lowest ? F{} + S::lowest : x);
    return e.power * (e.r + e.tail) + (e.power - T(1));
  }

  // With d = exp(-2|u|) - 1: tanh |u| = -d / (d + 2), and 1 - tanh(u)^2 = 4 (d + 1) / (d + 2)^2 where 1 - t^2 cancels.
  // What each step rounds away from d, d + 2 and the quotient is kept and put back at the end: a logit is as large as
  // the softcap allows, and its error is the relative error of its probability.
  static MOPO_INLINE mopo::TanhSech2<F> tanh_sech2(F u) {
    const F size = u < T(0) ? -u : u;
    const F x = size * T(-2);
    const Reduced p = reduce(x < S::lowest ? F{} + S::lowest : x);
    const F remainder = p.r + p.tail;
    const F remainder_low = p.tail - (remainder - p.r);
    const F d = p.power * remainder + (p.power - T(1));
    const F d_low = (p.power * remainder - (d - (p.power - T(1)))) + p.power * remainder_low;
    const F divisor = d + T(2);
    const F divisor_low = (d - (divisor - T(2))) + d_low;
    const F inverse = T(1) / divisor;
    const F quotient = -d * inverse;
    const F correction = (((-d - quotient * divisor) - d_low) - quotient * divisor_low) * inverse;
    const F t = quotient + correction;
    const F t_low = correction - (t - quotient);
    const F e = p.power + p.power * remainder;
    const F sech2 = t < T(0.75) ? (T(1) - t * t) - T(2) * t * t_low : T(4) * e * (inverse * inverse);
    return {u < T(0) ? -t : t, sech2};
  }

  static MOPO_INLINE F load(const T* p) {
    F v;
    __builtin_memcpy(&v, p, sizeof(F));
    return v;
  }

  static MOPO_INLINE void store(T* p, F v) { __builtin_memcpy(p, &v, sizeof(F)); }

  static MOPO_INLINE F max(F a, F b) { return a > b ? a : b; }
};

}  // namespace
