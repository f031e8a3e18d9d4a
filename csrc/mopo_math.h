// The map from a product to a logit, its slope, and what one logit contributes to the gradient: the maths of
// mopo_kernels/naive.py for one element. F is a number or a vector of numbers of type T, so that every CPU
// capability and every device compiles the same lines; Math supplies exp and expm1 for F, and power_of_two for
// reduce_exp.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MOPO_INLINE __host__ __device__ __forceinline__
#else
#define MOPO_INLINE inline __attribute__((always_inline))
#endif

namespace mopo {

// A constant as the sum of two numbers, so that multiplying by it rounds the result but not the constant.
template <class T>
struct Constant {
  T high;
  T low;

  static MOPO_INLINE Constant make(double value) { return {T(value), T(value - double(T(value)))}; }

  // Compilers fuse the first product with the sum, so that only the sum is rounded. An infinite x stays itself, where
  // the two products would be infinities of opposite sign or infinity times 0.
  template <class F>
  MOPO_INLINE F times(F x) const {
    const F product = x * high + x * low;
    return product == product ? product : x;
  }
};

// z = outer * tanh(inner * x) with a softcap, z = slope * x without one; dz/dx = slope * bend, where bend is
// 1 - tanh(inner * x)^2 or 1.
template <class T>
struct LogitTransform {
  Constant<T> inner;
  Constant<T> outer;
  Constant<T> slope;

  static MOPO_INLINE LogitTransform make(double softcap, double logit_scale, double temperature) {
    return {Constant<T>::make(logit_scale / softcap), Constant<T>::make(softcap / temperature),
            Constant<T>::make(logit_scale / temperature)};
  }
};

// What exp needs to know of a number type.
template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
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
struct ExpConstants<double> {
  static constexpr double round_bias = 6755399441055744.0;
  static constexpr uint64_t exponent_shift = 52;
  static constexpr uint64_t exponent_bias = 1023;
  static constexpr double ln2_high = 6.93145751953125e-1;
  static constexpr double ln2_low = 1.42860682030941723212e-6;
  static constexpr double lowest = -708.0;
  static constexpr double highest = 709.0;
  static constexpr int terms = 13;
};

MOPO_INLINE constexpr double inverse_factorial(int n) { return n < 2 ? 1.0 : inverse_factorial(n - 1) / n; }

// (exp(r) - 1) / r = 1 + r/2! + r^2/3! + ..., by Horner's rule, from the term of 1/n! on.
template <class T, int n, class F>
MOPO_INLINE F exp_series(F r) {
  constexpr T factor = T(inverse_factorial(n));
  if constexpr (n == ExpConstants<T>::terms) {
    return F{} + factor;
  } else {
    return exp_series<T, n + 1>(r) * r + factor;
  }
}

// exp(x) = power * (1 + r + tail) for x between lowest and highest.
template <class F>
struct ReducedExp {
  F power;  // 2^n
  F r;      // x - n ln 2
  F tail;   // exp(r) - 1 - r
};

template <class Math, class T, class F>
MOPO_INLINE ReducedExp<F> reduce_exp(F x) {
  using C = ExpConstants<T>;
  const F shifted = x * T(1.4426950408889634) + C::round_bias;
  const F n = shifted - C::round_bias;
  const F r = x - n * C::ln2_high - n * C::ln2_low;
  return {Math::power_of_two(shifted), r, r * r * exp_series<T, 2>(r)};
}

template <class F>
struct TanhSech2 {
  F tanh;
  F sech2;
};

// With d = exp(-2|u|) - 1: tanh |u| = -d / (d + 2), and 1 - tanh(u)^2 = 4 (d + 1) / (d + 2)^2 where 1 - t^2 cancels.
// What each step rounds away from d, d + 2 and the quotient is kept and put back at the end: a logit is as large as
// the softcap allows, and its error is the relative error of its probability.
template <class Math, class T, class F>
MOPO_INLINE TanhSech2<F> tanh_sech2(F u) {
  using C = ExpConstants<T>;
  const F size = u < T(0) ? -u : u;
  const F x = size * T(-2);
  const ReducedExp<F> p = reduce_exp<Math, T>(x < C::lowest ? F{} + C::lowest : x);
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

template <class F>
struct Logit {
  F value;
  F bend;
};

// x is the product plus the bias.
template <class Math, bool capped, class F, class T>
MOPO_INLINE Logit<F> make_logit(F x, const LogitTransform<T>& transform) {
  if constexpr (capped) {
    const TanhSech2<F> t = tanh_sech2<Math, T>(transform.inner.times(x));
    return {transform.outer.times(t.tanh), t.sech2};
  } else {
    return {transform.slope.times(x), F{} + T(1)};
  }
}

// z - logsumexp, the second held as the sum of two numbers: rounding it to one would tilt the whole row's gradient.
template <class F, class T>
MOPO_INLINE F log_probability(F logit, const Constant<T>& logsumexp) {
  return (logit - logsumexp.high) - logsumexp.low;
}

// grad_logprob * d logprob / dx = -factor * exp(z - logsumexp) * bend where the column is not the target; factor, the
// same for a whole row, is grad_logprob * slope.
template <class Math, bool capped, class F, class T>
MOPO_INLINE F other_gradient(F x, const LogitTransform<T>& transform, const Constant<T>& logsumexp, T factor) {
  const Logit<F> z = make_logit<Math, capped>(x, transform);
  return Math::exp(log_probability(z.value, logsumexp)) * (z.bend * -factor);
}

// The same at the target: 1 - exp(z - logsumexp) written so that it keeps its digits when the probability is near 1.
template <class Math, bool capped, class F, class T>
MOPO_INLINE F target_gradient(F x, const LogitTransform<T>& transform, const Constant<T>& logsumexp, T factor) {
  const Logit<F> z = make_logit<Math, capped>(x, transform);
  return Math::expm1(log_probability(z.value, logsumexp)) * (z.bend * -factor);
}

}  // namespace mopo
