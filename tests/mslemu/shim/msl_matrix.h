// simdgroup_matrix (8x8), in the lane layout that MLX's steel/gemm/mma.h relies on.
#pragma once
#include "msl_simd.h"

namespace metal {
template <class T, int R, int C>
struct simdgroup_matrix {
  vec<T, 2> e;
  METAL_FUNC simdgroup_matrix() { __builtin_memset(&e, 0xFF, sizeof e); }
  METAL_FUNC explicit simdgroup_matrix(T d) {
    for (int j = 0; j < 2; j++) e[j] = row() == col() + j ? d : (T)0;
  }
  METAL_FUNC vec<T, 2>& thread_elements() { return e; }
  METAL_FUNC const vec<T, 2>& thread_elements() const { return e; }
  METAL_FUNC static int row() {
    int l = msl_cur->lane, q = l / 4;
    return (q & 4) + (l / 2) % 4;
  }
  METAL_FUNC static int col() {
    int l = msl_cur->lane, q = l / 4;
    return (q & 2) * 2 + (l % 2) * 2;
  }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;
template <class T, int R, int C>
METAL_FUNC simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T v) {
  simdgroup_matrix<T, R, C> m;
  m.e = v;
  return m;
}
MSL_RT inline void msl_xnop(void**, uint32_t, int) {}
template <class T, int R, int C, class P>
METAL_FUNC void msl_sgload(simdgroup_matrix<T, R, C>& d, P src, ulong ld, ulong2 o, bool tr, const char* f, int l) {
  char c;
  msl_simd(&c, msl_xnop, "simdgroup_load", f, l);
  for (int j = 0; j < 2; j++) {
    ulong r = d.row(), k = d.col() + j;
    d.e[j] = tr ? src[(o.y + k) * ld + o.x + r] : src[(o.y + r) * ld + o.x + k];
  }
}
template <class T, int R, int C, class P>
METAL_FUNC void msl_sgstore(const simdgroup_matrix<T, R, C>& d, P dst, ulong ld, ulong2 o, bool tr, const char* f,
                            int l) {
  char c;
  msl_simd(&c, msl_xnop, "simdgroup_store", f, l);
  for (int j = 0; j < 2; j++) {
    ulong r = d.row(), k = d.col() + j;
    (tr ? dst[(o.y + k) * ld + o.x + r] : dst[(o.y + r) * ld + o.x + k]) = d.e[j];
  }
}
#define MSL_SGLS(AS)                                                                                   \
  template <class T, int R, int C>                                                                     \
  METAL_FUNC void simdgroup_load(simdgroup_matrix<T, R, C>& d, const AS msl_nd<T>* src, ulong ld = C,  \
                                 ulong2 o = ulong2{0, 0}, bool tr = false, MSL_HERE) {                 \
    msl_sgload(d, src, ld, o, tr, msl_f, msl_l);                                                       \
  }                                                                                                    \
  template <class T, int R, int C>                                                                     \
  METAL_FUNC void simdgroup_store(const simdgroup_matrix<T, R, C>& d, AS msl_nd<T>* dst, ulong ld = C, \
                                  ulong2 o = ulong2{0, 0}, bool tr = false, MSL_HERE) {                \
    msl_sgstore(d, dst, ld, o, tr, msl_f, msl_l);                                                      \
  }
MSL_SGLS(MSL_DEV)
MSL_SGLS(MSL_TG)
struct msl_pmma {
  float a[2], b[2], c[2];
};
MSL_RT inline void msl_xmma(void** p, uint32_t m, int) {
  float A[8][8], B[8][8], D[8][8];
  for (int l = 0; l < 32; l++) {
    int q = l / 4, r = (q & 4) + (l / 2) % 4, c = (q & 2) * 2 + (l % 2) * 2;
    for (int j = 0; j < 2; j++) {
      auto* x = (msl_pmma*)p[l];
      A[r][c + j] = x ? x->a[j] : __builtin_nanf("");
      B[r][c + j] = x ? x->b[j] : __builtin_nanf("");
      D[r][c + j] = x ? x->c[j] : __builtin_nanf("");
    }
  }
  for (int i = 0; i < 8; i++)
    for (int k = 0; k < 8; k++) {
      float a = A[i][k];
      for (int j = 0; j < 8; j++) D[i][j] += a * B[k][j];
    }
  for (int l = 0; l < 32; l++)
    if (p[l]) {
      int q = l / 4, r = (q & 4) + (l / 2) % 4, c = (q & 2) * 2 + (l % 2) * 2;
      for (int j = 0; j < 2; j++) ((msl_pmma*)p[l])->c[j] = D[r][c + j];
    }
}
template <class D, class A, class B, class C>
METAL_FUNC void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                              simdgroup_matrix<B, 8, 8> b, simdgroup_matrix<C, 8, 8> c, MSL_HERE) {
  msl_pmma p{{(float)a.e[0], (float)a.e[1]}, {(float)b.e[0], (float)b.e[1]}, {(float)c.e[0], (float)c.e[1]}};
  msl_simd(&p, msl_xmma, "simdgroup_multiply_accumulate", msl_f, msl_l);
  d.e[0] = (D)p.c[0];
  d.e[1] = (D)p.c[1];
}
template <class D, class A, class B>
METAL_FUNC void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                   simdgroup_matrix<B, 8, 8> b, MSL_HERE) {
  simdgroup_matrix<D, 8, 8> z;
  z.e = (D)0;
  simdgroup_multiply_accumulate(d, a, b, z, msl_f, msl_l);
}
}  // namespace metal
