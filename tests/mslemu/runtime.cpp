// Executes one Metal dispatch on the CPU: one fiber per thread, simdgroups of 32, threadgroups one after another.
// Compiled once, not instrumented, and linked with the instrumented kernel: every load and store of a kernel arrives in
// the __tsan_* functions below (clang's callbacks, our checks). Stops at one dispatch; Python prepares the buffers.
#include <stdint.h>
#include <stdio.h>
#include <stdarg.h>
#include <string.h>
#include <stdlib.h>
#include <sys/mman.h>
#include "rt.h"

extern "C" char __ehdr_start __attribute__((visibility("hidden")));
extern "C" char _end __attribute__((visibility("hidden")));

// ---------------------------------------------------------------- fibers
extern "C" void msl_switch(void** save, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.globl msl_switch
.hidden msl_switch
.type msl_switch,@function
msl_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#else
#error "mslemu switches stacks in x86-64 assembly; on arm64 run the tests on Metal itself"
#endif

namespace {
constexpr size_t STACK = 128 * 1024;
constexpr int MAXT = 1024;
constexpr size_t TGMEM = 32 * 1024;  // Apple limit for static threadgroup memory
constexpr size_t TGRED = 64;         // redzone between threadgroup variables
constexpr size_t TGCAP = 256 * 1024;
constexpr int LINE = 128;  // Apple GPU cache line

enum State : uint8_t { READY, AT_SIMD, AT_BARRIER, DONE };

struct Fiber {
  void* sp;
  State st;
  msl_thread th;
  msl_simd_req req;
  const char* bfile;
  int bline;
  int bflags;
};
struct Shadow {
  uint32_t we, ws, re, rs;
  uint32_t rmask, gen;
  uint16_t wt, rt;
  uint8_t atomic_, pad[3];
};

Fiber F[MAXT];
char* stacks;
int NT, NSG;
void* sched_sp;
Fiber* cur;
msl_launch_args* L;
uint32_t ready[MAXT];
int nready;
uint64_t rng;
uint32_t epoch_tg, epoch_dev, epoch_ctr, tgserial;
uint32_t esg_tg[32], esg_dev[32];
char* tgmem;
Shadow* tgsh;
size_t tgtop, tgused;
struct TgVar {
  size_t off, size;
  const char* name;
  int slot;
} tgv[64];
int ntgv;
Shadow* bufsh[MSL_MAXBUF];
uint32_t* linegen[MSL_MAXBUF];
bool failed;

uint64_t rnd() {
  rng ^= rng << 13;
  rng ^= rng >> 7;
  rng ^= rng << 17;
  return rng;
}

void yield_to_sched() {
  Fiber* f = cur;
  msl_switch(&f->sp, sched_sp);
}

void report(const void* pc, const char* fmt, ...) {
  if (L->nerr < MSL_MAXERR) {
    msl_err& e = L->err[L->nerr];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(e.msg, sizeof e.msg, fmt, ap);
    va_end(ap);
    e.pc = pc ? (uint64_t)((char*)pc - &__ehdr_start) : 0;
    if (cur) {
      e.tid = cur->th.tid;
      memcpy(e.tg, cur->th.tgp, sizeof e.tg);
    } else
      e.tid = -1;
  }
  L->nerr++;
}
[[noreturn]] void die() {
  failed = true;
  for (;;) yield_to_sched();
}

void make_ready(int t) {
  F[t].st = READY;
  ready[nready++] = t;
}
void unready_at(int k) { ready[k] = ready[--nready]; }

// Coalescing: what one instruction asks of one buffer in all lanes of a simdgroup at once, the n-th time it runs.
// Lanes run one by one here, so accesses are recorded and grouped by (instruction, simdgroup, n) afterwards.
struct Touch {
  uint64_t key;   // instruction and n
  uint32_t line;  // of the buffer
  uint16_t sg, buf;
};
Touch* touches;
size_t ntouch, touchcap;
constexpr int SITES = 256;
struct Site {
  const void* pc;
  uint32_t n;
};
Site (*sites)[SITES];  // per thread: how often each instruction ran

void touch(int buf, const void* pc, size_t first, size_t last) {
  Site* mine = sites[cur->th.tid];
  uint32_t h = (uint32_t)((uintptr_t)pc * 2654435761u) % SITES;
  for (int tries = 0; mine[h].pc && mine[h].pc != pc; h = (h + 1) % SITES)
    if (++tries == SITES) return;
  mine[h].pc = pc;
  uint64_t key = (uint64_t)(uintptr_t)pc << 20 ^ mine[h].n++;
  for (size_t l = first; l <= last; l++) {
    if (ntouch == touchcap)
      touches = (Touch*)realloc(touches, (touchcap = touchcap ? 2 * touchcap : 65536) * sizeof(Touch));
    touches[ntouch++] = {key, (uint32_t)l, (uint16_t)cur->th.sg, (uint16_t)buf};
  }
}
int by_touch(const void* pa, const void* pb) { return memcmp(pa, pb, sizeof(Touch)); }
void count_transactions() {
  qsort(touches, ntouch, sizeof(Touch), by_touch);
  for (size_t i = 0; i < ntouch; i++)
    if (!i || by_touch(touches + i - 1, touches + i)) L->buf[touches[i].buf].transactions++;
  ntouch = 0;
  memset(sites, 0, sizeof(Site) * SITES * MAXT);
}
}  // namespace

// ---------------------------------------------------------------- services used by the shim
extern "C" {
msl_thread* msl_cur;
void msl_simd(void* pay, msl_simd_fn fn, const char* name, const char* file, int line) {
  cur->req = {pay, fn, name, file, line};
  cur->st = AT_SIMD;
  yield_to_sched();
}
void msl_barrier(int flags, const char* file, int line) {
  cur->bflags = flags;
  cur->bfile = file;
  cur->bline = line;
  cur->st = AT_BARRIER;
  yield_to_sched();
}
// The order in which a reduction takes the lanes: random under the random schedule.
void msl_lane_order(int* order) {
  for (int i = 0; i < 32; i++) order[i] = i;
  if (L->sched != 1) return;
  for (int i = 31; i > 0; i--) {
    int j = (int)(rnd() % (i + 1)), t = order[i];
    order[i] = order[j];
    order[j] = t;
  }
}
// Called by the exec function of simdgroup_barrier once all lanes have arrived.
void msl_simd_fence(int sg, int flags) {
  if (flags & 2) esg_tg[sg] = ++epoch_ctr;
  if (flags & 1) esg_dev[sg] = ++epoch_ctr;
}
void* msl_tg_alloc(int slot, size_t size, size_t align, const char* name) {
  for (int i = 0; i < ntgv; i++)
    if (tgv[i].slot == slot) return tgmem + tgv[i].off;
  size_t off = (tgtop + TGRED + align - 1) / align * align;
  if (off + size + TGRED > TGCAP || ntgv == 64) {
    report(__builtin_return_address(0), "threadgroup memory exhausted at '%s'", name);
    die();
  }
  tgv[ntgv++] = {off, size, name, slot};
  tgtop = off + size;
  tgused += size;
  if (tgused > L->tg_bytes) L->tg_bytes = tgused;
  if (tgused > TGMEM) {
    report(__builtin_return_address(0), "static threadgroup memory %zu B exceeds 32768 B", tgused);
    die();
  }
  return tgmem + off;
}
}

static inline const char* bname(int i) { return L->buf[i].name ? L->buf[i].name : "?"; }

static inline bool ordered(const Fiber* f, uint16_t pt, uint32_t pe, uint32_t ps, uint32_t E, const uint32_t* ES) {
  if (pt == f->th.tid) return true;
  if (pe != E) return true;
  return (pt / 32 == f->th.sg) && ps != ES[f->th.sg];
}

// kind: 0 read, 1 write, 2 atomic
static void shadow_access(Shadow* s, size_t n, int kind, bool dev, const void* pc, const char* what, size_t off,
                          bool waw = false) {
  Fiber* f = cur;
  uint32_t E = dev ? epoch_dev : epoch_tg;
  const uint32_t* ES = dev ? esg_dev : esg_tg;
  for (size_t i = 0; i < n; i++, s++) {
    bool live = s->gen == tgserial;  // touched in this threadgroup
    if (kind != 1) {                 // reads (and atomics) need initialised memory
      if (!(dev ? (s->gen != 0 || L->init) : (live && s->we != 0))) {
        report(pc, "read of uninitialised %s at byte %zu", what, off + i);
        die();
      }
    }
    if (dev && s->gen && s->gen != tgserial && !(kind == 2 && s->atomic_)) {
      if (kind != 0 || s->we) {
        report(pc, "race on %s byte %zu between threadgroups (no ordering inside one dispatch)", what, off + i);
        if (!L->keep_going) die();
      }
    }
    if (!live) {
      *s = Shadow{};
      s->gen = tgserial;
    }
    if (kind == 0) {
      if (s->we && !ordered(f, s->wt, s->we, s->ws, E, ES)) {
        report(pc, "data race on %s byte %zu: read by thread %d, written by thread %d with no barrier between", what,
               off + i, f->th.tid, s->wt);
        if (!L->keep_going) die();
      }
      if (s->re != E) {
        s->re = E;
        s->rmask = 0;
      }
      s->rmask |= 1u << f->th.sg;
      s->rt = f->th.tid;
      s->rs = ES[f->th.sg];
    } else {
      if (s->we && !waw && !(kind == 2 && s->atomic_) && !ordered(f, s->wt, s->we, s->ws, E, ES)) {
        report(pc, "data race on %s byte %zu: written by thread %d and thread %d with no barrier between", what,
               off + i, f->th.tid, s->wt);
        if (!L->keep_going) die();
      }
      if (s->re == E && s->rmask) {
        bool other = (s->rmask & ~(1u << f->th.sg)) != 0;
        bool same =
            (s->rmask & (1u << f->th.sg)) && (s->rt / 32 == f->th.sg) && s->rt != f->th.tid && s->rs == ES[f->th.sg];
        if (other || same) {
          report(pc,
                 "data race on %s byte %zu: written by thread %d while another thread (%d) reads it with no barrier "
                 "between",
                 what, off + i, f->th.tid, s->rt);
          if (!L->keep_going) die();
        }
      }
      s->we = E;
      s->ws = ES[f->th.sg];
      s->wt = f->th.tid;
      s->atomic_ = kind == 2;
    }
  }
}

static __attribute__((noinline)) void slow_access(uintptr_t a, size_t n, int kind, const void* pc, bool aligned) {
  uintptr_t t0 = (uintptr_t)tgmem;
  if (a >= t0 && a < t0 + TGCAP) {
    size_t off = a - t0;
    for (int i = 0; i < ntgv; i++)
      if (off >= tgv[i].off && off + n <= tgv[i].off + tgv[i].size) {
        (kind ? L->tg_w : L->tg_r) += n;
        if (L->check_races) shadow_access(tgsh + off, n, kind, false, pc, tgv[i].name, off - tgv[i].off);
        return;
      }
    int near = -1;
    for (int i = 0; i < ntgv; i++)
      if (tgv[i].off <= off) near = i;
    report(pc, "out-of-bounds %s of %zu B in threadgroup memory (near '%s', offset %zd of %zu)",
           kind ? "write" : "read", n, near >= 0 ? tgv[near].name : "?",
           near >= 0 ? (ssize_t)(off - tgv[near].off) : -1, near >= 0 ? tgv[near].size : 0);
    die();
  }
  static int last;
  int k = -1;
  if (last < L->nbuf && a >= L->buf[last].lo && a + n <= L->buf[last].hi)
    k = last;
  else
    for (int i = 0; i < L->nbuf; i++)
      if (a >= L->buf[i].lo && a + n <= L->buf[i].hi) {
        k = last = i;
        break;
      }
  if (k >= 0) {
    msl_buf& b = L->buf[k];
    size_t off = a - b.lo;
    if (kind) {
      if (!b.writable) {
        report(pc, "write to read-only input '%s'", bname(k));
        die();
      }
      b.w_bytes += n;
    } else
      b.r_bytes += n;
    b.n_access++;
    if (aligned && n > 1 && n <= 16 && (a & (n - 1))) {
      report(pc, "misaligned %zu B access to '%s' at byte %zu", n, bname(k), off);
      if (!L->keep_going) die();
    }
    uint32_t* lg = linegen[k];
    for (size_t l = off / LINE; l <= (off + n - 1) / LINE; l++) {
      if (!lg[l]) b.lines_unique++;
      if (lg[l] != tgserial) {
        lg[l] = tgserial;
        b.lines_tg++;
      }
    }
    if (L->coalescing) touch(k, pc, off / LINE, (off + n - 1) / LINE);
    if (b.writable && L->check_races) shadow_access(bufsh[k] + off, n, kind, true, pc, bname(k), off, b.allow_waw);
    return;
  }
  if (a >= (uintptr_t)&__ehdr_start && a < (uintptr_t)&_end) return;  // constant tables in the image
  if (a >= (uintptr_t)stacks && a < (uintptr_t)stacks + STACK * MAXT) {
    report(pc, "access to another thread's private memory");
    die();
  }
  int near = -1;
  for (int i = 0; i < L->nbuf; i++)
    if (a >= L->buf[i].lo && (near < 0 || L->buf[i].lo > L->buf[near].lo)) near = i;
  if (near < 0) near = 0;
  report(pc, "out-of-bounds %s of %zu B: nearest buffer '%s' (%zu B) at byte offset %lld", kind ? "write" : "read", n,
         bname(near), (size_t)(L->buf[near].hi - L->buf[near].lo), (long long)(a - L->buf[near].lo));
  die();
}

static inline __attribute__((always_inline)) void access(void* p, size_t n, int kind, const void* pc,
                                                         bool aligned = false) {
  uintptr_t a = (uintptr_t)p;
  if (a - (uintptr_t)cur->th.stack_lo < STACK) return;  // private memory
  slow_access(a, n, kind, pc, aligned);
}
extern "C" {
#define RW(N)                                                                               \
  void __tsan_read##N(void* p) { access(p, N, 0, __builtin_return_address(0), true); }      \
  void __tsan_write##N(void* p) { access(p, N, 1, __builtin_return_address(0), true); }     \
  void __tsan_read_write##N(void* p) {                                                      \
    access(p, N, 0, __builtin_return_address(0));                                           \
    access(p, N, 1, __builtin_return_address(0));                                           \
  }                                                                                         \
  void __tsan_unaligned_read##N(void* p) { access(p, N, 0, __builtin_return_address(0)); }  \
  void __tsan_unaligned_write##N(void* p) { access(p, N, 1, __builtin_return_address(0)); } \
  void __tsan_unaligned_read_write##N(void* p) {                                            \
    access(p, N, 0, __builtin_return_address(0));                                           \
    access(p, N, 1, __builtin_return_address(0));                                           \
  }
RW(1) RW(2) RW(4) RW(8) RW(16) void __tsan_read_range(void* p, size_t n) {
  access(p, n, 0, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t n) { access(p, n, 1, __builtin_return_address(0)); }
void* __tsan_memcpy(void* d, const void* s, size_t n) {
  access((void*)s, n, 0, __builtin_return_address(0));
  access(d, n, 1, __builtin_return_address(0));
  return memcpy(d, s, n);
}
void* __tsan_memmove(void* d, const void* s, size_t n) {
  access((void*)s, n, 0, __builtin_return_address(0));
  access(d, n, 1, __builtin_return_address(0));
  return memmove(d, s, n);
}
void* __tsan_memset(void* d, int c, size_t n) {
  access(d, n, 1, __builtin_return_address(0));
  return memset(d, c, n);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void msl_atomic_access(void* p, size_t n) {
  L->n_atomic++;
  access(p, n, 2, __builtin_return_address(0));
}
}

// ---------------------------------------------------------------- scheduler
static void fiber_main() {
  L->entry(L->ptrs, &cur->th);
  cur->st = DONE;
  for (;;) yield_to_sched();
}
static void prep_fiber(int t) {
  char* lo = stacks + (size_t)t * STACK;
  char* hi = lo + STACK;
  F[t].th.stack_lo = lo;
  void** sp = (void**)(hi - 64);
  *--sp = 0;
  *--sp = (void*)fiber_main;  // return address; keeps rsp%16==8 at entry
  for (int i = 0; i < 6; i++) *--sp = 0;
  F[t].sp = sp;
}
static void exec_simd(int sg, uint32_t mask) {
  void* pays[32];
  Fiber* any = 0;
  for (int l = 0; l < 32; l++) {
    pays[l] = (mask >> l & 1) ? F[sg * 32 + l].req.pay : 0;
    if (pays[l]) any = &F[sg * 32 + l];
  }
  cur = any;
  L->n_simd++;
  any->req.fn(pays, mask, sg);
  cur = 0;
  for (int i = 0; i < 32; i++) {
    int l = L->sched == 2 ? i : 31 - i;
    if (mask >> l & 1) make_ready(sg * 32 + l);
  }
}
static bool same_site(const msl_simd_req& a, const msl_simd_req& b) {
  return a.fn == b.fn && a.line == b.line && (a.file == b.file || !strcmp(a.file, b.file));
}
// all lanes of a simdgroup are blocked: run the op if they agree
static int try_simd(int sg, bool force) {
  int lo = sg * 32, hi = lo + 32 < NT ? lo + 32 : NT;
  uint32_t at = 0, live = 0;
  int first = -1;
  for (int t = lo; t < hi; t++) {
    live |= 1u << (t - lo);  // lanes that have returned count: their part in the operation is missing
    if (F[t].st == AT_SIMD) {
      at |= 1u << (t - lo);
      if (first < 0 || F[t].req.line < F[first].req.line) first = t;
    }
    if (F[t].st == READY) return 0;
  }
  if (!at) return 0;
  uint32_t grp = 0;
  for (int t = lo; t < hi; t++)
    if (F[t].st == AT_SIMD && same_site(F[t].req, F[first].req)) grp |= 1u << (t - lo);
  if (grp != live && !force) return 0;
  if (grp != live) {
    L->n_divergent++;
    if (!L->allow_divergent) {
      cur = &F[first];
      report(0, "divergent simdgroup operation %s at %s:%d: lanes %08x of %08x take part", F[first].req.name,
             F[first].req.file, F[first].req.line, grp, live);
      cur = 0;
      failed = true;
      return -1;
    }
  }
  exec_simd(sg, grp);
  return 1;
}
static void run_tg(uint32_t gx, uint32_t gy, uint32_t gz) {
  uint32_t T[3], G[3] = {gx, gy, gz};
  for (int d = 0; d < 3; d++) {
    uint32_t left = L->grid[d] - G[d] * L->tg[d];
    T[d] = left < L->tg[d] ? left : L->tg[d];
  }
  NT = T[0] * T[1] * T[2];
  NSG = (NT + 31) / 32;
  tgserial++;
  epoch_tg = epoch_dev = ++epoch_ctr;
  for (int i = 0; i < 32; i++) esg_tg[i] = esg_dev[i] = epoch_ctr;
  // Threadgroup memory keeps whatever the last threadgroup left on real hardware: poison it instead.
  memset(tgmem, L->poison, tgtop + TGRED < TGCAP ? tgtop + TGRED : TGCAP);
  if (!tgtop) memset(tgmem, L->poison, TGCAP);
  nready = 0;
  for (int t = 0; t < NT; t++) {
    Fiber& f = F[t];
    uint32_t x = t % T[0], y = t / T[0] % T[1], z = t / (T[0] * T[1]);
    f.th.tid = t;
    f.th.lane = t % 32;
    f.th.sg = t / 32;
    f.th.nsg = NSG;
    uint32_t p[3] = {x, y, z};
    for (int d = 0; d < 3; d++) {
      f.th.tp[d] = p[d];
      f.th.tgp[d] = G[d];
      f.th.gp[d] = G[d] * L->tg[d] + p[d];
      f.th.tsz[d] = T[d];
      f.th.dtsz[d] = L->tg[d];
      f.th.gsz[d] = L->grid[d];
      f.th.ngroups[d] = (L->grid[d] + L->tg[d] - 1) / L->tg[d];
    }
    f.th.dnsg = (L->tg[0] * L->tg[1] * L->tg[2] + 31) / 32;
    prep_fiber(t);
  }
  for (int i = 0; i < NT; i++) make_ready(L->sched == 2 ? i : NT - 1 - i);
  int live = NT;
  while (live > 0) {
    if (nready) {
      int k;
      k = L->sched == 1 ? (int)(rnd() % nready) : nready - 1;
      int t = ready[k];
      unready_at(k);
      cur = &F[t];
      msl_cur = &cur->th;
      msl_switch(&sched_sp, cur->sp);
      cur = 0;
      if (failed) return;
      if (F[t].st == DONE) live--;
      if (F[t].st == AT_SIMD || F[t].st == DONE)
        if (try_simd(t / 32, false) < 0) return;
      continue;
    }
    // nothing is ready
    bool progress = false;
    for (int s = 0; s < NSG; s++) {
      int r = try_simd(s, true);
      if (r < 0) return;
      if (r > 0) progress = true;
    }
    if (progress) continue;
    // everyone left is at a threadgroup barrier
    int first = -1, n = 0;
    bool mismatch = false;
    for (int t = 0; t < NT; t++)
      if (F[t].st == AT_BARRIER) {
        n++;
        if (first < 0)
          first = t;
        else if (F[t].bline != F[first].bline || strcmp(F[t].bfile, F[first].bfile))
          mismatch = true;
      }
    if (n != NT || mismatch) {
      cur = &F[first];
      report(0, "threadgroup_barrier at %s:%d not reached by every thread of the threadgroup (%d of %d%s)",
             F[first].bfile, F[first].bline, n, NT, mismatch ? ", different barriers" : "");
      cur = 0;
      failed = true;
      return;
    }
    L->n_barrier++;
    if (F[first].bflags & 2) {
      epoch_tg = ++epoch_ctr;
      for (int i = 0; i < 32; i++) esg_tg[i] = epoch_tg;
    }
    if (F[first].bflags & 1) {
      epoch_dev = ++epoch_ctr;
      for (int i = 0; i < 32; i++) esg_dev[i] = epoch_dev;
    }
    for (int i = 0; i < NT; i++) make_ready(L->sched == 2 ? i : NT - 1 - i);
  }
}

extern "C" __attribute__((visibility("default"))) int msl_launch(msl_launch_args* a) {
  L = a;
  failed = false;
  cur = 0;
  tgserial = 0;
  epoch_ctr = 0;
  rng = a->seed * 0x9E3779B97F4A7C15ull | 1;
  ntgv = 0;
  tgtop = tgused = 0;
  if (!stacks) {
    sites = (Site(*)[SITES])calloc(MAXT, sizeof *sites);
    stacks = (char*)mmap(0, STACK * MAXT, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    tgmem = (char*)mmap(0, TGCAP, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    tgsh = (Shadow*)mmap(0, TGCAP * sizeof(Shadow), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                         -1, 0);
  }
  madvise(tgsh, TGCAP * sizeof(Shadow), MADV_DONTNEED);
  if ((uint64_t)a->tg[0] * a->tg[1] * a->tg[2] > MAXT) {
    report(0, "threadgroup of %u threads exceeds 1024", a->tg[0] * a->tg[1] * a->tg[2]);
    return 1;
  }
  for (int i = 0; i < a->nbuf; i++) {
    size_t n = a->buf[i].hi - a->buf[i].lo;
    linegen[i] = (uint32_t*)calloc(n / LINE + 2, 4);
    bufsh[i] = a->buf[i].writable && a->check_races ? (Shadow*)mmap(0, (n + 1) * sizeof(Shadow), PROT_READ | PROT_WRITE,
                                                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
                                                    : 0;
  }
  uint32_t n[3];
  for (int d = 0; d < 3; d++) n[d] = (a->grid[d] + a->tg[d] - 1) / a->tg[d];
  uint64_t total = (uint64_t)n[0] * n[1] * n[2];
  uint64_t step = 1, start = 0;
  if (a->sched == 1 && total > 1) {  // visit the threadgroups in a random order: full-period step
    start = rnd() % total;
    step = 1 + rnd() % total;
    auto g = [](uint64_t x, uint64_t y) {
      while (y) {
        uint64_t r = x % y;
        x = y;
        y = r;
      }
      return x;
    };
    while (g(step, total) != 1) step++;
  }
  for (uint64_t i = 0, k = start; i < total && !failed; i++, k = (k + step) % total) {
    run_tg(k % n[0], k / n[0] % n[1], k / n[0] / n[1]);
    if (a->coalescing) count_transactions();
  }
  a->n_tg = total;
  for (int i = 0; i < a->nbuf; i++) {
    if (bufsh[i]) {
      size_t nb = a->buf[i].hi - a->buf[i].lo;
      size_t un = 0;
      long long firstb = -1;
      for (size_t j = 0; j < nb; j++)
        if (!bufsh[i][j].we) {
          if (firstb < 0) firstb = j;
          un++;
        }
      a->buf[i].unwritten = un;
      a->buf[i].first_unwritten = firstb;
      munmap(bufsh[i], (nb + 1) * sizeof(Shadow));
    }
    free(linegen[i]);
  }
  // Every compiled kernel carries a runtime of its own: give the pages of the stacks back.
  madvise(stacks, STACK * MAXT, MADV_DONTNEED);
  return a->nerr;
}

// float -> bfloat16 rounding that clang calls (libgcc < 13 lacks it)
extern "C" __attribute__((weak)) __bf16 __truncsfbf2(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  uint16_t h =
      (u & 0x7fffffff) > 0x7f800000 ? (uint16_t)((u >> 16) | 0x40) : (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  __bf16 r;
  memcpy(&r, &h, 2);
  return r;
}
extern "C" __attribute__((weak)) __bf16 __truncdfbf2(double x) { return __truncsfbf2((float)x); }
