// Every memory access of checked code: bounds, races, uninitialised reads. The code is compiled with
// -fsanitize=thread and linked with these callbacks in place of ThreadSanitizer's runtime.
#include "state.h"

namespace sim {

// A write that meets an unordered write is held back until the next access, since the callback runs before the store:
// only then is it known whether both wrote the same value.
static struct {
  bool is_held;
  uintptr_t address, pc;
  unsigned size;
  unsigned char before[16];
  char message[800];
} pending;

static void settle_pending_write() {
  pending.is_held = false;
  bool is_same = memcmp((void*)pending.address, pending.before, pending.size) == 0;
  report(is_same ? "same-value write" : "race", pending.message, pending.pc, {nullptr, 0});
}

void finish_pending_write(bool is_aborted) {
  if (pending.is_held && !is_aborted) settle_pending_write();
  pending.is_held = false;
}

struct Access {
  uintptr_t address, pc;
  unsigned size;
  bool is_write, is_atomic;
  Fiber* fiber;
};

static bool is_same_group(unsigned a, unsigned b) { return a / 32 == b / 32; }

static void report_race(const char* what, const Access& a, const Touch& other, bool is_other_write) {
  bool is_same_threadgroup = other.serial == state.serial;
  char message[sizeof pending.message];
  snprintf(message, sizeof message, "%s: %s conflicts with %s by thread %u (simdgroup %u)%s at +0x%x; %s", what,
           describe(*a.fiber).text, is_other_write ? "a write" : "a read", other.thread, other.thread / 32,
           is_same_threadgroup ? "" : " of another threadgroup", other.pc, describe_address(a.address).text);
  if (a.is_write && is_other_write && a.size <= sizeof pending.before) {
    if (pending.is_held) return;
    pending.is_held = true;
    pending.address = a.address;
    pending.pc = a.pc;
    pending.size = a.size;
    memcpy(pending.before, (void*)a.address, a.size);
    memcpy(pending.message, message, sizeof message);
    return;
  }
  bool is_within_group = is_same_threadgroup && is_same_group(other.thread, a.fiber->thread.idx_in_tg);
  report(is_within_group ? "race within a simdgroup" : "race", message, a.pc, {nullptr, 0});
}

// Whether a barrier, or the thread itself, orders the other access before this one.
static bool is_ordered(const Touch& other, unsigned thread, uint32_t epoch, uint32_t simd_epoch) {
  if (other.serial != state.serial) return false;
  if (other.thread == thread || other.epoch != epoch) return true;
  return is_same_group(other.thread, thread) && other.simd_epoch != simd_epoch;
}

static bool are_reads_ordered(const Cell& c, unsigned thread, uint32_t epoch, uint32_t simd_epoch) {
  if (!is_ordered(c.read, thread, epoch, simd_epoch)) return false;
  bool are_several = c.readers > kOneReader && c.read.serial == state.serial && c.read.epoch == epoch;
  if (!are_several) return true;
  return c.readers == kOneSimdGroup && is_same_group(c.read.thread, thread) && c.read.simd_epoch != simd_epoch;
}

static void touch_cell(Cell& c, const Access& a, Memory memory, bool is_initialized) {
  unsigned thread = a.fiber->thread.idx_in_tg;
  uint32_t epoch = state.epoch[memory], simd_epoch = a.fiber->group->epoch[memory];
  if (memory == kThreadgroup) {  // a new threadgroup finds nothing
    if (c.write.serial != state.serial) c.is_written = 0;
    if (c.read.serial != state.serial) c.readers = kNoReader;
  }
  if (!a.is_write && !c.is_written && !is_initialized) {
    char message[800];
    snprintf(message, sizeof message, "read of memory that no thread wrote: %s; %s", describe(*a.fiber).text,
             describe_address(a.address).text);
    report("uninitialised", message, a.pc, {nullptr, 0});
  }
  if (c.is_written && !(a.is_atomic && c.write.is_atomic) && !is_ordered(c.write, thread, epoch, simd_epoch))
    report_race(a.is_write ? "write/write" : "read after write", a, c.write, true);
  if (a.is_write && c.readers && !(a.is_atomic && c.read.is_atomic) &&
      !are_reads_ordered(c, thread, epoch, simd_epoch))
    report_race("write after read", a, c.read, false);

  Touch now = {state.serial, epoch, simd_epoch, (uint32_t)(a.pc - state.module_begin), (uint16_t)thread, a.is_atomic};
  if (a.is_write) {
    c.is_written = 1;
    c.write = now;
    c.readers = kNoReader;
    return;
  }
  if (c.readers && c.read.serial == state.serial && c.read.epoch == epoch && c.read.thread != thread)
    c.readers = max<int>(c.readers, is_same_group(c.read.thread, thread) ? kOneSimdGroup : kSeveral);
  else if (c.readers && c.read.serial != state.serial)
    c.readers = kSeveral;
  else if (!c.readers || c.read.epoch != epoch)
    c.readers = kOneReader;
  c.read = now;
}

[[noreturn]] static void report_out_of_bounds(const Access& a) {
  uintptr_t in_stacks = a.address - (uintptr_t)state.stacks;
  bool is_private = in_stacks < (uintptr_t)kMaxThreads * kStackBytes;
  char message[900];
  snprintf(message, sizeof message, "%s of %u bytes: %s; %s", a.is_write ? "write" : "read", a.size,
           describe(*a.fiber).text,
           is_private ? "the private memory of another thread" : describe_address(a.address).text);
  report("out of bounds", message, a.pc, {nullptr, 0});
  abort_dispatch();
}

static void access_arena(const Access& a) {
  if (state.options.count) {
    (a.is_write ? state.counters.threadgroup_written : state.counters.threadgroup_read) += a.size;
    return;
  }
  unsigned offset = a.address - (uintptr_t)state.arena;
  for (int i = 0; i < state.n_variables; i++) {
    const Variable& v = state.variables[i];
    if (offset < v.offset || offset + a.size > v.offset + v.size) continue;
    unsigned size = v.element_size < 4 ? v.element_size : 4;  // an array of wide values may be used as one of narrow ones
    for (unsigned k = offset / size; k <= (offset + a.size - 1) / size; k++)
      touch_cell(state.arena_cells[k * size], a, kThreadgroup, v.is_zeroed);
    return;
  }
  report_out_of_bounds(a);
}

static bool access_buffer(const Access& a) {
  for (int n = 0, i = state.last_buffer; n < state.n_buffers; n++, i = i + 1 == state.n_buffers ? 0 : i + 1) {
    Buffer& b = state.buffers[i];
    if (a.address < b.begin || a.address + a.size > b.end) continue;
    state.last_buffer = i;
    if (state.options.count) {
      count_access(b, a.address, a.size, a.is_write, a.pc);
    } else if (b.flags & kWritable) {
      size_t first = (a.address - b.begin) / b.element_size, last = (a.address + a.size - 1 - b.begin) / b.element_size;
      for (size_t e = first; e <= last; e++) touch_cell(b.cells[e], a, kDevice, b.flags & kInitialized);
    } else if (a.is_write) {
      char message[800];
      snprintf(message, sizeof message, "%s; %s", describe(*a.fiber).text, describe_address(a.address).text);
      report("write to input", message, a.pc, {nullptr, 0});
    }
    return true;
  }
  return false;
}

// Memory of the compiled module and of the runtime that kernels may read: constants and facts of threads.
static bool is_internal(uintptr_t address) {
  return (address >= state.module_begin && address < state.module_end) ||
         address - (uintptr_t)state.pointers < sizeof state.pointers ||
         address - (uintptr_t)state.fibers < kMaxThreads * sizeof(Fiber) ||
         address - (uintptr_t)&msl_self < sizeof msl_self;
}

void access(uintptr_t address, unsigned size, bool is_write, bool is_atomic, uintptr_t pc) {
  Fiber* f = state.current;
  if (__builtin_expect(!f, 0) || address - f->stack < kStackBytes) return;
  state.counters.accesses++;
  if (__builtin_expect(pending.is_held, 0)) settle_pending_write();
  Access a = {address, pc, size, is_write, is_atomic, f};
  if (address - (uintptr_t)state.arena < kArenaBytes) access_arena(a);
  else if (!access_buffer(a) && !is_internal(address)) report_out_of_bounds(a);
}

}  // namespace sim

#define PC ((uintptr_t)__builtin_return_address(0))
#define READ(p, n) sim::access((uintptr_t)(p), n, false, false, PC)
#define WRITE(p, n) sim::access((uintptr_t)(p), n, true, false, PC)
#define HOOKS(n)                                                               \
  void __tsan_read##n(void* p) { READ(p, n); }                                 \
  void __tsan_write##n(void* p) { WRITE(p, n); }                               \
  void __tsan_unaligned_read##n(void* p) { READ(p, n); }                       \
  void __tsan_unaligned_write##n(void* p) { WRITE(p, n); }                     \
  void __tsan_read_write##n(void* p) { READ(p, n); WRITE(p, n); }              \
  void __tsan_unaligned_read_write##n(void* p) { READ(p, n); WRITE(p, n); }
extern "C" {
void msl_atomic_access(const void* p, unsigned size, int is_write) {
  if (sim::state.options.check) sim::access((uintptr_t)p, size, is_write, true, PC);
}
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)
void* __tsan_memcpy(void* to, const void* from, size_t n) {
  READ(from, n);
  WRITE(to, n);
  return memcpy(to, from, n);
}
void* __tsan_memmove(void* to, const void* from, size_t n) {
  READ(from, n);
  WRITE(to, n);
  return memmove(to, from, n);
}
void* __tsan_memset(void* to, int value, size_t n) {
  WRITE(to, n);
  return memset(to, value, n);
}
void __tsan_read_range(void* p, size_t n) { READ(p, n); }
void __tsan_write_range(void* p, size_t n) { WRITE(p, n); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
