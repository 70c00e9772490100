// Mathematical functions of Metal, and the names that MLX's bf16_math.h builds on. One argument type, as in Metal.
#pragma once
#include "msl_types.h"

namespace metal {
#define MSL_U(name, expr)                                                \
  METAL_FUNC float name(float x) { return expr; }                        \
  METAL_FUNC half name(half h) {                                         \
    float x = (float)h;                                                  \
    return (half)(expr);                                                 \
  }                                                                      \
  template <class V, class = std::enable_if_t<msl_isv<V> && msl_isf<V>>> \
  METAL_FUNC V name(V v) {                                               \
    V r;                                                                 \
    for (int i = 0; i < msl_v<V>::n; i++) {                              \
      float x = (float)v[i];                                             \
      r[i] = (msl_e<V>)(expr);                                           \
    }                                                                    \
    return r;                                                            \
  }
#define MSL_B(name, expr)                                                \
  METAL_FUNC float name(float x, float y) { return expr; }               \
  METAL_FUNC half name(half a, half b) {                                 \
    float x = (float)a, y = (float)b;                                    \
    return (half)(expr);                                                 \
  }                                                                      \
  template <class V, class = std::enable_if_t<msl_isv<V> && msl_isf<V>>> \
  METAL_FUNC V name(V a, V b) {                                          \
    V r;                                                                 \
    for (int i = 0; i < msl_v<V>::n; i++) {                              \
      float x = (float)a[i], y = (float)b[i];                            \
      r[i] = (msl_e<V>)(expr);                                           \
    }                                                                    \
    return r;                                                            \
  }
#define MSL_MATH                                                                                                      \
  MSL_U(exp, __builtin_expf(x))                                                                                       \
  MSL_U(exp2, __builtin_exp2f(x))                                                                                     \
  MSL_U(exp10, __builtin_powf(10.f, x)) MSL_U(log, __builtin_logf(x)) MSL_U(log2, __builtin_log2f(x)) MSL_U(          \
      log10, __builtin_log10f(x)) MSL_U(sqrt, __builtin_sqrtf(x)) MSL_U(rsqrt, 1.f / __builtin_sqrtf(x))              \
      MSL_U(sin, __builtin_sinf(x)) MSL_U(cos, __builtin_cosf(x)) MSL_U(tan, __builtin_tanf(x)) MSL_U(                \
          sinh, __builtin_sinhf(x)) MSL_U(cosh, __builtin_coshf(x)) MSL_U(tanh, __builtin_tanhf(x))                   \
          MSL_U(asin, __builtin_asinf(x)) MSL_U(acos, __builtin_acosf(x)) MSL_U(atan, __builtin_atanf(x)) MSL_U(      \
              asinh, __builtin_asinhf(x)) MSL_U(acosh, __builtin_acoshf(x)) MSL_U(atanh, __builtin_atanhf(x))         \
              MSL_U(sinpi, __builtin_sinf(x * 3.14159265358979f)) MSL_U(cospi, __builtin_cosf(x * 3.14159265358979f)) \
                  MSL_U(tanpi, __builtin_tanf(x * 3.14159265358979f)) MSL_U(fabs, __builtin_fabsf(x))                 \
                      MSL_U(floor, __builtin_floorf(x)) MSL_U(ceil, __builtin_ceilf(x))                               \
                          MSL_U(trunc, __builtin_truncf(x)) MSL_U(rint, __builtin_rintf(x))                           \
                              MSL_U(round, __builtin_roundf(x)) MSL_U(fract, (x - __builtin_floorf(x)))               \
                                  MSL_U(sign, (x > 0.f   ? 1.f                                                        \
                                               : x < 0.f ? -1.f                                                       \
                                                         : x)) MSL_U(saturate, (x < 0.f   ? 0.f                       \
                                                                                : x > 1.f ? 1.f                       \
                                                                                          : x))                       \
                                      MSL_B(pow, __builtin_powf(x, y)) MSL_B(powr, __builtin_powf(x, y))              \
                                          MSL_B(atan2, __builtin_atan2f(x, y)) MSL_B(fmod, __builtin_fmodf(x, y))     \
                                              MSL_B(fmax, __builtin_fmaxf(x, y)) MSL_B(fmin, __builtin_fminf(x, y))   \
                                                  MSL_B(divide, x / y) MSL_B(copysign, __builtin_copysignf(x, y))     \
                                                      MSL_B(fdim, __builtin_fdimf(x, y))
MSL_MATH
namespace fast {
MSL_MATH
}
namespace precise {
MSL_MATH
}
METAL_FUNC float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
METAL_FUNC half fma(half a, half b, half c) { return (half)((float)a * (float)b + (float)c); }
template <class V, class = std::enable_if_t<msl_isv<V>>>
METAL_FUNC V fma(V a, V b, V c) {
  V r;
  for (int i = 0; i < msl_v<V>::n; i++) r[i] = (msl_e<V>)__builtin_fmaf((float)a[i], (float)b[i], (float)c[i]);
  return r;
}
METAL_FUNC float ldexp(float x, int k) { return __builtin_ldexpf(x, k); }
METAL_FUNC bool isnan(float x) { return x != x; }
METAL_FUNC bool isnan(half x) { return x != x; }
METAL_FUNC bool isinf(float x) { return __builtin_isinf(x); }
METAL_FUNC bool isinf(half x) { return __builtin_isinf((float)x); }
METAL_FUNC bool isfinite(float x) { return __builtin_isfinite(x); }
METAL_FUNC bool signbit(float x) { return __builtin_signbit(x); }
// min, max, abs, clamp, select, mix, dot: one argument type, as in Metal (max(float, half) is ambiguous there too)
template <class T>
METAL_FUNC constexpr T msl_max(T a, T b) {
  if constexpr (msl_isv<T>) {
    T r;
    for (int i = 0; i < msl_v<T>::n; i++) r[i] = msl_max(a[i], b[i]);
    return r;
  } else if constexpr (msl_isf<T>)
    return (T)__builtin_fmaxf((float)a, (float)b);
  else
    return a < b ? b : a;
}
template <class T>
METAL_FUNC constexpr T msl_min(T a, T b) {
  if constexpr (msl_isv<T>) {
    T r;
    for (int i = 0; i < msl_v<T>::n; i++) r[i] = msl_min(a[i], b[i]);
    return r;
  } else if constexpr (msl_isf<T>)
    return (T)__builtin_fminf((float)a, (float)b);
  else
    return b < a ? b : a;
}
template <class T>
METAL_FUNC constexpr T msl_abs(T a) {
  if constexpr (msl_isv<T>) {
    T r;
    for (int i = 0; i < msl_v<T>::n; i++) r[i] = msl_abs(a[i]);
    return r;
  } else
    return a < (T)0 ? (T)-a : a;
}
#define MSL_ARITH(X) X(char) X(signed char) X(uchar) X(short) X(ushort) X(int) X(uint) X(long) X(ulong) X(half) X(float)
#define MSL_MM(T)                                                \
  METAL_FUNC constexpr T max(T a, T b) { return msl_max(a, b); } \
  METAL_FUNC constexpr T min(T a, T b) { return msl_min(a, b); } \
  METAL_FUNC constexpr T abs(T a) { return msl_abs(a); }         \
  METAL_FUNC constexpr T clamp(T x, T a, T b) { return msl_min(msl_max(x, a), b); }
MSL_ARITH(MSL_MM)
template <class V, class = std::enable_if_t<msl_isv<V>>>
METAL_FUNC V max(V a, V b) {
  return msl_max(a, b);
}
template <class V, class = std::enable_if_t<msl_isv<V>>>
METAL_FUNC V min(V a, V b) {
  return msl_min(a, b);
}
template <class V, class = std::enable_if_t<msl_isv<V>>>
METAL_FUNC V abs(V a) {
  return msl_abs(a);
}
template <class V, class = std::enable_if_t<msl_isv<V>>>
METAL_FUNC V clamp(V x, V a, V b) {
  return msl_min(msl_max(x, a), b);
}
template <class T>
METAL_FUNC T max3(T a, T b, T c) {
  return msl_max(a, msl_max(b, c));
}
template <class T>
METAL_FUNC T min3(T a, T b, T c) {
  return msl_min(a, msl_min(b, c));
}
template <class T>
METAL_FUNC T mix(T a, T b, T t) {
  return a + (b - a) * t;
}
template <class T>
METAL_FUNC T select(T a, T b, bool c) {
  return c ? b : a;
}
template <class T, class M, class = std::enable_if_t<msl_isv<T> && msl_isv<M>>>
METAL_FUNC T select(T a, T b, M c) {
  T r;
  for (int i = 0; i < msl_v<T>::n; i++) r[i] = c[i] ? b[i] : a[i];
  return r;
}
template <class M, class = std::enable_if_t<msl_isv<M>>>
METAL_FUNC bool all(M m) {
  bool r = true;
  for (int i = 0; i < msl_v<M>::n; i++) r = r && m[i];
  return r;
}
template <class M, class = std::enable_if_t<msl_isv<M>>>
METAL_FUNC bool any(M m) {
  bool r = false;
  for (int i = 0; i < msl_v<M>::n; i++) r = r || m[i];
  return r;
}
template <class V, class = std::enable_if_t<msl_isv<V>>>
METAL_FUNC msl_e<V> dot(V a, V b) {
  msl_e<V> r = 0;
  for (int i = 0; i < msl_v<V>::n; i++) r += a[i] * b[i];
  return r;
}
template <class T>
METAL_FUNC T popcount(T x) {
  return (T)__builtin_popcountll((unsigned long long)std::make_unsigned_t<T>(x));
}
template <class T>
METAL_FUNC T clz(T x) {
  return x ? (T)(__builtin_clzll((unsigned long long)std::make_unsigned_t<T>(x)) - (64 - 8 * (int)sizeof(T)))
           : (T)(8 * sizeof(T));
}
template <class T>
METAL_FUNC T ctz(T x) {
  return x ? (T)__builtin_ctzll((unsigned long long)std::make_unsigned_t<T>(x)) : (T)(8 * sizeof(T));
}
template <class T>
METAL_FUNC T extract_bits(T x, uint off, uint bits) {
  return bits == 0 ? (T)0 : (T)((x >> off) & ((bits >= 8 * sizeof(T)) ? ~(T)0 : (((T)1 << bits) - 1)));
}
METAL_FUNC uint mulhi(uint a, uint b) { return (uint)(((ulong)a * b) >> 32); }
}  // namespace metal
template <class D, class S>
METAL_FUNC constexpr D as_type(S s) {
  static_assert(sizeof(D) == sizeof(S), "as_type: sizes differ");
  return __builtin_bit_cast(D, s);
}
namespace metal {
using ::as_type;
}

// names MLX's bf16_math.h builds on
#define MSL_MU(n) \
  METAL_FUNC float __metal_##n(float x, int) { return metal::n(x); }
#define MSL_MB(n) \
  METAL_FUNC float __metal_##n(float x, float y, int) { return metal::n(x, y); }
MSL_MU(fabs)
MSL_MU(acos)
MSL_MU(acosh) MSL_MU(asin) MSL_MU(asinh) MSL_MU(atan) MSL_MU(atanh) MSL_MU(ceil) MSL_MU(cos) MSL_MU(cosh) MSL_MU(cospi)
    MSL_MU(exp) MSL_MU(exp10) MSL_MU(exp2) MSL_MU(floor) MSL_MU(fract) MSL_MU(log) MSL_MU(log10) MSL_MU(log2)
        MSL_MU(rint) MSL_MU(round) MSL_MU(rsqrt) MSL_MU(sin) MSL_MU(sinh) MSL_MU(sinpi) MSL_MU(sqrt) MSL_MU(tan)
            MSL_MU(tanh) MSL_MU(tanpi) MSL_MU(trunc) MSL_MB(atan2) MSL_MB(divide) MSL_MB(fmax) MSL_MB(fmin) MSL_MB(fmod)
                MSL_MB(pow) MSL_MB(powr) METAL_FUNC float __metal_fma(float a, float b, float c) {
  return __builtin_fmaf(a, b, c);
}
METAL_FUNC float __metal_fmax3(float a, float b, float c, int) { return metal::max3(a, b, c); }
METAL_FUNC float __metal_fmin3(float a, float b, float c, int) { return metal::min3(a, b, c); }
METAL_FUNC float __metal_fmedian3(float a, float b, float c, int) {
  return metal::max(metal::min(a, b), metal::min(metal::max(a, b), c));
}
METAL_FUNC float __metal_frexp(float x, int* e) { return __builtin_frexpf(x, e); }
METAL_FUNC float __metal_ldexp(float x, int k, int) { return __builtin_ldexpf(x, k); }
METAL_FUNC float __metal_nextafter(float x, float y) { return __builtin_nextafterf(x, y); }
