// The map from a product to a logit, its slope, and what one logit contributes to the gradient: the maths of
// mopo_kernels/reference.py for one element. F is a number or a vector of numbers, so that every CPU capability and
// every device compiles the same lines; Math supplies exp, expm1 and tanh_sech2 for F.
#pragma once

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
struct Head {
  Constant<T> inner;
  Constant<T> outer;
  Constant<T> slope;

  static MOPO_INLINE Head make(double softcap, double logit_scale, double temperature) {
    return {Constant<T>::make(logit_scale / softcap), Constant<T>::make(softcap / temperature),
            Constant<T>::make(logit_scale / temperature)};
  }
};

template <class F>
struct TanhSech2 {
  F tanh;
  F sech2;
};

template <class F>
struct Logit {
  F value;
  F bend;
};

// x is the product plus the bias.
template <class Math, bool capped, class F, class T>
MOPO_INLINE Logit<F> make_logit(F x, const Head<T>& head) {
  if constexpr (capped) {
    const TanhSech2<F> t = Math::tanh_sech2(head.inner.times(x));
    return {head.outer.times(t.tanh), t.sech2};
  } else {
    return {head.slope.times(x), F{} + T(1)};
  }
}

// z - logsumexp, the second held as the sum of two numbers: rounding it to one would tilt the whole row's gradient.
template <class F, class T>
MOPO_INLINE F log_probability(F logit, const Constant<T>& logsumexp) {
  return (logit - logsumexp.high) - logsumexp.low;
}

// coefficient * d logprob / dx = -factor * exp(z - logsumexp) * bend where the column is not the target; factor, the
// same for a whole row, is coefficient * slope.
template <class Math, bool capped, class F, class T>
MOPO_INLINE F other_gradient(F x, const Head<T>& head, const Constant<T>& logsumexp, T factor) {
  const Logit<F> z = make_logit<Math, capped>(x, head);
  return Math::exp(log_probability(z.value, logsumexp)) * (z.bend * -factor);
}

// The same at the target: 1 - exp(z - logsumexp) written so that it keeps its digits when the probability is near 1.
template <class Math, bool capped, class F, class T>
MOPO_INLINE F target_gradient(F x, const Head<T>& head, const Constant<T>& logsumexp, T factor) {
  const Logit<F> z = make_logit<Math, capped>(x, head);
  return Math::expm1(log_probability(z.value, logsumexp)) * (z.bend * -factor);
}

}  // namespace mopo
