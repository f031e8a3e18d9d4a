// Vectors of MOPO_VECTOR_BYTES bytes (the including file says how many) and exp and expm1 on them, written with
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
};

template <>
struct Simd<double> {
  typedef double F __attribute__((vector_size(MOPO_VECTOR_BYTES)));
  typedef uint64_t U __attribute__((vector_size(MOPO_VECTOR_BYTES)));
};

template <class T>
struct SimdMath {
  using F = typename Simd<T>::F;
  using U = typename Simd<T>::U;
  using C = mopo::ExpConstants<T>;
  static constexpr int lanes = MOPO_VECTOR_BYTES / int(sizeof(T));

  // 2^n, n being in the low bits of n + round_bias.
  static MOPO_INLINE F power_of_two(F shifted) { return (F)(((U)shifted + C::exponent_bias) << C::exponent_shift); }

  // exp(x): 0 below the normal range, infinity above it, NaN stays.
  static MOPO_INLINE F exp(F x) {
    const mopo::ReducedExp<F> e = mopo::reduce_exp<SimdMath, T>(x > C::highest ? F{} + C::highest : x);
    const F inside = e.power + e.power * (e.r + e.tail);
    const F above = x > C::highest ? F{} + T(__builtin_inf()) : inside;
    return x < C::lowest ? F{} : above;
  }

  // exp(x) - 1 for x <= highest, with its digits kept near 0; NaN stays.
  static MOPO_INLINE F expm1(F x) {
    const mopo::ReducedExp<F> e = mopo::reduce_exp<SimdMath, T>(x < C::lowest ? F{} + C::lowest : x);
    return e.power * (e.r + e.tail) + (e.power - T(1));
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
