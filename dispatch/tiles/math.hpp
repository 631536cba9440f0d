// Functions on vectors, and the epilogues of a linear. NaN goes through every one of them.
#pragma once

#include "abi.h"
#include "simd.hpp"

namespace dks {

// e^x to about 1 ulp: x = n ln 2 + r with |r| <= ln 2 / 2, and the Taylor polynomial of e^r to degree 7, whose
// rest (0.35^8 / 8!) lies below half an ulp.
template <class V>
inline V exp(V x) {
  // Outside these the result is infinite or zero whatever x is; min and max hand on a NaN in second place.
  x = max(V::of(-110.0f), min(V::of(100.0f), x));
  const V n = round(x * V::of(1.44269504088896341f));
  V r = fma(n, V::of(-0.693359375f), x);  // ln 2 in two parts, the first exact in few bits
  r = fma(n, V::of(2.12194440e-4f), r);
  V p = V::of(1.0f / 5040);
  p = fma(p, r, V::of(1.0f / 720));
  p = fma(p, r, V::of(1.0f / 120));
  p = fma(p, r, V::of(1.0f / 24));
  p = fma(p, r, V::of(1.0f / 6));
  p = fma(p, r, V::of(0.5f));
  p = fma(p, r, V::of(1.0f));
  p = fma(p, r, V::of(1.0f));
  return scale(p, n);
}

// The share of a normal distribution below x. erfc(z) for z >= 0 as t (a1 + t (...)) e^(-z^2) with
// t = 1 / (1 + 0.3275911 z), to 1.5e-7 (Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26).
template <class V>
inline V normal_cdf(V x) {
  const V z = abs(x) * V::of(0.70710678118654752f);
  const V t = V::of(1.0f) / fma(z, V::of(0.3275911f), V::of(1.0f));
  V p = V::of(1.061405429f);
  p = fma(p, t, V::of(-1.453152027f));
  p = fma(p, t, V::of(1.421413741f));
  p = fma(p, t, V::of(-0.284496736f));
  p = fma(p, t, V::of(0.254829592f));
  const V half = V::of(0.5f) * p * t * exp(V::zero() - z * z);
  return if_negative(x, half, V::of(1.0f) - half);
}

template <class V>
inline V sigmoid(V x) {
  return V::of(1.0f) / (V::of(1.0f) + exp(V::zero() - x));
}

// gelu's tanh form: x / 2 (1 + tanh u) = x sigmoid(2 u).
template <class V>
inline V gelu_tanh(V x) {
  const V u = x * fma(x * x, V::of(0.044715f * 1.5957691216057308f), V::of(1.5957691216057308f));
  return x * sigmoid(u);
}

template <class V>
inline V activate(int epilogue, V y) {
  switch (epilogue) {
    case DKS_RELU: return max(V::zero(), y);
    case DKS_GELU: return y * normal_cdf(y);
    case DKS_GELU_TANH: return gelu_tanh(y);
    case DKS_SILU: return y * sigmoid(y);
    default: return y;
  }
}

// Finish `n` outputs (at most a vector's width) of one row: bias, activation or residual, rounding.
template <class V, class Out>
inline void finish(V y, const dks_linear& w, int64_t column, const Out* residual, Out* out, int64_t n) {
  const bool whole = n >= V::width;
  if (w.bias != nullptr) y = y + (whole ? V::load(w.bias + column) : V::load(w.bias + column, n));
  if (w.epilogue == DKS_ADD) {
    y = y + (whole ? V::load(residual) : V::load(residual, n));
  } else if (w.epilogue != DKS_NONE) {
    y = activate(w.epilogue, y);
  }
  if (whole) {
    y.store(out);
  } else {
    y.store(out, n);
  }
}

}  // namespace dks
