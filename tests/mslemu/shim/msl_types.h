// Metal Shading Language on a stock clang++: address spaces, types, constructors and type traits.
// Every address space is a real, distinct clang address space (opencl_global/local/constant), so the type
// checks Metal makes are made here too, while code generation stays flat on the CPU target.
#pragma once
#include <stdint.h>
#include <stddef.h>
#include <type_traits>
#include <limits>
#include "rt.h"

#define __METAL__ 1
#define __METAL_VERSION__ 320
#define __METAL_MACOS__ 1
#define __HAVE_BFLOAT__ 1
#define __METAL_MAYBE_FAST_MATH__ 0
#define __METAL_FAST_MATH__ 1
#define __METAL_PRECISE_MATH__ 2

#define MSL_AS(x) __attribute__((x))
#define MSL_DEV MSL_AS(opencl_global)
#define MSL_TG MSL_AS(opencl_local)
#define MSL_CONST MSL_AS(opencl_constant)
#define METAL_FUNC inline __attribute__((always_inline))
#define MSL_RT __attribute__((no_sanitize("thread")))
#define MSL_HERE const char *msl_f = __builtin_FILE(), int msl_l = __builtin_LINE()

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;
typedef __bf16 bfloat;

inline half operator""h(long double x) { return (half)x; }
inline half operator"" H(long double x) { return (half)x; }

namespace metal {
template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));
template <class T>
struct msl_v {
  static constexpr int n = 1;
  using e = T;
};
template <class T, int N>
struct msl_v<T __attribute__((ext_vector_type(N)))> {
  static constexpr int n = N;
  using e = T;
};
template <class T>
using msl_e = typename msl_v<T>::e;
template <class T>
constexpr bool msl_isv = msl_v<T>::n > 1;
template <class T>
struct msl_id {
  using type = T;
};
template <class T>
using msl_nd = typename msl_id<T>::type;
template <class T>
constexpr bool msl_isf = std::is_floating_point<msl_e<T>>::value || std::is_same<msl_e<T>, half>::value ||
                         std::is_same<msl_e<T>, bfloat>::value;

template <class T, int N, int K, class A>
METAL_FUNC void msl_put(vec<T, N>& v, const A& a) {
  if constexpr (msl_isv<A>) {
    for (int i = 0; i < msl_v<A>::n; i++) v[K + i] = (T)a[i];
  } else
    v[K] = (T)a;
}
template <class T, int N, int K>
METAL_FUNC void msl_fill(vec<T, N>&) {
  static_assert(K == N, "wrong number of components in a vector constructor");
}
template <class T, int N, int K, class A, class... R>
METAL_FUNC void msl_fill(vec<T, N>& v, const A& a, const R&... r) {
  msl_put<T, N, K, A>(v, a);
  msl_fill<T, N, K + msl_v<A>::n>(v, r...);
}
template <class T, int N, class... A>
METAL_FUNC constexpr vec<T, N> msl_make(A... a) {
  vec<T, N> v{};
  if constexpr (sizeof...(A) == 0)
    return v;
  else if constexpr (sizeof...(A) == 1 && !(msl_isv<A> && ...)) {
    for (int i = 0; i < N; i++) ((v[i] = (T)a), ...);
    return v;
  } else {
    msl_fill<T, N, 0>(v, a...);
    return v;
  }
}
#define MSL_VT(T, N) typedef T T##N __attribute__((ext_vector_type(N)));
#define MSL_VTS(T) MSL_VT(T, 2) MSL_VT(T, 3) MSL_VT(T, 4)
MSL_VTS(float)
MSL_VTS(half)
MSL_VTS(bfloat) MSL_VTS(char) MSL_VTS(uchar) MSL_VTS(short) MSL_VTS(ushort) MSL_VTS(int) MSL_VTS(uint) MSL_VTS(long)
    MSL_VTS(ulong)

    // Type traits and limits.
    using std::conditional;
using std::bool_constant;
using std::conditional_t;
using std::conjunction;
using std::decay_t;
using std::disjunction;
using std::enable_if;
using std::enable_if_t;
using std::false_type;
using std::integral_constant;
using std::is_arithmetic;
using std::is_arithmetic_v;
using std::is_base_of;
using std::is_base_of_v;
using std::is_class_v;
using std::is_const;
using std::is_convertible;
using std::is_convertible_v;
using std::is_enum_v;
using std::is_integral;
using std::is_integral_v;
using std::is_pointer;
using std::is_pointer_v;
using std::is_same;
using std::is_same_v;
using std::is_signed;
using std::is_signed_v;
using std::is_unsigned;
using std::is_unsigned_v;
using std::is_void_v;
using std::make_signed_t;
using std::make_unsigned_t;
using std::negation;
using std::remove_cv;
using std::remove_cv_t;
using std::remove_pointer;
using std::remove_pointer_t;
using std::remove_reference;
using std::remove_reference_t;
using std::true_type;
template <class T>
struct remove_addrspace {
  using type = T;
};
template <class T>
struct remove_addrspace<MSL_DEV T> {
  using type = T;
};
template <class T>
struct remove_addrspace<MSL_TG T> {
  using type = T;
};
template <class T>
struct remove_addrspace<MSL_CONST T> {
  using type = T;
};
template <class T>
using remove_addrspace_t = typename remove_addrspace<T>::type;
template <class T>
struct is_floating_point : std::bool_constant<msl_isf<std::remove_cv_t<T>>> {};
template <class T>
constexpr bool is_floating_point_v = is_floating_point<T>::value;
template <class T>
struct numeric_limits : std::numeric_limits<T> {};
template <>
struct numeric_limits<half> {
  static constexpr half max() { return (half)65504.f; }
  static constexpr half lowest() { return (half)-65504.f; }
  static constexpr half min() { return (half)6.103515625e-5f; }
  static constexpr half infinity() { return (half)__builtin_inff(); }
  static constexpr half quiet_NaN() { return (half)__builtin_nanf(""); }
  static constexpr half epsilon() { return (half)0.0009765625f; }
};
template <>
struct numeric_limits<bfloat> {
  static constexpr bfloat max() { return (bfloat)3.3895313892515355e38f; }
  static constexpr bfloat lowest() { return (bfloat)-3.3895313892515355e38f; }
  static constexpr bfloat min() { return (bfloat)1.17549435e-38f; }
  static constexpr bfloat infinity() { return (bfloat)__builtin_inff(); }
  static constexpr bfloat quiet_NaN() { return (bfloat)__builtin_nanf(""); }
  static constexpr bfloat epsilon() { return (bfloat)0.0078125f; }
};
}  // namespace metal
