// Stand-in for MLX's complex.h: its constructors are overloaded on the address space of `this`,
// which clang's C++ mode cannot express. LoRA kernels use no complex numbers.
#pragma once
#include <metal_stdlib>
#include "mlx/backend/metal/kernels/bf16.h"
using namespace metal;
template <typename T>
struct complex_t {
  T real, imag;
  constexpr complex_t() : real(0), imag(0) {}
  constexpr complex_t(T r, T i) : real(r), imag(i) {}
  constexpr complex_t(T r) : real(r), imag(0) {}
};
typedef complex_t<float> complex64_t;
