// MLX includes it before every custom CUDA kernel; ours use none of it.
#pragma once
namespace cooperative_groups {}
