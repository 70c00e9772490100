// What a custom CUDA kernel of MLX finds before its text, on the emulator: CUDA's words by the primitives of Metal's.
// Metal's own words are not known here, so that whatever the rewriter left over does not compile.
#pragma once
#include "msl.h"
#undef device
#undef constant
#undef threadgroup
#undef thread
#undef kernel
#undef METAL_FUNC
#undef NAN
#undef __METAL__
#undef __METAL_VERSION__

#define __global__
#define __device__
#define __grid_constant__
#define MSL_SHARED(slot, name, ...) auto& name = msl_shared<__VA_ARGS__>(slot, #name)

typedef _Float16 __half;
typedef __bf16 __nv_bfloat16;
using metal::exp;
using metal::min;

struct dim3 {
  uint x, y, z;
  MSL_RT dim3(uint a, uint b, uint c) : x(a), y(b), z(c) {}
  MSL_RT dim3(const uint* p) : x(p[0]), y(p[1]), z(p[2]) {}
};
MSL_RT inline dim3 msl_thread_index() { return msl_cur->tp; }
MSL_RT inline dim3 msl_block_index() { return msl_cur->tgp; }
MSL_RT inline dim3 msl_block_size() { return msl_cur->dtsz; }
MSL_RT inline dim3 msl_grid_size() { return msl_cur->ngroups; }
#define threadIdx msl_thread_index()
#define blockIdx msl_block_index()
#define blockDim msl_block_size()
#define gridDim msl_grid_size()

template <class A>
MSL_RT inline A& msl_shared(int slot, const char* name) {
  return *(A*)msl_tg_alloc(slot, sizeof(A), 16, name);
}

// Both barriers order every memory.
inline void __syncthreads(MSL_HERE) { msl_barrier(3, msl_f, msl_l); }
inline void __syncwarp(MSL_HERE) {
  metal::msl_pbar both{3};
  msl_simd(&both, metal::msl_xbar, "__syncwarp", msl_f, msl_l);
}
template <class T>
inline T __shfl_xor_sync(uint mask, T value, int lanes, MSL_HERE) {
  if (mask != 0xffffffffu) return __builtin_nanf("");  // the emulator asks for all lanes
  return metal::simd_shuffle_xor(value, (ushort)lanes, msl_f, msl_l);
}
inline float __uint_as_float(uint bits) { return __builtin_bit_cast(float, bits); }
inline float __int_as_float(int bits) { return __builtin_bit_cast(float, bits); }

namespace mlx::core::cu {
struct Shape {  // as long as any array has dimensions
  int32_t sizes[10];
  MSL_RT const int32_t& operator[](int i) const { return sizes[i]; }
};
}  // namespace mlx::core::cu
