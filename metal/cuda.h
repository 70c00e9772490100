// Metal's names in CUDA, before the text of a kernel that mlx_lora/kernels/cuda.py rewrote. No kernel.
//
// Blocks are whole warps, and the lanes of a warp act together, as the Metal source says of its simdgroups.
typedef unsigned short ushort;
typedef unsigned int uint;
#ifndef NAN
#define NAN __int_as_float(0x7fc00000)
#endif
#define METAL_FUNC __device__ inline

#define LINEAR_THREAD_INDEX (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z))
#define thread_index_in_simdgroup (LINEAR_THREAD_INDEX % 32)
#define simdgroup_index_in_threadgroup (LINEAR_THREAD_INDEX / 32)
#define threadgroup_position_in_grid blockIdx
#define threadgroups_per_grid gridDim
#define thread_position_in_grid                                                             \
  dim3(blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y * blockDim.y + threadIdx.y, \
       blockIdx.z * blockDim.z + threadIdx.z)

#define threadgroup_barrier(flags) __syncthreads()
#define simdgroup_barrier(flags) __syncwarp()

template <typename T>
METAL_FUNC T as_type(uint bits);
template <>
METAL_FUNC float as_type<float>(uint bits) { return __uint_as_float(bits); }

METAL_FUNC float simd_shuffle_xor(float value, ushort lanes) { return __shfl_xor_sync(0xffffffffu, value, lanes); }

METAL_FUNC float simd_sum(float value) {
  for (int lanes = 16; lanes > 0; lanes /= 2) value += simd_shuffle_xor(value, lanes);
  return value;
}
