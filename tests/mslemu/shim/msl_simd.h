// Barriers and what a simdgroup does together: reductions, scans, shuffles, votes.
#pragma once
#include "msl_math.h"

namespace metal {
enum class mem_flags {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8,
  mem_object_data = 16
};
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return (mem_flags)((int)a | (int)b); }
enum memory_order { memory_order_relaxed };
enum thread_scope { thread_scope_thread, thread_scope_simdgroup, thread_scope_threadgroup, thread_scope_device };
METAL_FUNC void threadgroup_barrier(mem_flags f, MSL_HERE) { msl_barrier((int)f, msl_f, msl_l); }
struct msl_pbar {
  int flags;
};
MSL_RT inline void msl_xbar(void** p, uint32_t m, int sg) {
  int f = 0;
  for (int i = 0; i < 32; i++)
    if (p[i]) f |= ((msl_pbar*)p[i])->flags;
  msl_simd_fence(sg, f);
}
METAL_FUNC void simdgroup_barrier(mem_flags f, MSL_HERE) {
  msl_pbar p{(int)f};
  msl_simd(&p, msl_xbar, "simdgroup_barrier", msl_f, msl_l);
}

template <class T>
struct msl_p1 {
  T v;
};
// Reductions. Apple does not document the order in which lanes are added: under the random schedule it is random here.
// Lanes that take no part are skipped.
template <class T, class F>
MSL_RT inline void msl_xred(void** p, uint32_t m, int) {
  T t[32];
  int n = 0, order[32];
  msl_lane_order(order);
  for (int i = 0; i < 32; i++)
    if (p[order[i]]) t[n++] = ((msl_p1<T>*)p[order[i]])->v;
  for (; n > 1; n = (n + 1) / 2)
    for (int i = 0; i < n / 2; i++) t[i] = F::op(t[i], t[n - 1 - i]);
  for (int i = 0; i < 32; i++)
    if (p[i]) ((msl_p1<T>*)p[i])->v = t[0];
}
struct msl_fadd {
  template <class T>
  MSL_RT static T op(T a, T b) {
    return (T)(a + b);
  }
};
struct msl_fmul {
  template <class T>
  MSL_RT static T op(T a, T b) {
    return (T)(a * b);
  }
};
struct msl_fmax {
  template <class T>
  MSL_RT static T op(T a, T b) {
    return msl_max(a, b);
  }
};
struct msl_fmin {
  template <class T>
  MSL_RT static T op(T a, T b) {
    return msl_min(a, b);
  }
};
struct msl_fand {
  template <class T>
  MSL_RT static T op(T a, T b) {
    return (T)(a & b);
  }
};
struct msl_for {
  template <class T>
  MSL_RT static T op(T a, T b) {
    return (T)(a | b);
  }
};
struct msl_fxor {
  template <class T>
  MSL_RT static T op(T a, T b) {
    return (T)(a ^ b);
  }
};
#define MSL_RED(name, F)                               \
  template <class T>                                   \
  METAL_FUNC T name(T x, MSL_HERE) {                   \
    msl_p1<T> p{x};                                    \
    msl_simd(&p, msl_xred<T, F>, #name, msl_f, msl_l); \
    return p.v;                                        \
  }
MSL_RED(simd_sum, msl_fadd)
MSL_RED(simd_product, msl_fmul)
MSL_RED(simd_max, msl_fmax) MSL_RED(simd_min, msl_fmin) MSL_RED(simd_and, msl_fand) MSL_RED(simd_or, msl_for)
    MSL_RED(simd_xor, msl_fxor) template <class T, class F, bool EXC>
    MSL_RT inline void msl_xscan(void** p, uint32_t m, int) {
  bool any = false;
  T acc{};
  for (int i = 0; i < 32; i++)
    if (p[i]) {
      T& v = ((msl_p1<T>*)p[i])->v;
      T x = v;
      if (EXC) v = any ? acc : (std::is_same<F, msl_fmul>::value ? (T)1 : (T)0);
      acc = any ? F::op(acc, x) : x;
      any = true;
      if (!EXC) v = acc;
    }
}
#define MSL_SCAN(name, F, E)                               \
  template <class T>                                       \
  METAL_FUNC T name(T x, MSL_HERE) {                       \
    msl_p1<T> p{x};                                        \
    msl_simd(&p, msl_xscan<T, F, E>, #name, msl_f, msl_l); \
    return p.v;                                            \
  }
MSL_SCAN(simd_prefix_inclusive_sum, msl_fadd, false)
MSL_SCAN(simd_prefix_exclusive_sum, msl_fadd, true)
MSL_SCAN(simd_prefix_inclusive_product, msl_fmul, false) MSL_SCAN(simd_prefix_exclusive_product, msl_fmul, true)

    template <class T>
    struct msl_ps {
  T v, fill;
  int arg, mod;
};
enum {
  MSL_ABS,
  MSL_DOWN,
  MSL_UP,
  MSL_XOR,
  MSL_RDOWN,
  MSL_RUP,
  MSL_FDOWN,
  MSL_FUP,
  MSL_FIRST,
  MSL_QUAD,
  MSL_QXOR,
  MSL_QDOWN,
  MSL_QUP
};
template <class T, int K>
MSL_RT inline void msl_xshuf(void** p, uint32_t m, int) {
  T r[32];
  int first = __builtin_ctz(m);
  for (int i = 0; i < 32; i++)
    if (p[i]) {
      auto* q = (msl_ps<T>*)p[i];
      int s = i;
      bool fill = false;
      switch (K) {
        case MSL_ABS:
          s = q->arg;
          break;
        case MSL_FIRST:
          s = first;
          break;
        case MSL_XOR:
          s = i ^ q->arg;
          break;
        case MSL_DOWN:
          s = i + q->arg;
          if (s > 31) s = i;
          break;
        case MSL_UP:
          s = i - q->arg;
          if (s < 0) s = i;
          break;
        case MSL_RDOWN:
          s = (i + q->arg) & 31;
          break;
        case MSL_RUP:
          s = (i - q->arg) & 31;
          break;
        case MSL_FDOWN: {
          int b = i / q->mod * q->mod;
          s = i + q->arg;
          if (s >= b + q->mod) {
            fill = true;
            s -= q->mod;
          }
          break;
        }
        case MSL_FUP: {
          int b = i / q->mod * q->mod;
          s = i - q->arg;
          if (s < b) {
            fill = true;
            s += q->mod;
          }
          break;
        }
        case MSL_QUAD:
          s = (i & ~3) | (q->arg & 3);
          break;
        case MSL_QXOR:
          s = (i & ~3) | ((i ^ q->arg) & 3);
          break;
        case MSL_QDOWN:
          s = (i & 3) + q->arg > 3 ? i : i + q->arg;
          break;
        case MSL_QUP:
          s = (i & 3) - q->arg < 0 ? i : i - q->arg;
          break;
      }
      if (s >= 0 && s < 32 && p[s])
        r[i] = fill ? ((msl_ps<T>*)p[s])->fill : ((msl_ps<T>*)p[s])->v;
      else
        __builtin_memset(&r[i], 0xFF, sizeof(T));  // undefined in Metal: poison
    }
  for (int i = 0; i < 32; i++)
    if (p[i]) ((msl_ps<T>*)p[i])->v = r[i];
}
#define MSL_SHUF(name, K)                               \
  template <class T>                                    \
  METAL_FUNC T name(T x, ushort a, MSL_HERE) {          \
    msl_ps<T> p{x, x, a, 32};                           \
    msl_simd(&p, msl_xshuf<T, K>, #name, msl_f, msl_l); \
    return p.v;                                         \
  }
MSL_SHUF(simd_shuffle, MSL_ABS)
MSL_SHUF(simd_broadcast, MSL_ABS)
MSL_SHUF(simd_shuffle_down, MSL_DOWN) MSL_SHUF(simd_shuffle_up, MSL_UP) MSL_SHUF(simd_shuffle_xor, MSL_XOR)
    MSL_SHUF(simd_shuffle_rotate_down, MSL_RDOWN) MSL_SHUF(simd_shuffle_rotate_up, MSL_RUP)
        MSL_SHUF(quad_broadcast, MSL_QUAD) MSL_SHUF(quad_shuffle, MSL_QUAD) MSL_SHUF(quad_shuffle_xor, MSL_QXOR)
            MSL_SHUF(quad_shuffle_down, MSL_QDOWN) MSL_SHUF(quad_shuffle_up, MSL_QUP) template <class T>
            METAL_FUNC T simd_broadcast_first(T x, MSL_HERE) {
  msl_ps<T> p{x, x, 0, 32};
  msl_simd(&p, msl_xshuf<T, MSL_FIRST>, "simd_broadcast_first", msl_f, msl_l);
  return p.v;
}
template <class T>
METAL_FUNC T simd_shuffle_and_fill_down(T x, T f, ushort d, ushort mod = 32, MSL_HERE) {
  msl_ps<T> p{x, f, d, mod};
  msl_simd(&p, msl_xshuf<T, MSL_FDOWN>, "simd_shuffle_and_fill_down", msl_f, msl_l);
  return p.v;
}
template <class T>
METAL_FUNC T simd_shuffle_and_fill_up(T x, T f, ushort d, ushort mod = 32, MSL_HERE) {
  msl_ps<T> p{x, f, d, mod};
  msl_simd(&p, msl_xshuf<T, MSL_FUP>, "simd_shuffle_and_fill_up", msl_f, msl_l);
  return p.v;
}
template <class T>
METAL_FUNC T quad_sum(T x, MSL_HERE) {
  x = (T)(x + quad_shuffle_xor(x, 1, msl_f, msl_l));
  return (T)(x + quad_shuffle_xor(x, 2, msl_f, msl_l));
}
template <class T>
METAL_FUNC T quad_max(T x, MSL_HERE) {
  x = msl_max(x, quad_shuffle_xor(x, 1, msl_f, msl_l));
  return msl_max(x, quad_shuffle_xor(x, 2, msl_f, msl_l));
}
template <class T>
METAL_FUNC T quad_min(T x, MSL_HERE) {
  x = msl_min(x, quad_shuffle_xor(x, 1, msl_f, msl_l));
  return msl_min(x, quad_shuffle_xor(x, 2, msl_f, msl_l));
}
MSL_RT inline void msl_xball(void** p, uint32_t m, int) {
  ulong b = 0;
  for (int i = 0; i < 32; i++)
    if (p[i] && ((msl_p1<ulong>*)p[i])->v) b |= 1ul << i;
  for (int i = 0; i < 32; i++)
    if (p[i]) ((msl_p1<ulong>*)p[i])->v = b | (ulong)m << 32;
}
METAL_FUNC ulong msl_ballot(bool c, const char* n, const char* f, int l) {
  msl_p1<ulong> p{c};
  msl_simd(&p, msl_xball, n, f, l);
  return p.v;
}
struct simd_vote {
  ulong v;
  METAL_FUNC explicit operator ulong() const { return v; }
  METAL_FUNC bool all() const { return v == 0xFFFFFFFFu; }
  METAL_FUNC bool any() const { return v != 0; }
};
METAL_FUNC simd_vote simd_ballot(bool c, MSL_HERE) {
  return {msl_ballot(c, "simd_ballot", msl_f, msl_l) & 0xFFFFFFFFu};
}
METAL_FUNC bool simd_all(bool c, MSL_HERE) {
  ulong b = msl_ballot(c, "simd_all", msl_f, msl_l);
  return (uint)b == (uint)(b >> 32);
}
METAL_FUNC bool simd_any(bool c, MSL_HERE) { return (uint)msl_ballot(c, "simd_any", msl_f, msl_l) != 0; }
METAL_FUNC bool simd_is_first(MSL_HERE) {
  uint m = (uint)(msl_ballot(true, "simd_is_first", msl_f, msl_l) >> 32);
  return (uint)__builtin_ctz(m) == msl_cur->lane;
}
}  // namespace metal
