// One dispatch: threadgroups one after the other, each from its start to the return of its last thread.
#include "state.h"

namespace sim {

constexpr unsigned kGap = 256;

struct Shape {
  unsigned grid[3], threads[3], groups[3];
};

static bool allocate_once() {
  if (state.arena) return true;
  state.arena = (char*)map_memory(kArenaBytes);
  state.arena_cells = (Cell*)map_memory(kArenaBytes * sizeof(Cell));
  state.stacks = (char*)map_memory((size_t)kStackBytes * kMaxThreads);
  for (unsigned i = 0; i < kMaxThreads; i++) mprotect(state.stacks + (size_t)kStackBytes * i, 4096, 0);
  state.fibers = (Fiber*)map_memory(kMaxThreads * sizeof(Fiber));
  state.groups = (SimdGroup*)map_memory(kMaxThreads / 32 * sizeof(SimdGroup));
  return true;
}

static void start_group(SimdGroup& g, unsigned first, unsigned lanes) {
  g.all = g.live = g.runnable = lanes == 32 ? ~0u : (1u << lanes) - 1;
  g.arrived = 0;
  g.parity = 0;
  g.is_mixed = false;
  g.epoch[kThreadgroup] = g.epoch[kDevice] = 0;
  g.fibers = state.fibers + first;
}

static void start_thread(unsigned i, const unsigned at[3], const unsigned size[3], unsigned n_groups, const Shape& s) {
  Fiber& f = state.fibers[i];
  f.stack = (uintptr_t)state.stacks + (size_t)kStackBytes * i;
  f.group = &state.groups[i / 32];
  f.lane = i % 32;
  f.bit = 1u << f.lane;
  unsigned in_group[3] = {i % size[0], i / size[0] % size[1], i / size[0] / size[1]};
  msl_thread& t = f.thread;
  for (int k = 0; k < 3; k++) {
    t.pos_in_tg[k] = in_group[k];
    t.tg_pos[k] = at[k];
    t.pos_in_grid[k] = at[k] * s.threads[k] + in_group[k];
    t.tg_size[k] = size[k];
    t.disp_tg[k] = s.threads[k];
    t.grid[k] = s.grid[k];
    t.ntg[k] = s.groups[k];
  }
  t.idx_in_tg = i;
  t.lane = f.lane;
  t.simdgroup = i / 32;
  t.nsimdgroups = n_groups;
  t.buffers = state.pointers;
  start_fiber(f);
}

// All live threads wait: checks that it is at one barrier, and lets them pass. False when none is left.
static bool pass_barrier(unsigned n_threads, unsigned n_groups) {
  const Fiber* first = nullptr;
  unsigned n_live = 0;
  bool is_mixed = false;
  for (unsigned i = 0; i < n_threads; i++) {
    const Fiber& f = state.fibers[i];
    if (f.wait == kExited) continue;
    n_live++;
    if (!first) first = &f;
    else if (!(first->site == f.site)) is_mixed = true;
  }
  if (!first) return false;
  state.counters.barriers++;
  char message[500];
  if (n_live != n_threads && !state.options.early_exit) {
    snprintf(message, sizeof message, "barrier reached by %u of %u threads (the others returned): %s", n_live,
             n_threads, describe(*first).text);
    report("divergence", message, 0, first->site);
  }
  if (is_mixed) {
    snprintf(message, sizeof message, "threads wait at different barriers: %s", describe(*first).text);
    report("divergence", message, 0, first->site);
    state.is_aborted = true;
    return false;
  }
  bool is_ordering_all = !first->flags && state.options.none_is_execution;
  if (first->flags & kFlagThreadgroup || is_ordering_all) state.epoch[kThreadgroup]++;
  if (first->flags & kFlagDevice || is_ordering_all) state.epoch[kDevice]++;
  for (unsigned g = 0; g < n_groups; g++) state.groups[g].runnable = state.groups[g].live;
  for (unsigned i = 0; i < n_threads; i++)
    if (state.fibers[i].wait == kAtBarrier) state.fibers[i].wait = kNotWaiting;
  return true;
}

static void run_threadgroup(long index, const Shape& s) {
  unsigned at[3] = {(unsigned)(index % s.groups[0]), (unsigned)(index / s.groups[0] % s.groups[1]),
                    (unsigned)(index / s.groups[0] / s.groups[1])};
  unsigned size[3];
  for (int k = 0; k < 3; k++) size[k] = min(s.threads[k], s.grid[k] - at[k] * s.threads[k]);
  unsigned n_threads = size[0] * size[1] * size[2], n_groups = (n_threads + 31) / 32;
  state.serial++;
  state.epoch[kThreadgroup] = state.epoch[kDevice] = 0;
  for (unsigned g = 0; g < n_groups; g++) start_group(state.groups[g], g * 32, min(32u, n_threads - g * 32));
  for (unsigned i = 0; i < n_threads; i++) start_thread(i, at, size, n_groups, s);
  do {
    for (unsigned g = 0; g < n_groups && !state.is_aborted; g++)
      run_group(state.groups[state.options.reverse ? n_groups - 1 - g : g]);
  } while (!state.is_aborted && pass_barrier(n_threads, n_groups));
}

static bool is_clear(unsigned offset, unsigned size) {
  for (int i = 0; i < state.n_variables; i++) {
    const Variable& v = state.variables[i];
    if (offset < v.offset + v.size + kGap && v.offset < offset + size + kGap) return false;
  }
  return true;
}

// Metal promises the alignment of the type and no more, in no order: an odd multiple of it, anywhere in memory, which the
// seed draws. Between two arrays lies a gap that is nobody's. Unchecked code may be compiled to fault on that, and gets more.
static unsigned place(unsigned size, unsigned align) {
  unsigned step = state.options.check ? 2 * align : kGap, odd = state.options.check ? align : 0;
  unsigned places = size + 2 * kGap < kArenaBytes ? (kArenaBytes - size - 2 * kGap) / step : 0;
  state.random = state.random * 1664525u + 1013904223u;
  for (unsigned n = 0, at = places ? (state.random >> 8) % places : 0; n < places; n++, at = (at + 1) % places) {
    unsigned offset = kGap + at * step + odd;
    if (is_clear(offset, size)) return offset;
  }
  report("threadgroup memory", "the simulator's threadgroup memory is full", 0, {nullptr, 0});
  abort_dispatch();
}

// A compiler may lay the arrays out in any order, so each is counted with the padding that the widest type behind it needs.
static void count_padded(unsigned size, unsigned align, const char* name) {
  unsigned widest = max(align, 16u);
  state.arena_bytes += (size + widest - 1) / widest * widest;
  if (state.arena_bytes <= (unsigned)state.options.threadgroup_bytes) return;
  char message[300];
  snprintf(message, sizeof message, "more than %d bytes with '%s': %u", state.options.threadgroup_bytes, name,
           state.arena_bytes);
  report("threadgroup memory", message, 0, {nullptr, 0});
}

static Variable& find_variable(unsigned id, unsigned size, unsigned align, const char* name, bool zero) {
  for (int i = 0; i < state.n_variables; i++)
    if (state.variables[i].id == id) return state.variables[i];
  if (state.n_variables == kMaxVariables) {
    report("threadgroup memory", "too many threadgroup variables for the simulator", 0, {nullptr, 0});
    abort_dispatch();
  }
  unsigned offset = place(size, align);
  count_padded(size, align, name);
  return state.variables[state.n_variables++] = {id, offset, size, align, name, zero, 0};
}

}  // namespace sim

using namespace sim;
extern "C" {
// A threadgroup variable of the running threadgroup, the same for all of its threads.
void* msl_tg_alloc(unsigned id, unsigned long size, unsigned align, const char* name, bool zero) {
  Variable& v = find_variable(id, (unsigned)size, align, name, zero);
  if (v.serial != state.serial) {
    v.serial = state.serial;
    memset(state.arena + v.offset, zero ? 0 : 0xff, size);
  }
  return state.arena + v.offset;
}

struct msl_buffer {
  void* pointer;
  unsigned long size;
  int flags;
  unsigned element_size;
  const char* name;
};
struct msl_statistics {
  long accesses, switches, simd_ops, barriers, threadgroup_read, threadgroup_written;
  unsigned threadgroup_bytes;
  int n_reports;
  long unwritten[kMaxOutputs];
};

// Runs one dispatch. Returns 0 if it ran to its end, 1 if it was given up, 2 if its arguments are out of range.
int msl_dispatch(void (*entry)(), msl_buffer* buffers, int n, const int* grid, const int* threads, const int* options,
                 msl_statistics* statistics) {
  if (n > kMaxBuffers || !allocate_once()) return 2;
  memcpy(&state.options, options, sizeof state.options);
  state.entry = entry;
  state.counters = {};
  state.is_aborted = false;
  state.n_reports = state.n_buffers = state.last_buffer = 0;
  state.n_variables = 0;
  state.arena_bytes = 0;
  state.random = (uint32_t)state.options.placement * 2654435761u;
  Shape shape;
  for (int k = 0; k < 3; k++) {
    shape.grid[k] = grid[k];
    shape.threads[k] = min(threads[k], grid[k]);
    shape.groups[k] = (shape.grid[k] + shape.threads[k] - 1) / shape.threads[k];
  }
  unsigned n_threads = shape.threads[0] * shape.threads[1] * shape.threads[2];
  if (!n_threads || n_threads > kMaxThreads) return 2;
  for (int i = 0; i < n; i++) {
    const msl_buffer& b = buffers[i];
    uintptr_t begin = (uintptr_t)b.pointer;
    state.pointers[i] = b.pointer;
    if (!b.size) continue;
    bool is_counted = state.options.count, has_cells = state.options.check && !is_counted && b.flags & kWritable;
    Cell* cells = has_cells ? (Cell*)calloc(b.size / b.element_size, sizeof(Cell)) : nullptr;
    unsigned char* touched = is_counted ? (unsigned char*)calloc(b.size, 1) : nullptr;
    state.buffers[state.n_buffers++] = {begin, begin + b.size, b.flags, b.element_size, b.name, cells, i, {}, touched};
  }
  dl_info module;
  state.module_begin = state.module_end = 0;
  if (dladdr((void*)entry, &module)) {
    state.module_begin = (uintptr_t)module.base;
    state.module_end = state.module_begin + (16u << 20);
  }
  long total = (long)shape.groups[0] * shape.groups[1] * shape.groups[2];
  for (long i = 0; i < total && !state.is_aborted; i += state.options.every)
    run_threadgroup(state.options.reverse ? total - 1 - i : i, shape);
  finish_pending_write(state.is_aborted);
  state.current = nullptr;

  *statistics = {state.counters.accesses, state.counters.switches, state.counters.simd_ops, state.counters.barriers,
                 state.counters.threadgroup_read, state.counters.threadgroup_written, state.arena_bytes, state.n_reports,
                 {}};
  int output = 0;
  for (int i = 0; i < state.n_buffers; i++) {
    Buffer& b = state.buffers[i];
    if (!(b.flags & kWritable)) continue;
    long unwritten = 0;
    bool is_counted = b.cells && !state.is_aborted && !(b.flags & kInitialized);
    for (size_t e = 0; is_counted && e < (b.end - b.begin) / b.element_size; e++) unwritten += !b.cells[e].is_written;
    if (output < kMaxOutputs) statistics->unwritten[output++] = unwritten;
    free(b.cells);
    b.cells = nullptr;
  }
  return state.is_aborted ? 1 : 0;
}
}
