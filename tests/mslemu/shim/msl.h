// What every <metal_*> header includes here. The keywords come last: no system header may see them.
#pragma once
#include "msl_matrix.h"

namespace metal {
template <class T>
struct atomic {
  T v;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
typedef atomic<bool> atomic_bool;
typedef atomic<ulong> atomic_ulong;
#define MSL_ATOM(AS, name, expr)                                              \
  template <class T>                                                          \
  MSL_RT inline T name(volatile AS atomic<T>* p, msl_nd<T> x, memory_order) { \
    msl_atomic_access((void*)(uintptr_t)p, sizeof(T));                        \
    T o = p->v;                                                               \
    p->v = (T)(expr);                                                         \
    return o;                                                                 \
  }
#define MSL_ATOMS(AS)                                                                                                 \
  MSL_ATOM(AS, atomic_fetch_add_explicit, o + x)                                                                      \
  MSL_ATOM(AS, atomic_fetch_sub_explicit, o - x)                                                                      \
  MSL_ATOM(AS, atomic_fetch_max_explicit, o < x ? x : o) MSL_ATOM(AS, atomic_fetch_min_explicit, x < o ? x : o)       \
      MSL_ATOM(AS, atomic_fetch_or_explicit, o | x) MSL_ATOM(AS, atomic_fetch_and_explicit, o& x)                     \
          MSL_ATOM(AS, atomic_fetch_xor_explicit, o ^ x) MSL_ATOM(AS, atomic_exchange_explicit, x) template <class T> \
          MSL_RT inline void atomic_store_explicit(volatile AS atomic<T>* p, msl_nd<T> x, memory_order) {             \
    msl_atomic_access((void*)(uintptr_t)p, sizeof(T));                                                                \
    p->v = x;                                                                                                         \
  }                                                                                                                   \
  template <class T>                                                                                                  \
  MSL_RT inline T atomic_load_explicit(const volatile AS atomic<T>* p, memory_order) {                                \
    msl_atomic_access((void*)(uintptr_t)p, sizeof(T));                                                                \
    return p->v;                                                                                                      \
  }                                                                                                                   \
  template <class T>                                                                                                  \
  MSL_RT inline bool atomic_compare_exchange_weak_explicit(volatile AS atomic<T>* p, T* e, msl_nd<T> d, memory_order, \
                                                           memory_order) {                                            \
    msl_atomic_access((void*)(uintptr_t)p, sizeof(T));                                                                \
    T o = p->v;                                                                                                       \
    if (o == *e) {                                                                                                    \
      p->v = d;                                                                                                       \
      return true;                                                                                                    \
    }                                                                                                                 \
    *e = o;                                                                                                           \
    return false;                                                                                                     \
  }
MSL_ATOMS(MSL_DEV)
MSL_ATOMS(MSL_TG)
struct os_log {
  constexpr os_log(const char*, const char*) {}
  template <class A, class B>
  constexpr os_log(const A&, const B&) {}
  template <class... A>
  void log_debug(const char*, A...) const {}
};
template <class T>
using uniform = T;
template <class T>
METAL_FUNC constexpr T make_uniform(T x) {
  return x;
}
MSL_VT(bool, 2) MSL_VT(bool, 3) MSL_VT(bool, 4) METAL_FUNC vec<uint, 3> msl_u3(const uint32_t* p) {
  return vec<uint, 3>{p[0], p[1], p[2]};
}
// entry thunk: a buffer argument that takes whatever pointer or reference type the kernel declares
struct msl_ptr_arg {
  void* p;
  template <class T>
  MSL_RT METAL_FUNC operator T*() const {
    return (T*)(uintptr_t)p;
  }
};
struct msl_ref_arg {
  void* p;
  template <class T>
  MSL_RT METAL_FUNC operator T&() const {
    return *(T*)(uintptr_t)p;
  }
};
}  // namespace metal

// comm functions bf16_math.h builds on
METAL_FUNC int __metal_get_simdgroup_size(ushort) { return 32; }
#define MSL_MS(n) \
  METAL_FUNC ushort __metal_##n(ushort x, ushort a, MSL_HERE) { return metal::n(x, a, msl_f, msl_l); }
MSL_MS(simd_broadcast)
MSL_MS(simd_shuffle)
MSL_MS(simd_shuffle_down) MSL_MS(simd_shuffle_up) MSL_MS(simd_shuffle_xor) MSL_MS(simd_shuffle_rotate_down)
    MSL_MS(simd_shuffle_rotate_up) METAL_FUNC ushort
    __metal_simd_shuffle_and_fill_down(ushort x, ushort f, ushort d, ushort m, MSL_HERE) {
  return metal::simd_shuffle_and_fill_down(x, f, d, m, msl_f, msl_l);
}
METAL_FUNC ushort __metal_simd_shuffle_and_fill_up(ushort x, ushort f, ushort d, ushort m, MSL_HERE) {
  return metal::simd_shuffle_and_fill_up(x, f, d, m, msl_f, msl_l);
}
#define MSL_MR(n) \
  METAL_FUNC float __metal_##n(float x, MSL_HERE) { return metal::n(x, msl_f, msl_l); }
MSL_MR(simd_max)
MSL_MR(simd_min)
MSL_MR(simd_sum) MSL_MR(simd_product) MSL_MR(simd_prefix_exclusive_product) MSL_MR(simd_prefix_exclusive_sum)
    MSL_MR(simd_prefix_inclusive_product) MSL_MR(simd_prefix_inclusive_sum) METAL_FUNC float __metal_simd_xor(float x) {
  return x;
}

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define FLT_MAX 3.402823466e38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.192092896e-7f
#define HALF_MAX ((half)65504.f)
#define M_PI_F 3.14159265358979f
#define M_SQRT2_F 1.41421356237f
#define M_SQRT1_2_F 0.70710678118f
#define M_LOG2E_F 1.44269504089f
#define M_LN10_F 2.30258509299f
#define M_LN2_F 0.69314718056f

// address spaces and keywords (after every system header)
#define device MSL_DEV
#define constant MSL_CONST
#define threadgroup MSL_TG
#define thread
#define kernel
namespace metal {
template <class A>
METAL_FUNC void msl_copy(threadgroup A* d, const device A* s) {
  __builtin_memcpy((void*)(uintptr_t)d, (const void*)(uintptr_t)s, sizeof(A));
}
}  // namespace metal
// threadgroup variables: the harness rewrites `threadgroup T x[N];` into this
namespace metal {
template <class A>
METAL_FUNC MSL_TG A& msl_tgvar(int slot, const char* n) {
  return *(MSL_TG A*)(uintptr_t)msl_tg_alloc(slot, sizeof(A), alignof(A) < 16 ? 16 : alignof(A), n);
}
}  // namespace metal
#define MSL_TGDECL(slot, name, ...) threadgroup auto& name = ::metal::msl_tgvar<__VA_ARGS__>(slot, #name)

// multi-component constructors: float4(a, b, c, d) (a macro only fires before an opening parenthesis)
#define float2(...) ::metal::msl_make<float, 2>(__VA_ARGS__)
#define float3(...) ::metal::msl_make<float, 3>(__VA_ARGS__)
#define float4(...) ::metal::msl_make<float, 4>(__VA_ARGS__)
#define half2(...) ::metal::msl_make<half, 2>(__VA_ARGS__)
#define half3(...) ::metal::msl_make<half, 3>(__VA_ARGS__)
#define half4(...) ::metal::msl_make<half, 4>(__VA_ARGS__)
#define bfloat2(...) ::metal::msl_make<bfloat, 2>(__VA_ARGS__)
#define bfloat3(...) ::metal::msl_make<bfloat, 3>(__VA_ARGS__)
#define bfloat4(...) ::metal::msl_make<bfloat, 4>(__VA_ARGS__)
#define char2(...) ::metal::msl_make<char, 2>(__VA_ARGS__)
#define char3(...) ::metal::msl_make<char, 3>(__VA_ARGS__)
#define char4(...) ::metal::msl_make<char, 4>(__VA_ARGS__)
#define uchar2(...) ::metal::msl_make<uchar, 2>(__VA_ARGS__)
#define uchar3(...) ::metal::msl_make<uchar, 3>(__VA_ARGS__)
#define uchar4(...) ::metal::msl_make<uchar, 4>(__VA_ARGS__)
#define short2(...) ::metal::msl_make<short, 2>(__VA_ARGS__)
#define short3(...) ::metal::msl_make<short, 3>(__VA_ARGS__)
#define short4(...) ::metal::msl_make<short, 4>(__VA_ARGS__)
#define ushort2(...) ::metal::msl_make<ushort, 2>(__VA_ARGS__)
#define ushort3(...) ::metal::msl_make<ushort, 3>(__VA_ARGS__)
#define ushort4(...) ::metal::msl_make<ushort, 4>(__VA_ARGS__)
#define int2(...) ::metal::msl_make<int, 2>(__VA_ARGS__)
#define int3(...) ::metal::msl_make<int, 3>(__VA_ARGS__)
#define int4(...) ::metal::msl_make<int, 4>(__VA_ARGS__)
#define uint2(...) ::metal::msl_make<uint, 2>(__VA_ARGS__)
#define uint3(...) ::metal::msl_make<uint, 3>(__VA_ARGS__)
#define uint4(...) ::metal::msl_make<uint, 4>(__VA_ARGS__)
#define long2(...) ::metal::msl_make<long, 2>(__VA_ARGS__)
#define long3(...) ::metal::msl_make<long, 3>(__VA_ARGS__)
#define long4(...) ::metal::msl_make<long, 4>(__VA_ARGS__)
#define ulong2(...) ::metal::msl_make<ulong, 2>(__VA_ARGS__)
#define ulong3(...) ::metal::msl_make<ulong, 3>(__VA_ARGS__)
#define ulong4(...) ::metal::msl_make<ulong, 4>(__VA_ARGS__)
