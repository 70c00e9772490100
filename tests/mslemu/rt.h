#pragma once
#include <stdint.h>
#include <stddef.h>
#define MSL_MAXBUF 32
#define MSL_MAXERR 8
struct msl_thread {  // what a kernel can ask about itself
  char* stack_lo;
  uint32_t tid, lane, sg, nsg, dnsg;
  uint32_t tp[3], tgp[3], gp[3], tsz[3], dtsz[3], gsz[3], ngroups[3];
};
typedef void (*msl_simd_fn)(void** pays, uint32_t mask, int sg);
struct msl_simd_req {
  void* pay;
  msl_simd_fn fn;
  const char* name;
  const char* file;
  int line;
};
struct msl_buf {
  uint64_t lo, hi;
  int32_t writable, allow_waw;
  const char* name;
  uint64_t r_bytes, w_bytes, n_access, lines_tg, lines_unique, unwritten, transactions;
  int64_t first_unwritten;
};
struct msl_err {
  char msg[400];
  uint64_t pc;
  int32_t tid;
  uint32_t tg[3];
};
struct msl_launch_args {
  void (*entry)(void** bufs, msl_thread* t);
  void** ptrs;
  uint32_t grid[3], tg[3];
  uint64_t seed;
  int32_t sched, poison, check_races, allow_divergent, keep_going, init, coalescing, nbuf, nerr, pad;
  uint64_t n_tg, n_simd, n_barrier, n_divergent, n_atomic, tg_bytes, tg_r, tg_w;
  msl_buf buf[MSL_MAXBUF];
  msl_err err[MSL_MAXERR];
};
extern "C" {
extern msl_thread* msl_cur;
void msl_simd(void* pay, msl_simd_fn fn, const char* name, const char* file, int line);
void msl_barrier(int flags, const char* file, int line);
void msl_simd_fence(int sg, int flags);
void* msl_tg_alloc(int slot, size_t size, size_t align, const char* name);
void msl_atomic_access(void* p, size_t n);
void msl_lane_order(int* order);
int msl_launch(msl_launch_args* a);
}
